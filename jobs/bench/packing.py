"""Measure how full packs are, beside first-fit and beside padding."""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.bench.mixtures import MIXTURES, costs_of, made, of_lake, stream_of
from train.lanes import Stream
from train.order import weights_by_size
from train.packing import Budgets
from train.tokens import FAMILIES, Family, padded_tokens

Ints = npt.NDArray[np.int64]

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


def run(config: Config) -> dict[str, Any]:
    """Return {"what", "numbers", "rows"}."""
    if config.lake:
        sources = of_lake(config.lake)
        mixtures = {"by size": tuple(weights_by_size([int(each.lengths.sum()) for each in sources]))}
    else:
        sources, mixtures = made(config.episodes), MIXTURES
    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        costs = [costs_of(FAMILIES[family], each) for each in sources]
        for tokens in _TOKENS:
            for name, shares in mixtures.items():
                row = {"family": family, "budget_tokens": tokens, "mixture": name}
                rows.append(
                    row | _measured(FAMILIES[family], stream_of(sources, costs, shares, tokens), config.windows)
                )
                print(rows[-1], file=sys.stderr, flush=True)
    main = [row for row in rows if row["family"] == "pi05" and row["budget_tokens"] == _TOKENS[0]]
    numbers: dict[str, Any] = {key: min(row[key] for row in main) for key in ("fill_tokens", "fill_images")}
    for row in rows:
        numbers[f"{row['family']} {row['budget_tokens']} {row['mixture']}"] = {
            key: value for key, value in row.items() if key not in ("family", "budget_tokens", "mixture")
        }
    return {"what": "fill of packs, beside first-fit and padding", "numbers": numbers, "rows": rows}


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
