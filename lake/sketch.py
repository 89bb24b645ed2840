"""Mergeable statistics of one feature: moments, extremes, quantiles.

The sketches of episodes fold into the sketch of all of them, so what each episode stored once serves every release.
The quantiles come from a histogram whose buckets are fixed beforehand: merging adds integer counts, which is exact
in any order and for any split. Averaging the quantiles of episodes is wrong however it is weighted.

Shapes: T frames, D dimensions, B buckets of all dimensions together, S sketches.

Source: Masson, Rim, Lee, "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees", VLDB
2019. Here a bucket is not the rounded logarithm of a value but the leading bits of the value itself (sign, exponent,
seven bits of the mantissa), so it is integer arithmetic and the same on every machine.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

RELATIVE_ERROR = 2.0**-8
"""Bound on a quantile's error, relative to the exact value (0.4 %)."""

ABSOLUTE_FLOOR = 2.0**-1030
"""Bound on a quantile's error where the value is denormal and has no seven bits of mantissa."""

LARGEST = 1e100
"""Largest magnitude that is taken, so that no square overflows."""

_DROPPED_BITS = 52 - 7
_SIGN_BIT = np.int64(-(2**63))
_KEY_BITS = 20  # Keys are less than 2**18 in magnitude.
_MERGE_BATCH = 64


@dataclass(frozen=True, eq=False)
class Sketch:
    """Statistics of the frames of one feature, at least one frame, every dimension for itself."""

    count: int
    """Number of frames."""
    mean: Floats
    """[D]"""
    m2: Floats
    """[D] sum of the squared distances from the mean; distances below 1e-154 have no square."""
    min: Floats
    """[D]"""
    max: Floats
    """[D]"""
    bucket_offsets: NDArray[np.int32]
    """[D + 1] dimension d has the buckets from bucket_offsets[d] up to bucket_offsets[d + 1]."""
    bucket_keys: NDArray[np.int32]
    """[B] which bucket, ascending within a dimension, in the order of the values; 0 holds zeros."""
    bucket_counts: NDArray[np.int64]
    """[B] how many values are in it, never 0."""

    def std(self) -> Floats:
        """Return the population's standard deviation, as LeRobot does.

        Returns:
            [D]
        """
        return np.sqrt(self.m2 / self.count)

    def quantile(self, q: float) -> Floats:
        """Return the smallest value that at least the share q of the frames does not exceed.

        It is within RELATIVE_ERROR of the exact one (for denormals, within ABSOLUTE_FLOOR), never outside of the
        extremes, and exact where it is one of them.

        Returns:
            [D]

        Raises:
            ValueError: q is not in [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is asked for by a share between 0 and 1, not {q}")
        rank = max(math.ceil(q * self.count) - 1, 0)
        if rank == 0:
            return self.min.copy()
        if rank >= self.count - 1:
            return self.max.copy()
        # The counts of every dimension sum to the number of frames, so one running sum serves all dimensions.
        below = np.cumsum(self.bucket_counts)
        wanted = np.searchsorted(below, rank + self.count * np.arange(len(self.mean)), side="right")
        return np.clip(_middles(self.bucket_keys[wanted]), self.min, self.max)

    def to_columns(self) -> dict[str, Any]:
        """Return what an Arrow row holds: the count, then lists of float64, int32 or int64 by the names above."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> "Sketch":
        """Return the sketch that ``to_columns`` took apart; other columns of the row are ignored.

        Raises:
            ValueError: the columns do not make a sketch.
        """
        sketch = cls(
            count=int(columns["count"]),
            mean=np.asarray(columns["mean"], np.float64),
            m2=np.asarray(columns["m2"], np.float64),
            min=np.asarray(columns["min"], np.float64),
            max=np.asarray(columns["max"], np.float64),
            bucket_offsets=np.asarray(columns["bucket_offsets"], np.int32),
            bucket_keys=np.asarray(columns["bucket_keys"], np.int32),
            bucket_counts=np.asarray(columns["bucket_counts"], np.int64),
        )
        if not _is_sound(sketch):
            raise ValueError(f"these columns are no sketch: {sketch}")
        return sketch


def sketch(values_TD: ArrayLike) -> Sketch:
    """Return the statistics of a feature over frames.

    Args:
        values_TD: [T, D] numbers.

    Raises:
        ValueError: not numbers, not of two dimensions, no frame, or a value that is not finite or beyond LARGEST.
    """
    given_TD = np.asarray(values_TD)
    if given_TD.dtype.kind not in "fiub" or given_TD.ndim != 2 or len(given_TD) == 0:
        raise ValueError(
            f"a sketch is of numbers of shape [T, D] with at least one frame, not {given_TD.dtype} {given_TD.shape}"
        )
    x_DT = np.ascontiguousarray(given_TD.T, np.float64)
    good_DT = np.abs(x_DT) <= LARGEST
    if not good_DT.all():
        dim, frame = np.argwhere(~good_DT)[0]
        raise ValueError(
            f"value {x_DT[dim, frame]} of dimension {dim} at frame {frame} is not finite or beyond {LARGEST:g}"
        )
    num_dims, num_frames = len(x_DT), len(given_TD)
    # Distances from the first frame: a constant feature gets exactly its value as mean, then zero as M2.
    base_D = x_DT[:, 0]
    y_DT = x_DT - base_D[:, None]
    mean_D = y_DT.mean(axis=1)
    y_DT -= mean_D[:, None]

    keys_DT = np.sort(_keys(x_DT), axis=1)
    is_start_DT = np.ones_like(keys_DT, bool)
    np.not_equal(keys_DT[:, 1:], keys_DT[:, :-1], out=is_start_DT[:, 1:])
    starts_B = np.flatnonzero(is_start_DT)
    return Sketch(
        count=num_frames,
        mean=base_D + mean_D,
        m2=np.square(y_DT).sum(axis=1),
        min=x_DT.min(axis=1),
        max=x_DT.max(axis=1),
        bucket_offsets=np.searchsorted(starts_B, num_frames * np.arange(num_dims + 1)).astype(np.int32),
        bucket_keys=keys_DT.ravel()[starts_B],
        bucket_counts=np.diff(starts_B, append=keys_DT.size).astype(np.int64),
    )


def merge(sketches: Iterable[Sketch]) -> Sketch:
    """Return the sketch of all frames together; the sketches are consumed one batch at a time.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979,
    for the moments.

    Raises:
        ValueError: no sketch at all, or sketches of different numbers of dimensions.
    """
    rest = iter(sketches)
    merged = next(rest, None)
    if merged is None:
        raise ValueError("nothing to merge: a sketch has at least one frame")
    while batch := list(islice(rest, _MERGE_BATCH)):
        merged = _merge_batch([merged, *batch])
    return merged


def _merge_batch(parts: list[Sketch]) -> Sketch:
    num_dims = {len(part.mean) for part in parts}
    if len(num_dims) > 1:
        raise ValueError(f"sketches of different numbers of dimensions cannot be merged: {sorted(num_dims)}")
    counts_S1 = np.array([[part.count] for part in parts], np.int64)
    count = int(counts_S1.sum())
    means_SD = np.stack([part.mean for part in parts])
    mean_D = means_SD[0] + (counts_S1 / count * (means_SD - means_SD[0])).sum(axis=0)
    between_D = (counts_S1 * np.square(means_SD - mean_D)).sum(axis=0)

    codes, places = np.unique(np.concatenate([_codes(part) for part in parts]), return_inverse=True)
    bucket_counts_B = np.zeros(len(codes), np.int64)
    np.add.at(bucket_counts_B, places, np.concatenate([part.bucket_counts for part in parts]))
    return Sketch(
        count=count,
        mean=mean_D,
        m2=np.stack([part.m2 for part in parts]).sum(axis=0) + between_D,
        min=np.stack([part.min for part in parts]).min(axis=0),
        max=np.stack([part.max for part in parts]).max(axis=0),
        bucket_offsets=np.searchsorted(codes >> _KEY_BITS, np.arange(len(mean_D) + 1)).astype(np.int32),
        bucket_keys=((codes & (2**_KEY_BITS - 1)) - 2 ** (_KEY_BITS - 1)).astype(np.int32),
        bucket_counts=bucket_counts_B,
    )


def _keys(x: Floats) -> NDArray[np.int32]:
    """Return the bucket of each value: the integer of its leading bits, signed like it and in its order."""
    bits = x.view(np.int64)
    magnitudes = bits & ~_SIGN_BIT
    keys = ((magnitudes >> _DROPPED_BITS) + (magnitudes != 0)).astype(np.int32)
    return np.negative(keys, out=keys, where=bits < 0)


def _middles(keys: NDArray[np.int32]) -> Floats:
    """Return the middle of each bucket: its leading bits, then a one, then zeros."""
    magnitudes = (np.abs(keys).astype(np.int64) - 1 << _DROPPED_BITS) + (1 << _DROPPED_BITS - 1)
    middles: Floats = np.copysign(magnitudes.view(np.float64), keys)
    middles[keys == 0] = 0.0
    return middles


def _codes(one: Sketch) -> NDArray[np.int64]:
    """Return one number for the dimension and key of each bucket, in their order."""
    dims_B = np.repeat(np.arange(len(one.mean), dtype=np.int64), np.diff(one.bucket_offsets))
    return (dims_B << _KEY_BITS) + one.bucket_keys + 2 ** (_KEY_BITS - 1)


def _is_sound(one: Sketch) -> bool:
    """Return whether the parts of a sketch agree with each other."""
    moments = (one.mean, one.m2, one.min, one.max)
    num_dims, num_buckets = len(one.mean), len(one.bucket_keys)
    offsets = one.bucket_offsets
    if one.count < 1 or any(part.shape != (num_dims,) or not np.isfinite(part).all() for part in moments):
        return False
    if (
        offsets.shape != (num_dims + 1,)
        or offsets[0] != 0
        or offsets[-1] != num_buckets
        or (np.diff(offsets) < 0).any()
    ):
        return False
    if one.bucket_counts.shape != (num_buckets,) or (one.bucket_counts < 1).any():
        return False
    if np.abs(one.bucket_keys).max(initial=0) >= 2 ** (_KEY_BITS - 2) or (np.diff(_codes(one)) <= 0).any():
        return False
    below = np.concatenate([[0], np.cumsum(one.bucket_counts)])
    return bool((below[offsets] == one.count * np.arange(num_dims + 1)).all())
