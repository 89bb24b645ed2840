"""Mixtures of episodes to plan steps with: made up, or those of a lake."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from train.lanes import Costs, Stream
from train.order import SourceFrames, mixture
from train.packing import Kind, budgets_for
from train.tokens import Family, WordTokenizer, sample_costs

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
STATES = (7, 14, 26)
"""Dimensions of the states of made sources with 1, 2 and 3 views: an arm, two arms, a humanoid's upper body."""
ARMS = (7, 8, 14)
"""Likewise: an arm, LIBERO's arm with its gripper, two arms of ALOHA."""
MIXTURES = {"40/40/20": (0.4, 0.4, 0.2), "60/30/10": (0.6, 0.3, 0.1)}
_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Episodes:
    """What the metadata of one source say of its episodes; arrays are [E]."""

    name: str
    lengths: Ints
    views: Ints
    state_dims: Ints
    tasks: Sequence[Sequence[str]]


def made(num_episodes: int, *, states: tuple[int, int, int] = STATES) -> list[Episodes]:
    """Return sources of 1, 2 and 3 cameras with instructions of all lengths.

    Args:
        states: dimensions of their states.
    """
    rng = np.random.default_rng(_SEED)
    sources: list[Episodes] = []
    for views, state_dim in enumerate(states, start=1):
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


def of_lake(uri: str) -> list[Episodes]:
    """Return the sources of a lake's last release."""
    # Lance is not needed where episodes are made up.
    from lake import Lake

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


def costs_of(family: Family, episodes: Episodes) -> Costs:
    """Return what the samples of a source cost in a model."""
    return sample_costs(
        family,
        task_texts=episodes.tasks,
        num_views=episodes.views,
        state_dim=episodes.state_dims,
        tokenizer=WordTokenizer(),
    )


def stream_of(sources: Sequence[Episodes], costs: Sequence[Costs], shares: Sequence[float], tokens: int) -> Stream:
    """Return one lane of packs of a mixture, by shares of the sources."""
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
