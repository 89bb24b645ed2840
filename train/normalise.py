"""Normalisation of states and actions: the numbers of a lake to those of a model, then back.

Every scheme is one subtraction, then one multiplication, per dimension: y = (x - offset) * scale. Subtracting first
keeps the digits of a dimension that moves little around a large value.

The order is: actions relative to the raw state, then normalisation, then padding to the model's width; backwards for
what a policy returns.

Shapes: B samples, H actions of a chunk, A and S dimensions of an action and a state, D of a feature, K keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lake.sketch import RELATIVE_ERROR
from train.statistics import Actions, FeatureStats, Statistics

Scheme = Literal["mean_std", "min_max", "quantile", "none"]
"""pi-0.5 takes ``quantile``, GR00T ``min_max``."""

Floats = npt.NDArray[np.float32]

EPSILON = 1e-6
"""Added to a spread by ``mean_std`` and ``quantile``, as openpi does."""

NARROW = 1e-6
"""A dimension is constant where it spreads over less than this, or less than this share of its own magnitude, since
frames are stored with 24 bits and what remains is the noise of the last few."""

_BLURRED = 10 * RELATIVE_ERROR


class RepresentationMismatchError(ValueError):
    """The statistics are of another representation of actions than the one wanted."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Affine:
    """What normalises one feature."""

    scale: Floats
    """0 where the dimension is constant [D]"""
    offset: Floats
    """What becomes 0 [D]"""

    def apply(self, x: npt.ArrayLike) -> Floats:
        """Return (x - offset) * scale; a constant dimension gives 0 whatever it holds, elsewhere NaN stays NaN.

        Args:
            x: [..., D]

        Raises:
            ValueError: another number of dimensions.
        """
        given = self._checked(x)
        return np.multiply(given - self.offset, self.scale, out=np.zeros_like(given), where=self.scale != 0)

    def invert(self, y: npt.ArrayLike) -> Floats:
        """Return y / scale + offset; a constant dimension gives its constant whatever it holds.

        Args:
            y: [..., D]

        Raises:
            ValueError: another number of dimensions.
        """
        given = self._checked(y)
        moved = np.divide(given, self.scale, out=np.zeros_like(given), where=self.scale != 0)
        return np.add(moved, self.offset, out=moved)

    def _checked(self, values: npt.ArrayLike) -> Floats:
        given = np.asarray(values, np.float32)
        if given.shape[-1:] != self.scale.shape:
            raise ValueError(
                f"values of the shape {given.shape} are normalised by statistics of {len(self.scale)} dimensions; "
                "give the feature before it is padded"
            )
        return given


def affine_of(stats: FeatureStats, scheme: Scheme) -> Affine:
    """Return what normalises a feature with these statistics; nothing is clipped.

    mean_std: (x - mean) / (std + 1e-6)
    min_max:  (x - min) / (max - min) * 2 - 1
    quantile: (x - q01) / (q99 - q01 + 1e-6) * 2 - 1
    none:     x

    A constant dimension has scale 0, except under ``none``. Two kinds of dimensions are scaled by min_max even under
    ``quantile``: those that are constant between the quantiles only, as a gripper that closes in less than 1 % of the
    frames, which would go to millions; and those that spread over less than 4 % of their own magnitude, since the
    quantiles of a sketch have an error of 0.4 % of it.

    Source: openpi, transforms.py, for mean_std and quantile; Isaac-GR00T, data/transform/state_action.py, for min_max.

    Raises:
        ValueError: no such scheme, or statistics beyond float32.
    """
    _check_scheme(scheme)
    if scheme == "none":
        return Affine(scale=np.ones(stats.mean.shape, np.float32), offset=np.zeros(stats.mean.shape, np.float32))
    # What overflows is refused below.
    with np.errstate(over="ignore", under="ignore"):
        offset, spread = stats.min / 2 + stats.max / 2, stats.max / 2 - stats.min / 2
        constant = _is_narrow(2 * spread, stats.min, stats.max)
        if scheme == "mean_std":
            offset, spread = np.where(constant, offset, stats.mean), stats.std + EPSILON
            constant |= _is_narrow(stats.std, stats.mean)
        elif scheme == "quantile":
            span = stats.q99 - stats.q01
            wide = (span > NARROW) & (span > _BLURRED * np.maximum(np.abs(stats.q01), np.abs(stats.q99)))
            half = (span + EPSILON) / 2
            offset, spread = np.where(wide, stats.q01 + half, offset), np.where(wide, half, spread)
        scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, spread))
        affine = Affine(scale=scale.astype(np.float32), offset=offset.astype(np.float32))
    if not np.isfinite(affine.offset).all() or ((affine.scale == 0) & ~constant).any():
        raise ValueError(f"min {stats.min} and max {stats.max} are beyond what float32 can hold; rescale the feature")
    return affine


def relative(action_BHA: npt.NDArray[np.floating], state_BS: npt.NDArray[np.floating], dims: Sequence[int]) -> Floats:
    """Return actions of which some dimensions are differences from the state at the first frame of their chunk.

    Args:
        action_BHA: absolute [..., H, A]
        state_BS: raw, as the actions are [..., S]
        dims: of both.

    Raises:
        ValueError: the shapes do not fit together, or a dimension that one of them does not have.
    """
    return _shifted(action_BHA, state_BS, dims, -1)


def absolute(action_BHA: npt.NDArray[np.floating], state_BS: npt.NDArray[np.floating], dims: Sequence[int]) -> Floats:
    """Return the actions that ``relative`` made relative; arguments and errors as there."""
    return _shifted(action_BHA, state_BS, dims, 1)


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """What normalises the samples of a mixture, and the actions of a policy back."""

    statistics: Statistics
    state_scheme: Scheme
    action_scheme: Scheme
    actions: Actions = field(default_factory=Actions)
    """How the model's actions are written. The statistics have to be of the same, unless ``action_scheme`` is none."""

    def __post_init__(self) -> None:
        """Raise RepresentationMismatchError or ValueError where the parts do not belong together."""
        _check_scheme(self.state_scheme)
        _check_scheme(self.action_scheme)
        if self.action_scheme != "none" and self.actions != self.statistics.actions:
            raise RepresentationMismatchError(
                f"the model's actions are {self.actions}, and the statistics are of actions that are "
                f"{self.statistics.actions}, so they would be scaled wrongly; compute them with "
                f"{_remedy(self.actions)}, or change the model's actions"
            )

    def state(self, source: str, embodiment: str) -> Affine:
        """Return what normalises states; of no dimensions where the source has none.

        Raises:
            StatisticsMissingError: there are no statistics of it.
        """
        return self._affine((source, embodiment, "state"))

    def action(self, source: str, embodiment: str) -> Affine:
        """Return what normalises actions, after they were made relative.

        Raises:
            StatisticsMissingError: there are no statistics of it.
        """
        return self._affine((source, embodiment, "action"))

    def state_tables(self, keys: Sequence[tuple[str, str]], dim: int) -> tuple[Floats, Floats]:
        """Return (scale, offset) of the states of each source and embodiment [K, dim].

        With the number of each sample's key in ``key_B``, padded states of samples of any mixture are normalised by
        ``(state_BS - offset[key_B]) * scale[key_B]``. Where a state is padded both are 0, so zeros stay zeros.

        Raises:
            StatisticsMissingError: there are no statistics of one.
            ValueError: one has more than ``dim`` dimensions.
        """
        return self._tables([(*key, "state") for key in keys], dim)

    def action_tables(self, keys: Sequence[tuple[str, str]], dim: int) -> tuple[Floats, Floats]:
        """Return (scale, offset) of actions, as ``state_tables`` does of states [K, dim]."""
        return self._tables([(*key, "action") for key in keys], dim)

    def relative_table(self, embodiments: Sequence[str], dim: int) -> Floats:
        """Return 1 where an embodiment's actions are relative, else 0 [K, dim].

        With it actions of any mixture are made relative by ``action_BHA - (table[key_B] * state_BA)[:, None]``, where
        the states are raw, and padded or cut to the width of the actions.

        Raises:
            ValueError: a relative dimension is beyond ``dim``.
        """
        table = np.zeros((len(embodiments), dim), np.float32)
        for row, embodiment in enumerate(embodiments):
            dims = self.actions.dims(embodiment)
            if dims and dims[-1] >= dim:
                raise ValueError(f"dimension {dims[-1]} of {embodiment!r} is relative, beyond the model's {dim}")
            table[row, list(dims)] = 1
        return table

    def _tables(self, keys: Sequence[tuple[str, str, str]], dim: int) -> tuple[Floats, Floats]:
        scale, offset = np.zeros((2, len(keys), dim), np.float32)
        for row, key in enumerate(keys):
            affine = self._affine(key)
            width = len(affine.scale)
            if width > dim:
                raise ValueError(f"{'/'.join(key)} has {width} dimensions, which the model's {dim} cannot hold")
            scale[row, :width], offset[row, :width] = affine.scale, affine.offset
        return scale, offset

    def _affine(self, key: tuple[str, str, str]) -> Affine:
        if key not in self._cache:
            self._cache[key] = self._made(key)
        return self._cache[key]

    def _made(self, key: tuple[str, str, str]) -> Affine:
        source, embodiment, feature = key
        there = self.statistics.features
        # Every frame has an action, so a source with statistics of that alone has no states.
        if feature == "state" and key not in there and (source, embodiment, "action") in there:
            return Affine(scale=np.zeros(0, np.float32), offset=np.zeros(0, np.float32))
        scheme = self.state_scheme if feature == "state" else self.action_scheme
        return affine_of(self.statistics.get(*key), scheme)

    @cached_property
    def _cache(self) -> dict[tuple[str, str, str], Affine]:
        return {}


def _is_narrow(spread: npt.NDArray[np.float64], *around: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    magnitude = np.max([np.abs(each) for each in around], axis=0)
    return spread <= NARROW * np.maximum(1.0, magnitude)


def _shifted(
    action_BHA: npt.NDArray[np.floating], state_BS: npt.NDArray[np.floating], dims: Sequence[int], sign: int
) -> Floats:
    actions, states = np.array(action_BHA, np.float32), np.asarray(state_BS, np.float32)
    if actions.ndim < 2 or actions.shape[:-2] != states.shape[:-1]:
        raise ValueError(
            f"actions of the shape {actions.shape} and states of {states.shape} do not belong together; they are "
            "[..., H, A] and [..., S], with one state a chunk"
        )
    size = min(actions.shape[-1], states.shape[-1])
    if any(not 0 <= dim < size for dim in dims) or len(set(dims)) < len(dims):
        raise ValueError(
            f"dims={list(dims)}: each is once there, at least 0 and less than {size}, which state and action both have"
        )
    at = list(dims)
    actions[..., at] += sign * states[..., None, at]
    return actions


def _check_scheme(scheme: str) -> None:
    if scheme not in get_args(Scheme):
        raise ValueError(f"no scheme {scheme!r} of normalisation; there are {', '.join(get_args(Scheme))}")


def _remedy(actions: Actions) -> str:
    if not actions.relative_dims:
        return "Statistics.of_release(release)"
    dims = dict(actions.relative_dims)
    return f"Statistics.of_relative_actions(release, relative_dims={dims}, horizon={actions.horizon})"
