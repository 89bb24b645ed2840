"""Measure how full packs are, beside first-fit and beside padding."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lake import Lake
from train.lanes import Costs, Stream
from train.order import SourceFrames, mixture, weights_by_size
from train.packing import Budgets, Kind, budgets_for
from train.tokens import FAMILIES, Family, WordTokenizer, padded_tokens, sample_costs

Ints = npt.NDArray[np.int64]

_WORDS = (
    *(
        "pick",
        "place",
        "push",
        "open",
        "close",
        "fold",
        "pour",
        "wipe",
        "the",
        "red",
        "green",
        "small",
        "left",
        "right",
    ),
    *("cup", "bowl", "plate", "drawer", "microwave", "towel", "bottle", "into", "from", "onto", "carefully", "and"),
)
_NUM_TASKS, _TASK_WORDS = 200, (2, 16)
_CAMERAS = ((1, 7), (2, 14), (3, 26))
"""Views, and dimensions of the state, of the made sources."""
_MIXTURES = {"40/40/20": (0.4, 0.4, 0.2), "60/30/10": (0.6, 0.3, 0.1)}
_TOKENS = (16_384, 8_192)
_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Pack mixtures of samples of 1, 2 and 3 cameras, as a run would: a stream over sources with weights.

    First-fit gets the same samples and budgets, window by window, in a random order.
    """

    lake: str = ""
    """A lake whose last release is packed instead, each source by its size; empty makes episodes up."""
    episodes: int = 2000
    """Episodes of each made source."""
    windows: int = 32
    """Windows of each mixture that are packed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Episodes:
    """What the metadata of one source say of its episodes; arrays are [E]."""

    name: str
    lengths: Ints
    views: Ints
    state_dims: Ints
    tasks: Sequence[Sequence[str]]


def run(config: Config) -> dict[str, Any]:
    """Return {"what", "numbers", "rows"}."""
    if config.lake:
        sources = _of_lake(config.lake)
        mixtures = {"by size": tuple(weights_by_size([int(each.lengths.sum()) for each in sources]))}
    else:
        sources, mixtures = _made(config.episodes), _MIXTURES
    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        costs = [_costs(FAMILIES[family], each) for each in sources]
        for tokens in _TOKENS:
            for name, shares in mixtures.items():
                row = {"family": family, "budget_tokens": tokens, "mixture": name}
                rows.append(row | _measured(FAMILIES[family], _stream(sources, costs, shares, tokens), config.windows))
                print(rows[-1], file=sys.stderr, flush=True)
    main = [row for row in rows if row["family"] == "pi05" and row["budget_tokens"] == _TOKENS[0]]
    numbers: dict[str, Any] = {key: min(row[key] for row in main) for key in ("fill_tokens", "fill_images")}
    for row in rows:
        numbers[f"{row['family']} {row['budget_tokens']} {row['mixture']}"] = {
            key: value for key, value in row.items() if key not in ("family", "budget_tokens", "mixture")
        }
    return {"what": "fill of packs, beside first-fit and padding", "numbers": numbers, "rows": rows}


def _made(num_episodes: int) -> list[Episodes]:
    rng = np.random.default_rng(_SEED)
    sources: list[Episodes] = []
    for views, state_dim in _CAMERAS:
        texts = [[" ".join(rng.choice(_WORDS, rng.integers(*_TASK_WORDS)))] for _ in range(_NUM_TASKS)]
        sources.append(
            Episodes(
                name=f"{views} cameras",
                lengths=rng.integers(80, 600, num_episodes),
                views=np.full(num_episodes, views),
                state_dims=np.full(num_episodes, state_dim),
                tasks=[texts[at] for at in rng.integers(0, _NUM_TASKS, num_episodes)],
            )
        )
    return sources


def _of_lake(uri: str) -> list[Episodes]:
    columns = ["source", "num_frames", "views", "tasks", "state_dim"]
    table = Lake(uri).release().episodes(columns=columns).to_pydict()
    names = np.array(table["source"])
    sources: list[Episodes] = []
    for name in sorted(set(table["source"])):
        mine = np.flatnonzero(names == name).tolist()
        sources.append(
            Episodes(
                name=name,
                lengths=np.array([table["num_frames"][at] for at in mine], np.int64),
                views=np.array([len(table["views"][at] or ()) for at in mine], np.int64),
                state_dims=np.array([table["state_dim"][at] or 0 for at in mine], np.int64),
                tasks=[table["tasks"][at] or [] for at in mine],
            )
        )
    return sources


def _costs(family: Family, episodes: Episodes) -> Costs:
    return sample_costs(
        family,
        task_texts=episodes.tasks,
        num_views=episodes.views,
        state_dim=episodes.state_dims,
        tokenizer=WordTokenizer(),
    )


def _stream(sources: Sequence[Episodes], costs: Sequence[Costs], shares: Sequence[float], tokens: int) -> Stream:
    frames = [
        SourceFrames(name=each.name, lengths=each.lengths, weight=share)
        for each, share in zip(sources, shares, strict=True)
    ]
    kinds: list[Kind] = []
    for source, cost, share in zip(sources, costs, shares, strict=True):
        for views in np.unique(source.views):
            lengths = source.lengths * (source.views == views)
            part = lengths.sum() / source.lengths.sum()
            if share * part:
                mean = float((cost.tokens * lengths).sum() / lengths.sum())
                kinds.append(Kind(share=float(share * part), tokens=mean, images=int(views)))
    return Stream(
        order=mixture(frames, seed=_SEED),
        costs=tuple(costs),
        budgets=budgets_for(kinds, tokens=tokens),
        num_lanes=1,
    )


def _measured(family: Family, stream: Stream, num_windows: int) -> dict[str, Any]:
    packs: list[tuple[int, int, int]] = []
    first_fit: list[tuple[int, int, int]] = []
    rng = np.random.default_rng(_SEED)
    for number in range(num_windows):
        window = stream.window(number)
        packs += [(int(pack.tokens.sum()), int(pack.images.sum()), pack.num_samples) for pack in window]
        costs = np.concatenate([[pack.tokens, pack.images] for pack in window], axis=1)
        first_fit += _first_fit(rng.permutation(costs, axis=1), stream.budgets)
    row = _fill(packs, stream.budgets)
    row |= {f"first_fit_{key}": value for key, value in _fill(first_fit, stream.budgets).items()}
    row |= {"budget_images": stream.budgets.images, "budget_samples": stream.budgets.samples, "windows": num_windows}
    if family.padded_views is not None:
        tokens, _, samples = np.sum(packs, axis=0)
        useful = float(tokens / samples / padded_tokens(family))
        row |= {"padded_useful": useful, "packed_over_padded": row["fill_tokens"] / useful}
    return row


def _first_fit(costs: Ints, budgets: Budgets) -> list[tuple[int, int, int]]:
    """Return (tokens, images, samples) of each pack: every sample goes to the first that has room."""
    limits = np.array([budgets.tokens, budgets.images, budgets.samples])
    room = np.tile(limits, (costs.shape[1], 1))
    for tokens, images in costs.T.tolist():
        cost = np.array([tokens, images, 1])
        room[(room >= cost).all(axis=1).argmax()] -= cost
    used = limits - room
    return [(int(t), int(i), int(n)) for t, i, n in used[used[:, 2] > 0]]


def _fill(packs: list[tuple[int, int, int]], budgets: Budgets) -> dict[str, float]:
    tokens, images, samples = np.mean(packs, axis=0)
    return {
        "packs": len(packs),
        "fill_tokens": float(tokens / budgets.tokens),
        "fill_images": float(images / budgets.images),
        "fill_samples": float(samples / budgets.samples),
        "tokens_std": float(np.std([count for count, _, _ in packs])),
        "samples_std": float(np.std([count for _, _, count in packs])),
    }
