"""An order-independent sum over the samples that a run consumed, to compare with what it ought to have consumed.

The sum of a set of samples is the same in whatever order, on whatever ranks and after whatever restarts they came, and
two sets that differ have different sums but for a chance of about 2^-128.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from train.keyed import key_of, mix
from train.lanes import Pack, Stream
from train.turns import Cursor, positions_of

Ints = npt.NDArray[np.int64]

_WORD = 1 << 64
_SUM = re.compile("[0-9a-f]{32}")
_KEYS = np.array([key_of("audit", 0), key_of("audit", 1)], np.uint64)


@dataclass(frozen=True, slots=True)
class Tally:
    """How many samples there were, and the sum of their hashes in two words of 64 bits."""

    count: int = 0
    low: int = 0
    high: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.count + other.count, (self.low + other.low) % _WORD, (self.high + other.high) % _WORD)

    def __sub__(self, other: "Tally") -> "Tally":
        return Tally(self.count - other.count, (self.low - other.low) % _WORD, (self.high - other.high) % _WORD)

    def __str__(self) -> str:
        return f"{self.count} samples {self.high:016x}{self.low:016x}"

    def to_json(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {"count": self.count, "sum": f"{self.high:016x}{self.low:016x}"}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Tally":
        """Read it back.

        Raises:
            ValueError: that is no tally.
        """
        try:
            count, words = int(data["count"]), str(data["sum"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a tally: {data!r}") from error
        if not _SUM.fullmatch(words):
            raise ValueError(f"not a tally: {data!r}; its sum has 32 hexadecimal digits")
        return cls(count, int(words[16:], 16), int(words[:16], 16))


def tally(source: Ints, epoch: Ints, episode: Ints, frame: Ints) -> Tally:
    """Return the tally of samples: the source's epoch belongs to a sample's identity, so repeats do not cancel.

    Args:
        source: index of each sample's source [N]; the others likewise.
    """
    words = np.repeat(_KEYS[:, None], len(frame), axis=1)
    for part in (source, epoch, episode, frame):
        words = mix(words, part.astype(np.uint64))
    low, high = words.sum(axis=1, dtype=np.uint64).tolist()
    return Tally(len(frame), low, high)


def tally_packs(packs: Iterable[Pack | None]) -> Tally:
    """Return the tally of some packs; None counts as nothing."""
    total = Tally()
    for pack in packs:
        if pack is not None:
            total = total + tally(pack.source, pack.epoch, pack.episode, pack.frame)
    return total


def expected(stream: Stream, cursor: Cursor) -> Tally:
    """Return the tally of everything that lies before a cursor. Whole windows are summed without packing them.

    Raises:
        CursorMismatchError: the cursor belongs to another stream.
    """
    total = Tally()
    for lane, (_, windows, packs) in enumerate(positions_of(stream, cursor)):
        for window in range(windows):
            blocks = stream.order.window(lane + window * stream.num_lanes)
            slot, frame = blocks.samples()
            total = total + tally(blocks.source[slot], blocks.epoch[slot], blocks.episode[slot], frame)
        if packs:
            total = total + tally_packs(stream.window(lane + windows * stream.num_lanes)[:packs])
    return total
