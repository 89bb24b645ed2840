"""Whose turn it is: the lanes of a rank, step by step, and the cursor from which any number of ranks goes on.

Lane g of G takes windows g, g + G, g + 2 G, ... and a step takes one pack from every lane, so the packs of a step
depend on G and never on how many ranks there are. Rank r of W owns lanes r, r + W, ...; after a resize the lanes are
dealt anew. A finite pass ends each lane at its last window; its turns are without a pack until all lanes have ended.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any, NamedTuple

from train.lanes import Stream


class CursorMismatchError(ValueError):
    """A cursor belongs to another stream of packs."""


class Position(NamedTuple):
    """Where a lane stands."""

    steps: int
    """Steps that it has done."""
    window: int
    """Index of its window among its own."""
    packs: int
    """Packs of that window that were taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """Where a stream stands, lane by lane."""

    fingerprint: str
    """Of the stream."""
    lanes: tuple[Position | None, ...]
    """None where another rank knows [G]."""

    @property
    def step(self) -> int:
        """Steps that every known lane has done."""
        return min((lane.steps for lane in self.lanes if lane is not None), default=0)

    def to_json(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {"fingerprint": self.fingerprint, "lanes": [lane and list(lane) for lane in self.lanes]}

    @classmethod
    def from_json(cls, data: Any) -> "Cursor":
        """Read it back.

        Raises:
            ValueError: that is no cursor.
        """
        try:
            lanes = tuple(None if lane is None else Position(*(int(each) for each in lane)) for lane in data["lanes"])
            return cls(fingerprint=str(data["fingerprint"]), lanes=lanes)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a cursor of a stream of packs: {data!r}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One micro-step of a rank."""

    step: int
    lane: int | None
    """None where the rank has no lane left in this step: it takes part with a weight of zero."""
    window: int | None
    """Number of the window; None where the lane has ended, or there is none."""
    next_window: int | None
    """Of the same lane; None where this is its last one."""
    index: int
    """Of the pack within the window."""
    after: Position | None
    """Where the lane stands behind this turn."""


def start(stream: Stream) -> Cursor:
    """Return the cursor before the first step."""
    return Cursor(fingerprint=stream.fingerprint, lanes=(Position(0, 0, 0),) * stream.num_lanes)


def merge(cursors: Iterable[Cursor]) -> Cursor:
    """Return the cursor of all lanes from those of the ranks.

    Raises:
        CursorMismatchError: they are of different streams.
        ValueError: a lane that no rank knows, or of which two know different things.
    """
    given = list(cursors)
    if len({(cursor.fingerprint, len(cursor.lanes)) for cursor in given}) != 1:
        raise CursorMismatchError(f"these {len(given)} cursors are not of one stream")
    lanes: list[Position | None] = []
    for number, known in enumerate(zip(*(cursor.lanes for cursor in given), strict=True)):
        said = {each for each in known if each is not None}
        if len(said) != 1:
            what = "no rank knows" if not said else f"ranks say {sorted(said)} of"
            raise ValueError(f"{what} lane {number}; merge the cursors of all ranks of one step")
        lanes.append(said.pop())
    return Cursor(fingerprint=given[0].fingerprint, lanes=tuple(lanes))


def lanes_of_rank(rank: int, world_size: int, num_lanes: int) -> list[int]:
    """Return the lanes of a rank.

    Raises:
        ValueError: a rank outside the world, or more ranks than lanes.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}; ranks count from 0")
    if world_size > num_lanes:
        raise ValueError(
            f"world_size={world_size} is more than the {num_lanes} lanes: {world_size - num_lanes} ranks would never "
            "get a pack. Use fewer ranks, or start a run with more lanes"
        )
    return list(range(rank, num_lanes, world_size))


def share_lost(world_size: int, num_lanes: int) -> float:
    """Return which part of all micro-steps has a weight of zero; 0 where the lanes divide evenly."""
    return 1 - num_lanes / (world_size * ceil(num_lanes / world_size))


class Turns:
    """The turns of one rank. Every rank has as many in each step, so collective operations match."""

    def __init__(self, stream: Stream, rank: int = 0, world_size: int = 1, cursor: Cursor | None = None) -> None:
        """Begin at a cursor of all lanes.

        Raises:
            CursorMismatchError: the release, weights, filters, budgets, seed or anything else that defines the order
                differs from what the cursor was made with.
            ValueError: a cursor of some lanes only, or as ``lanes_of_rank``.
        """
        self._lanes = lanes_of_rank(rank, world_size, stream.num_lanes)
        cursor = start(stream) if cursor is None else cursor
        self._positions = positions_of(stream, cursor)
        self._stream = stream
        self._world_size = world_size
        self._step = cursor.step
        self._whole_from = max(position.steps for position in self._positions)
        self._turns = self._of_step()

    @property
    def micro_steps(self) -> int:
        """Turns of a whole step."""
        return ceil(self._stream.num_lanes / self._world_size)

    @property
    def share_lost(self) -> float:
        """Part of all ranks' micro-steps that have no lane; see ``share_lost``."""
        return share_lost(self._world_size, self._stream.num_lanes)

    def ahead(self, count: int) -> list[int]:
        """Return the windows of the next turns of this step, at most so many."""
        lanes = [lane for lane in (self._turns or [])[:count] if lane is not None and not self._has_ended(lane)]
        return [lane + self._positions[lane].window * self._stream.num_lanes for lane in lanes]

    def own_positions(self) -> dict[int, Position]:
        """Return where this rank's lanes stand."""
        return {lane: self._positions[lane] for lane in self._lanes}

    def cursor(self, positions: dict[int, Position]) -> Cursor:
        """Return a cursor that knows some lanes."""
        lanes = tuple(positions.get(lane) for lane in range(self._stream.num_lanes))
        return Cursor(fingerprint=self._stream.fingerprint, lanes=lanes)

    def peek(self) -> Turn | None:
        """Return the next turn; None where a finite pass is over."""
        if self._turns is not None and not self._turns:
            self._step += 1
            self._turns = self._of_step()
        if self._turns is None:
            return None
        lane = self._turns[0]
        if lane is None:
            return Turn(step=self._step, lane=None, window=None, next_window=None, index=0, after=None)
        steps, window, packs = self._positions[lane]
        if self._has_ended(lane):
            after = Position(steps + 1, window, packs)
            return Turn(step=self._step, lane=lane, window=None, next_window=None, index=0, after=after)
        number, num_windows = lane + window * self._stream.num_lanes, self._stream.order.num_windows
        following = number + self._stream.num_lanes
        return Turn(
            step=self._step,
            lane=lane,
            window=number,
            next_window=None if num_windows is not None and following >= num_windows else following,
            index=packs,
            after=Position(steps + 1, window, packs + 1),
        )

    def take(self, num_packs: int) -> Turn:
        """Take the next turn.

        Args:
            num_packs: of its window; of no account where it has none.
        """
        turn = self.peek()
        assert turn is not None, "the pass is over"
        assert self._turns
        self._turns.pop(0)
        if turn.lane is None or turn.after is None:
            return turn
        after = turn.after
        if turn.window is not None and turn.index + 1 >= num_packs:
            after = Position(after.steps, after.window + 1, 0)
        self._positions[turn.lane] = after
        return Turn(
            step=turn.step,
            lane=turn.lane,
            window=turn.window,
            next_window=turn.next_window,
            index=turn.index,
            after=after,
        )

    def _of_step(self) -> list[int | None] | None:
        """Return the lane of each turn of this step; None behind the last step."""
        if self._step >= self._whole_from:
            none = self.micro_steps - len(self._lanes)
            return None if self._is_over() else [*self._lanes, *[None] * none]
        # The cursor lies in the middle of a step, and some lanes have done it.
        undone = [lane for lane, position in enumerate(self._positions) if position.steps <= self._step]
        mine: list[int | None] = [lane for lane in self._lanes if lane in undone]
        most = max(Counter(lane % self._world_size for lane in undone).values())
        return mine + [None] * (most - len(mine))

    def _is_over(self) -> bool:
        """Whether all lanes of all ranks have ended before this step."""
        if self._stream.order.num_windows is None or not all(map(self._has_ended, self._lanes)):
            return False
        # Other ranks' lanes are asked for only now, since all their windows have to be planned.
        return self._world_size == 1 or self._step >= self._num_steps

    @cached_property
    def _num_steps(self) -> int:
        return self._stream.num_steps()

    def _has_ended(self, lane: int) -> bool:
        num_windows = self._stream.order.num_windows
        return num_windows is not None and lane + self._positions[lane].window * self._stream.num_lanes >= num_windows


def positions_of(stream: Stream, cursor: Cursor) -> list[Position]:
    """Return where each lane stands; errors as for ``Turns``."""
    if cursor.fingerprint != stream.fingerprint:
        raise CursorMismatchError(
            f"the cursor at step {cursor.step} belongs to another order ({cursor.fingerprint[:12]}, here "
            f"{stream.fingerprint[:12]}): release, filters, weights, tokenizer, budgets, lanes or seed changed. Resume "
            "with the configuration it was made with, or start a new run from its weights"
        )
    known = [lane for lane in cursor.lanes if lane is not None]
    if len(known) < len(cursor.lanes):
        raise ValueError(f"the cursor knows {len(known)} of {len(cursor.lanes)} lanes; merge those of all ranks first")
    return known
