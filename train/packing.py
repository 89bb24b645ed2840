"""Packing a window's samples into packs of static budgets for tokens, images and samples.

The packs of a window are alike: each gets nearly the same number of samples of every kind, and nearly the same number
of tokens. So a pack is full in all its budgets at once, and training sees the same composition at every step, which
first-fit-decreasing does not give: it puts all large samples first.

N is the number of samples, P that of packs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from train.keyed import Words, key_of, mix

VERSION = 1
"""Of the arithmetic here: another one makes other packs."""

Ints = npt.NDArray[np.int64]

_KINDS = ("tokens", "images", "samples")


class SampleTooLargeError(ValueError):
    """One sample alone exceeds a budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """What a pack can hold. Tensors have these sizes always, so that one compiled graph serves every pack."""

    tokens: int = 16_384
    images: int
    samples: int

    def __post_init__(self) -> None:
        """Raise ValueError where nothing fits, or a position would not fit in 32 bits."""
        if self.tokens < 1 or self.images < 0 or self.samples < 1 or max(self.tokens, self.images) >> 31:
            raise ValueError(
                f"{self} can hold no pack; give 1 or more tokens and samples, and 0 or more images, below 2^31 each"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A part of a mixture whose samples cost the same, or nearly."""

    share: float
    """Of the mixture's samples, relative to the other parts."""
    tokens: float
    """Of one sample, on average."""
    images: int
    """Of one sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the samples of a pack lie on its token axis; all arrays have static sizes.

    T is the token budget, B that of samples. The unused tail is a segment of its own, so that varlen attention leaves
    no row without a value; entries behind it repeat T.
    """

    cu_seqlens: npt.NDArray[np.int32]
    """Where segments begin [B + 2]."""
    positions: npt.NDArray[np.int32]
    """Of each token within its segment [T]."""
    segment_ids: npt.NDArray[np.int32]
    """Index of each token's sample [T]; B in the tail."""


def budgets_for(kinds: Sequence[Kind], *, tokens: int = 16_384) -> Budgets:
    """Return budgets in which a mixture fills tokens, and images as far as can be.

    Raises:
        ValueError: no kind with a share.
    """
    total = sum(kind.share for kind in kinds)
    if not total > 0:
        raise ValueError("budgets need at least one kind of sample with a share")
    per_sample = sum(kind.share * kind.tokens for kind in kinds) / total
    images = sum(kind.share * kind.images for kind in kinds) / total
    # Packs are alike, and an image more than the mean would go unused in most. Samples vary more from window to
    # window, and an unused row of them costs little.
    num_images = max(int(tokens * images / per_sample + 0.1), *(kind.images for kind in kinds))
    smallest = min(kind.tokens for kind in kinds if kind.share)
    num_samples = int(min(np.ceil(1.15 * tokens / per_sample) + 2, np.ceil(tokens / smallest)))
    return Budgets(tokens=tokens, images=num_images, samples=max(1, num_samples))


def pack(tokens: Ints, images: Ints, budgets: Budgets, *, key: int, names: Sequence[str] | None = None) -> list[Ints]:
    """Return the samples of each pack, as indices; the same for the same arguments, whoever asks.

    The packs come in a keyed order, and so do the samples of a pack: neither order says anything about their sizes.

    Source: longest-processing-time-first (Graham, 1969), a round of one sample a pack at a time.

    Args:
        tokens: of each sample [N].
        images: of each sample [N].
        key: of the window.
        names: what to call the samples in messages [N].

    Raises:
        SampleTooLargeError: a sample that exceeds a budget by itself.
    """
    order, ends = pack_order(tokens, images, budgets, key=key, names=names)
    return [order[start:end] for start, end in pairwise((0, *ends))]


def pack_order(
    tokens: Ints, images: Ints, budgets: Budgets, *, key: int, names: Sequence[str] | None = None
) -> tuple[Ints, list[int]]:
    """Return (samples, pack after pack [N], where each pack ends [P]); as ``pack`` does, in fewer pieces.

    Raises:
        SampleTooLargeError: a sample that exceeds a budget by itself.
    """
    tokens, images = np.asarray(tokens, np.int64), np.asarray(images, np.int64)
    _check(tokens, images, budgets, names)
    if not len(tokens):
        return np.zeros(0, np.int64), []
    hashes = mix(key_of(key, "samples"), np.arange(len(tokens), dtype=np.uint64))
    # By images, then by tokens, large ones first.
    ranked = _sorted((budgets.images - images) * (budgets.tokens + 1) + budgets.tokens - tokens, hashes)
    sizes, views = tokens[ranked], images[ranked]
    # As rounds give each pack as many samples as any other, the budget of samples is kept from the start.
    num_packs = max(_least(tokens, budgets.tokens), _least(images, budgets.images), -(-len(tokens) // budgets.samples))
    while True:
        dealt, loads = _deal(sizes, num_packs)
        over = int((loads > budgets.tokens).sum()) or int((np.bincount(dealt, views, num_packs) > budgets.images).sum())
        # As many packs as samples never are over.
        if not over:
            break
        # Each that is over has to give up a sample at least.
        more = max(1 + num_packs // 512, -(-over * int(sizes.min()) // budgets.tokens))
        num_packs = min(len(tokens), num_packs + more)
    owner = np.empty_like(ranked)
    place = np.empty(num_packs, np.int64)
    place[np.argsort(mix(key_of(key, "packs"), np.arange(num_packs, dtype=np.uint64)))] = np.arange(num_packs)
    owner[ranked] = place[dealt]
    return _sorted(owner, hashes), np.cumsum(np.bincount(owner, minlength=num_packs)).tolist()


def layout(tokens: Ints, budgets: Budgets) -> Layout:
    """Return where the samples of one pack lie.

    Args:
        tokens: of each sample of the pack, in its order [N].

    Raises:
        ValueError: they exceed the budgets.
    """
    tokens = np.asarray(tokens, np.int64)
    ends = np.cumsum(tokens)
    used = int(ends[-1]) if len(ends) else 0
    if used > budgets.tokens or len(ends) > budgets.samples:
        raise ValueError(f"{len(ends)} samples of {used} tokens exceed {budgets}")
    cu_seqlens = np.full(budgets.samples + 2, budgets.tokens, np.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(ends) + 1] = ends
    lengths = np.append(tokens, budgets.tokens - used)
    starts = np.append(0, ends)
    positions = np.arange(budgets.tokens) - np.repeat(starts, lengths)
    segment_ids = np.repeat(np.append(np.arange(len(ends)), budgets.samples), lengths)
    return Layout(cu_seqlens=cu_seqlens, positions=positions.astype(np.int32), segment_ids=segment_ids.astype(np.int32))


def fill(packs: Sequence[Ints], tokens: Ints, images: Ints, budgets: Budgets) -> dict[str, float]:
    """Return which part of its budgets some packs use, by kind."""
    of = (np.asarray(tokens), np.asarray(images), np.ones_like(tokens))
    limits = (budgets.tokens, budgets.images, budgets.samples)
    return {
        kind: float(sum(cost[each].sum() for each in packs)) / max(1, limit * len(packs))
        for kind, cost, limit in zip(_KINDS, of, limits, strict=True)
    }


def _check(tokens: Ints, images: Ints, budgets: Budgets, names: Sequence[str] | None) -> None:
    for kind, cost, limit in (("tokens", tokens, budgets.tokens), ("images", images, budgets.images)):
        if cost.min(initial=0) < 0:
            raise ValueError(f"a sample has {cost.min()} {kind}")
        if cost.max(initial=0) > limit:
            over = np.flatnonzero(cost > limit)
            what = names[over[0]] if names is not None else f"sample {over[0]}"
            raise SampleTooLargeError(
                f"{what} has {cost[over[0]]} {kind}, more than the {limit} of a pack, and so have {len(over) - 1} "
                f"others; raise the budget of {kind}, or leave such samples out"
            )


def _least(cost: Ints, limit: int) -> int:
    """Return how many packs it takes if all of them are full."""
    return -(-int(cost.sum()) // max(1, limit))


def _sorted(numbers: Ints, hashes: Words) -> Ints:
    """Return the order of some numbers, equal ones by their hashes."""
    # A sort of words that hold number, hash and index takes a tenth of the time of a sort by number and by hash.
    number_bits, index_bits = int(numbers.max()).bit_length(), len(numbers).bit_length()
    if number_bits + index_bits > 64:
        raise ValueError(f"{len(numbers)} samples of such sizes are too many to pack at once; use smaller windows")
    index = np.uint64((1 << index_bits) - 1)
    words = numbers.astype(np.uint64) << np.uint64(64 - number_bits)
    words |= hashes >> np.uint64(number_bits)
    words &= ~index
    words |= np.arange(len(numbers), dtype=np.uint64)
    words.sort()
    words &= index
    return words.view(np.int64)


def _deal(sizes: Ints, num_packs: int) -> tuple[Ints, Ints]:
    """Return (pack of each size [N], load of each pack in any order [P]): in rounds of one a pack.

    The largest of a round goes to the emptiest pack.
    """
    # Each word is a pack's load and, in its last bits, the pack's number: words sort by load, and never tie.
    bits = num_packs.bit_length()
    words = np.arange(num_packs)
    steps = sizes << bits
    owner = np.empty_like(sizes)
    for first in range(0, len(sizes), num_packs):
        words.sort()
        part = steps[first : first + num_packs]
        owner[first : first + num_packs] = words[: len(part)]
        words[: len(part)] += part
    owner &= (1 << bits) - 1
    return owner, words >> bits
