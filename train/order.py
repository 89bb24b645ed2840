"""The order of training: which blocks of frames every window of a mixture holds, by arithmetic.

A block is a run of contiguous frames of one episode. A slot holds one block; a window is a run of slots. Periods of
slots hold each source in the share of its weight, shuffled by key, so that slot n's source, and how often that source
came before, takes no more than its period to know. A keyed permutation of that ordinal names the block, and the
quotient is the source's epoch. Nothing of the size of the frames, blocks or epochs is ever built; memory is that of
the episodes' lengths, of a few periods and of a window.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from math import ceil

import numpy as np
import numpy.typing as npt

from train.keyed import key_of, mix, permute

VERSION = 1
"""Of the arithmetic here: another one is another order."""
PERIOD_SLOTS = 4096
_SCALE = 1 << 32

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SourceFrames:
    """One source of a mixture: how long its episodes are, in an order that is the release's own."""

    name: str
    lengths: Ints
    """Frames of each episode [E]; an episode of none is never drawn."""
    weight: float = 1.0
    """Its share of the samples, relative to the other sources; 0 leaves it out."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Some blocks, one a slot; every array is [K] of int64."""

    source: Ints
    """Index among the order's sources."""
    epoch: Ints
    """How often the source had been used up before."""
    episode: Ints
    """Index into the source's ``lengths``."""
    start: Ints
    """First frame."""
    end: Ints
    """The frame after the last."""

    @property
    def num_samples(self) -> int:
        """Frames of all blocks."""
        return int((self.end - self.start).sum())

    def samples(self) -> tuple[Ints, Ints]:
        """Return (slot within these blocks, frame index) of every sample, block by block."""
        lengths = self.end - self.start
        first = np.cumsum(lengths) - lengths
        slot, offset = (np.repeat(each, lengths) for each in (np.arange(len(lengths)), self.start - first))
        return slot, np.arange(len(slot)) + offset


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of one mixture, endless or one pass over every block; see ``mixture`` and ``one_pass``.

    Windows are numbered from 0, and any of them costs the same to ask for.
    """

    sources: tuple[SourceFrames, ...]
    seed: int
    block_frames: int
    window_blocks: int
    period: int
    """Slots of a period."""
    borders: tuple[int, ...]
    """Cumulative shares of the sources among the slots, in units of 1 / ``scale``."""
    scale: int
    num_slots: int | None
    """None where it is endless."""
    _index: "_Index" = field(repr=False)

    @property
    def num_windows(self) -> int | None:
        """None where it is endless."""
        return None if self.num_slots is None else ceil(self.num_slots / self.window_blocks)

    def window(self, number: int) -> Blocks:
        """Return the blocks of a window; the last one of a finite order may hold fewer.

        Raises:
            IndexError: there is no such window.
        """
        first = number * self.window_blocks
        if number < 0 or (self.num_slots is not None and first >= self.num_slots):
            raise IndexError(f"window {number} of {self.num_windows}")
        end = first + self.window_blocks
        return self.slots(first, end if self.num_slots is None else min(end, self.num_slots))

    def slots(self, first: int, end: int) -> Blocks:
        """Return the blocks of slots ``first`` to ``end``.

        Raises:
            IndexError: there are no such slots.
        """
        if not 0 <= first < end or (self.num_slots is not None and end > self.num_slots):
            raise IndexError(f"slots {first} to {end} of {self.num_slots}")
        pieces: list[tuple[Ints, Ints]] = []
        while first < end:
            stop = min(end, (first // self.period + 1) * self.period)
            pieces.append(self._in_period(first, stop))
            first = stop
        source, ordinal = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return self._blocks(source, ordinal)

    def shares(self) -> dict[str, float]:
        """Return each source's exact share of the samples in the long run."""
        slots = [end - start for start, end in pairwise((0, *self.borders))]
        index = zip(slots, self._index.frames.tolist(), self._index.blocks.tolist(), strict=True)
        parts = [n * frames / max(1, blocks) for n, frames, blocks in index]
        return {source.name: part / sum(parts) for source, part in zip(self.sources, parts, strict=True)}

    @cached_property
    def fingerprint(self) -> str:
        """Name everything that this order depends on: another fingerprint is another order."""
        digest = hashlib.sha256(
            f"order {VERSION} {self.seed} {self.block_frames} {self.window_blocks} {self.period} {self.borders} "
            f"{self.scale} {self.num_slots}".encode()
        )
        for source in self.sources:
            digest.update(f"\0{source.name}\0{len(source.lengths)}\0".encode())
            digest.update(np.ascontiguousarray(source.lengths, "<i8").tobytes())
        return digest.hexdigest()

    def _in_period(self, first: int, end: int) -> tuple[Ints, Ints]:
        """Return (source, ordinal within the source) of slots that lie in one period."""
        period, at = divmod(first, self.period)
        if self.num_slots is None:
            source, ordinal = _shuffled_period(self.seed, period, self.period, self.borders, self.scale)
            return source[at : at + end - first], ordinal[at : at + end - first]
        place = permute(key_of(self.seed, "pass"), self.period, np.arange(first, end, dtype=np.uint64)).astype(np.int64)
        source = np.searchsorted(self.borders, place, side="right")
        return source, place - self._index.first_block[source]

    def _blocks(self, source: Ints, ordinal: Ints) -> Blocks:
        num_blocks = self._index.blocks[source]
        epoch, rest = np.divmod(ordinal, num_blocks)
        keys = mix(self._source_keys[source], epoch.astype(np.uint64))
        block = permute(keys, num_blocks.astype(np.uint64), rest.astype(np.uint64)).astype(np.int64)
        episode, start, end = self._index.locate(source, block)
        return Blocks(source=source, epoch=epoch, episode=episode, start=start, end=end)

    @cached_property
    def _source_keys(self) -> npt.NDArray[np.uint64]:
        return np.array([key_of(self.seed, "source", source.name) for source in self.sources], np.uint64)


def mixture(
    sources: Sequence[SourceFrames], *, seed: int = 0, block_frames: int = 32, window_blocks: int = 128
) -> Order:
    """Return the endless order of a weighted mixture; a source that is used up begins its next epoch.

    Args:
        block_frames: frames of a block, at most.
        window_blocks: blocks that are shuffled together, sample by sample.

    Raises:
        ValueError: no source, weights that are negative or sum to zero, a source with a weight and no frames,
            a share of fewer than two blocks in 4,096, or two sources of one name.
    """
    index = _checked(sources, block_frames, window_blocks)
    weights = [Fraction(source.weight) for source in sources]
    if sum(weights) == 0:
        raise ValueError(f"the weights of {', '.join(s.name for s in sources)} sum to zero; give one of them a weight")
    blocks, frames = index.blocks.tolist(), index.frames.tolist()
    for source, num_frames in zip(sources, frames, strict=True):
        if source.weight and not num_frames:
            raise ValueError(f"source {source.name} has a weight of {source.weight:g} and no frames; leave it out")
    # A block of source i holds frames / blocks samples on average: weights are shares of samples, not of blocks.
    shares = [w * n / max(1, of) for w, n, of in zip(weights, blocks, frames, strict=True)]
    whole = sum(shares)
    for source, share in zip(sources, shares, strict=True):
        if 0 < share * PERIOD_SLOTS < 2 * whole:
            raise ValueError(
                f"source {source.name} would get {float(share / whole):.2g} of the blocks; the least that can be mixed "
                f"is {2 / PERIOD_SLOTS:.2g}. Raise its weight of {source.weight:g}, or leave it out"
            )
    borders = tuple(round(sum(shares[: at + 1]) * _SCALE / whole) for at in range(len(shares)))
    return Order(
        sources=tuple(sources),
        seed=seed,
        block_frames=block_frames,
        window_blocks=window_blocks,
        period=PERIOD_SLOTS,
        borders=borders,
        scale=_SCALE,
        num_slots=None,
        _index=index,
    )


def one_pass(
    sources: Sequence[SourceFrames], *, seed: int = 0, block_frames: int = 32, window_blocks: int = 128
) -> Order:
    """Return a finite order in which every frame of every source comes exactly once, whatever the weights.

    Raises:
        ValueError: no source, no frames at all, or two sources of one name.
    """
    index = _checked(sources, block_frames, window_blocks)
    borders = np.cumsum(index.blocks).tolist()
    if not borders[-1]:
        raise ValueError(f"none of {', '.join(source.name for source in sources)} has a frame")
    return Order(
        sources=tuple(sources),
        seed=seed,
        block_frames=block_frames,
        window_blocks=window_blocks,
        period=borders[-1],
        borders=tuple(borders),
        scale=borders[-1],
        num_slots=borders[-1],
        _index=index,
    )


def weights_by_size(num_frames: Sequence[int], *, temperature: float = 1.0) -> list[float]:
    """Return weights in proportion to frames to the power of 1 / temperature: 1 keeps sizes, more evens them out.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; give a positive number, 1 for shares by size")
    parts = [float(n) ** (1 / temperature) if n else 0.0 for n in num_frames]
    return [part / sum(parts) if part else 0.0 for part in parts]


def is_validation(uid_keys: npt.NDArray[np.uint64], fraction: float, *, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Return which episodes are for validation: by their uid alone, so one never changes sides as a lake grows.

    Args:
        uid_keys: 64 bits of each episode's uid [E].

    Raises:
        ValueError: a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}; give a number from 0 up to, but not, 1")
    return mix(key_of(seed, "validation"), uid_keys) < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


@dataclass(frozen=True, kw_only=True)
class _Index:
    """Where the blocks of all sources are: episode e of them all has blocks ``borders[e]`` to ``borders[e + 1]``.

    S is the number of sources, E that of all their episodes.
    """

    lengths: Ints
    """Frames [E]."""
    borders: Ints
    """[E + 1]."""
    blocks: Ints
    """Of each source [S]."""
    frames: Ints
    """Of each source [S]."""
    first_block: Ints
    """Of each source [S]."""
    first_episode: Ints
    """Of each source [S]."""

    def locate(self, source: Ints, block: Ints) -> tuple[Ints, Ints, Ints]:
        """Return (episode, first frame, frame after the last): an episode is cut evenly, to a frame."""
        block = block + self.first_block[source]
        episode = np.searchsorted(self.borders, block, side="right") - 1
        first, frames = self.borders[episode], self.lengths[episode]
        count, nth = self.borders[episode + 1] - first, block - first
        return episode - self.first_episode[source], nth * frames // count, (nth + 1) * frames // count


@lru_cache(maxsize=64)
def _shuffled_period(seed: int, period: int, size: int, borders: tuple[int, ...], scale: int) -> tuple[Ints, Ints]:
    """Return (source, ordinal within the source) of every slot of a period of an endless order [size]."""
    # Up to the end of a period, sources 0 ... i have had the whole part of their share of all slots, so shares are
    # exact for ever, however small, and a source's count in a period is off by less than two. Not in 64 bits.
    until = [[slots * border // scale for border in (0, *borders)] for slots in (period * size, (period + 1) * size)]
    before, after = ([end - start for start, end in pairwise(each)] for each in until)
    counts = np.subtract(after, before).astype(np.int64)
    source, rank = np.empty(size, np.int64), np.empty(size, np.int64)
    # Hashes under one key all differ, so that this is a shuffle.
    shuffled = np.argsort(mix(key_of(seed, "period", period), np.arange(size, dtype=np.uint64)))
    source[shuffled] = np.repeat(np.arange(len(borders)), counts)
    # Ordinals follow the slots, so that an epoch of a small source is over before its next one begins.
    by_source = np.argsort(source.astype(np.min_scalar_type(len(borders))), kind="stable")
    rank[by_source] = np.arange(size) - np.repeat(np.cumsum(counts) - counts, counts)
    return source, np.array(before)[source] + rank


def _checked(sources: Sequence[SourceFrames], block_frames: int, window_blocks: int) -> _Index:
    if not sources:
        raise ValueError("a mixture needs at least one source")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"two sources of one name among {', '.join(sorted(names))}")
    if min(block_frames, window_blocks) < 1:
        raise ValueError(f"block_frames={block_frames} and window_blocks={window_blocks} must be at least 1")
    for source in sources:
        if not (source.weight >= 0 and np.isfinite(source.weight)):
            raise ValueError(f"source {source.name} has a weight of {source.weight}; give 0 or a positive number")
        if len(source.lengths) and source.lengths.min() < 0:
            raise ValueError(f"source {source.name} has an episode of {source.lengths.min()} frames")
    lengths = np.concatenate([np.asarray(source.lengths, np.int64) for source in sources])
    borders = np.append(0, np.cumsum(-(-lengths // block_frames)))
    first_episode = np.cumsum([0, *(len(source.lengths) for source in sources)])
    num_blocks = np.diff(borders[first_episode])
    return _Index(
        lengths=lengths,
        borders=borders,
        blocks=num_blocks,
        frames=np.diff(np.append(0, np.cumsum(lengths))[first_episode]),
        first_block=borders[first_episode[:-1]],
        first_episode=first_episode[:-1],
    )
