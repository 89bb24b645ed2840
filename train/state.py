"""The state of a loader: which samples it has handed out, and where to go on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train.audit import Tally
from train.turns import Cursor, merge


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderState:
    """The state of a loader, of one rank or of all."""

    cursor: Cursor
    tally: Tally
    """Of the samples that were handed out with a weight."""
    left_out: tuple[tuple[int, int, int, int], ...] = ()
    """(source, source epoch, episode, frame) of those that were handed out without, since they could not be made."""

    def to_json(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        left_out = [list(each) for each in self.left_out]
        return {"cursor": self.cursor.to_json(), "tally": self.tally.to_json(), "left_out": left_out}

    @classmethod
    def from_json(cls, data: Any) -> "LoaderState":
        """Read it back.

        Raises:
            ValueError: that is no such state.
        """
        try:
            left_out = tuple((int(s), int(k), int(e), int(f)) for s, k, e, f in data["left_out"])
            return cls(cursor=Cursor.from_json(data["cursor"]), tally=Tally.from_json(data["tally"]), left_out=left_out)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of a loader: {str(data)[:200]}") from error


def merge_states(ranks: Sequence[LoaderState], before: LoaderState | None = None) -> LoaderState:
    """Return the state of all ranks from those of each, added to the state that they were opened with.

    Raises:
        CursorMismatchError: they are of different streams.
        ValueError: a lane that no rank knows, or of which two know different things.
    """
    cursor = merge([rank.cursor for rank in ranks])
    tally = sum((rank.tally for rank in ranks), Tally() if before is None else before.tally)
    left_out = {each for rank in ranks for each in rank.left_out} | set(() if before is None else before.left_out)
    return LoaderState(cursor=cursor, tally=tally, left_out=tuple(sorted(left_out)))
