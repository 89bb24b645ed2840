"""Lanes: endless streams of packs that any number of ranks can share.

Lane g of G takes windows g, g + G, g + 2 G, ... and a step takes one pack from every lane, so the packs of a step
depend on G and never on how many ranks there are.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from train import packing
from train.keyed import key_of
from train.order import Order
from train.packing import Budgets

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a sample of each episode of one source costs; equal for all its frames, so no frame is looked at."""

    tokens: Ints
    """[E]."""
    images: Ints
    """[E]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """The samples of one pack, by where they come from; N is their number."""

    window: int
    index: int
    """Of the pack within its window."""
    rows: Ints
    """Source, epoch, episode, frame, tokens, images and slot: a part of its window's [7, N]."""

    @property
    def num_samples(self) -> int:
        """Samples in it."""
        return self.rows.shape[1]

    @property
    def source(self) -> Ints:
        """Index of each sample's source among the order's [N]."""
        return self.rows[0]

    @property
    def epoch(self) -> Ints:
        """How often each sample's source had been used up before [N]."""
        return self.rows[1]

    @property
    def episode(self) -> Ints:
        """Index of each sample's episode within its source [N]."""
        return self.rows[2]

    @property
    def frame(self) -> Ints:
        """Of each sample within its episode [N]."""
        return self.rows[3]

    @property
    def tokens(self) -> Ints:
        """Of each sample [N]."""
        return self.rows[4]

    @property
    def images(self) -> Ints:
        """Of each sample [N]."""
        return self.rows[5]

    @property
    def slot(self) -> Ints:
        """Index of each sample's block within the window [N]."""
        return self.rows[6]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A stream of packs: an order, what its samples cost, and how many lanes it is dealt to."""

    order: Order
    costs: tuple[Costs, ...]
    """Of each source of the order."""
    budgets: Budgets
    num_lanes: int
    """G: packs of a step, and so the global batch."""
    salt: str = ""
    """Names what else a cursor depends on: which release and which of its episodes these are."""

    def __post_init__(self) -> None:
        """Raise ValueError where the parts do not fit together."""
        if self.num_lanes < 1:
            raise ValueError(f"num_lanes={self.num_lanes}; a step takes one pack from each lane, so give 1 or more")
        if len(self.costs) != len(self.order.sources):
            raise ValueError(f"costs of {len(self.costs)} sources for an order of {len(self.order.sources)}")
        for source, cost in zip(self.order.sources, self.costs, strict=True):
            if not len(source.lengths) == len(cost.tokens) == len(cost.images):
                raise ValueError(
                    f"source {source.name} has {len(source.lengths)} episodes, and costs of another number"
                )

    def window(self, number: int) -> list[Pack]:
        """Return the packs of a window, in the order in which its lane gives them.

        Raises:
            IndexError: there is no such window.
            SampleTooLargeError: a sample exceeds the budgets by itself.
        """
        blocks = self.order.window(number)
        slot, frame = blocks.samples()
        row = blocks.episode + self._first_row[blocks.source]
        tokens, images = self._tokens[row], self._images[row]
        key = key_of(self.order.seed, "window", number)
        try:
            ordered, ends = packing.pack_order(tokens[slot], images[slot], self.budgets, key=key)
        except packing.SampleTooLargeError:
            # Only now, since names take time.
            names = [
                f"frame {f} of episode {e} of source {self.order.sources[int(s)].name}"
                for s, e, f in zip(blocks.source[slot], blocks.episode[slot], frame, strict=True)
            ]
            packing.pack_order(tokens[slot], images[slot], self.budgets, key=key, names=names)
            raise
        # All samples at once, and a pack is a part of them: an array each for every pack takes longer than all else.
        slot, frame = slot[ordered], frame[ordered]
        rows = np.stack([blocks.source, blocks.epoch, blocks.episode, blocks.start, tokens, images, tokens])
        rows = rows.take(slot, axis=1)
        rows[3], rows[6] = frame, slot
        parts = enumerate(pairwise((0, *ends)))
        return [Pack(window=number, index=index, rows=rows[:, start:end]) for index, (start, end) in parts]

    def num_steps(self) -> int:
        """Return how many steps a finite order takes: until its longest lane has ended. Plans every window.

        Raises:
            ValueError: it is endless.
        """
        if self.order.num_windows is None:
            raise ValueError("an endless mixture has no number of steps; train for as many as you like")
        counts = [0] * self.num_lanes
        for window in range(self.order.num_windows):
            counts[window % self.num_lanes] += len(self.window(window))
        return max(counts)

    @cached_property
    def _first_row(self) -> Ints:
        """Return where each source's episodes begin among those of all."""
        lengths = np.array([len(source.lengths) for source in self.order.sources], np.int64)
        return np.cumsum(lengths) - lengths

    @cached_property
    def _tokens(self) -> Ints:
        return np.concatenate([np.asarray(cost.tokens, np.int64) for cost in self.costs])

    @cached_property
    def _images(self) -> Ints:
        return np.concatenate([np.asarray(cost.images, np.int64) for cost in self.costs])

    @cached_property
    def fingerprint(self) -> str:
        """Name everything that decides which samples step s holds."""
        digest = hashlib.sha256(
            f"{self.order.fingerprint} packing {packing.VERSION} {self.budgets} {self.num_lanes} {self.salt}".encode()
        )
        for cost in self.costs:
            for each in (cost.tokens, cost.images):
                digest.update(np.ascontiguousarray(each, "<i8").tobytes())
        return digest.hexdigest()
