"""Streams of packs to test with."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from train.lanes import Costs, Pack, Stream
from train.order import Order, SourceFrames, mixture, one_pass
from train.packing import Budgets
from train.turns import Cursor, Turn, Turns

RELAXED = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
BUDGETS = Budgets(tokens=100, images=6, samples=8)

Sample = tuple[int, int, int, int]


@st.composite
def streams(draw: st.DrawFn, make: Callable[..., Order] | None = None) -> Stream:
    sources, costs = [], []
    for at in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(0, 25), min_size=1, max_size=5).filter(any))
        weight = draw(st.sampled_from([0.5, 1.0, 4.0]))
        sources.append(SourceFrames(name=f"s{at}", lengths=np.array(lengths), weight=weight))
        of = [draw(st.lists(st.integers(1, most), min_size=len(lengths), max_size=len(lengths))) for most in (100, 6)]
        costs.append(Costs(tokens=np.array(of[0]), images=np.array(of[1])))
    make = make or draw(st.sampled_from([mixture, one_pass]))
    order = make(
        sources,
        seed=draw(st.integers(0, 1000)),
        block_frames=draw(st.integers(1, 9)),
        window_blocks=draw(st.integers(1, 5)),
    )
    return Stream(order=order, costs=tuple(costs), budgets=BUDGETS, num_lanes=draw(st.integers(1, 4)))


def samples(packs: list[Pack]) -> list[Sample]:
    return [
        (int(s), int(k), int(e), int(f))
        for pack in packs
        for s, k, e, f in zip(pack.source, pack.epoch, pack.episode, pack.frame, strict=True)
    ]


def small(
    *,
    make: Callable[..., Order] = mixture,
    lengths: tuple[int, ...] = (40, 64),
    name: str = "b",
    weight: float = 1.0,
    tokens: int = 20,
    images: int = 2,
    **options: int,
) -> Stream:
    first = SourceFrames(name="a", lengths=np.array([30, 50]))
    second = SourceFrames(name=name, lengths=np.array(lengths), weight=weight)
    costs = [Costs(tokens=np.full(2, 10), images=np.ones(2, np.int64))]
    costs.append(Costs(tokens=np.array([10, tokens]), images=np.array([1, images])))
    order = make([first, second], **{"seed": 1, "window_blocks": 4} | options)
    return Stream(order=order, costs=tuple(costs), budgets=BUDGETS, num_lanes=3)


CHANGES: dict[str, Stream] = {
    "seed": small(seed=2),
    "block": small(block_frames=16),
    "window": small(window_blocks=8),
    "lengths": small(lengths=(40, 65)),
    "name": small(name="c"),
    "weight": small(weight=2.0),
    "tokens": small(tokens=21),
    "images": small(images=3),
    "finite": small(make=one_pass),
    "lanes": replace(small(), num_lanes=4),
    "salt": replace(small(), salt="another release"),
    "token budget": replace(small(), budgets=replace(BUDGETS, tokens=101)),
    "image budget": replace(small(), budgets=replace(BUDGETS, images=7)),
    "sample budget": replace(small(), budgets=replace(BUDGETS, samples=9)),
}


def three_cameras(num_lanes: int) -> Stream:
    rng = np.random.default_rng(3)
    sources, costs = [], []
    for views, share in ((1, 0.4), (2, 0.4), (3, 0.2)):
        sources.append(SourceFrames(name=f"{views}", lengths=rng.integers(50, 300, 300), weight=share))
        costs.append(Costs(tokens=256 * views + rng.integers(30, 90, 300), images=np.full(300, views)))
    order = mixture(sources, seed=2, block_frames=16, window_blocks=32)
    return Stream(
        order=order, costs=tuple(costs), budgets=Budgets(tokens=4096, images=14, samples=12), num_lanes=num_lanes
    )


class Rank:
    """A rank that plans its packs and does nothing with them."""

    def __init__(self, stream: Stream, rank: int = 0, world_size: int = 1, cursor: Cursor | None = None) -> None:
        self._stream = stream
        self._turns = Turns(stream, rank, world_size, cursor)
        self._known = self._turns.own_positions()
        self.micro_steps = self._turns.micro_steps

    def next_turn(self) -> tuple[Turn, Pack | None] | None:
        turn = self._turns.peek()
        if turn is None:
            return None
        window = [] if turn.window is None else self._stream.window(turn.window)
        turn = self._turns.take(len(window))
        if turn.lane is not None and turn.after is not None:
            self._known[turn.lane] = turn.after
        return turn, window[turn.index] if window else None

    def next_step(self) -> list[Pack | None]:
        turns = [self.next_turn() for _ in range(self.micro_steps)]
        assert len({found is None for found in turns}) == 1, "a pass ends with a step"
        assert len({found[0].step for found in turns if found}) <= 1
        return [found[1] for found in turns if found]

    def cursor(self) -> Cursor:
        return self._turns.cursor(self._known)
