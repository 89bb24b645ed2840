"""Statistics of states and actions over the training episodes of a release, which normalisation scales by.

Statistics of absolute actions fold what every episode stored once. Those of relative actions depend on the dimensions
and on the length of a chunk, so they take one pass over the columns of state and action.

Shapes: T frames of an episode, S and A dimensions of its state and action, D of a feature, N rows.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lake import Release
from lake.errors import LakeDamagedError, StoreError
from lake.sketch import Sketch, merge, sketch

VERSION = 1
"""Of the JSON."""
FEATURES = ("state", "action")
Key = tuple[str, str, str]
"""Source, embodiment, feature."""

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]

_SCAN_ROWS = 4096
_BLOCK_VALUES = 1 << 18
"""Values that are sketched at once: enough that merging costs little, few enough to be sorted in the cache."""


class StatisticsMissingError(ValueError):
    """There are no statistics of this source, embodiment and feature."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FeatureStats:
    """Statistics of one feature; all but the count are of float64 [D]."""

    count: int
    """Rows that were counted: frames, or for relative actions every action of the chunk of every frame."""
    mean: Floats
    std: Floats
    """Of the population."""
    min: Floats
    max: Floats
    q01: Floats
    """The error is up to ``lake.sketch.RELATIVE_ERROR`` of its magnitude, however little the dimension moves."""
    q99: Floats

    def __post_init__(self) -> None:
        """Raise ValueError where the numbers cannot be statistics."""
        vectors = {name: getattr(self, name) for name in _VECTORS}
        shapes = {name: vector.shape for name, vector in vectors.items()}
        if len(set(shapes.values())) > 1 or self.mean.ndim != 1:
            raise ValueError(f"statistics are vectors of one length, not of the shapes {shapes}")
        for name, vector in vectors.items():
            if not np.isfinite(vector).all():
                raise ValueError(f"{name} is not finite: {vector}")
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"count={self.count!r} is no number of rows; it is a whole number, at least 1")
        ladder = np.stack([self.min, self.q01, self.q99, self.max])
        if (ladder[1:] < ladder[:-1]).any() or (self.std < 0).any():
            raise ValueError(f"min, q01, q99, max do not ascend, or std is below 0: {ladder.tolist()}, {self.std}")


_VECTORS = tuple(each.name for each in fields(FeatureStats) if each.name != "count")


@dataclass(frozen=True, kw_only=True, slots=True)
class Actions:
    """How the actions of a chunk are written: some dimensions may be relative to the state at its first frame."""

    relative_dims: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]], hash=False)
    """By embodiment: these dimensions of an action are differences from the same dimensions of the state. The other
    dimensions, and the embodiments that are not named, have absolute actions."""
    horizon: int | None = None
    """Actions of a chunk where any are relative, since differences grow along it; None where all are absolute."""

    def __post_init__(self) -> None:
        """Raise ValueError where this describes no representation."""
        dims_of: dict[str, tuple[int, ...]] = {}
        for embodiment, dims in sorted(self.relative_dims.items()):
            if any(type(dim) is not int or dim < 0 for dim in dims) or len(set(dims)) < len(dims):
                raise ValueError(
                    f"relative_dims of {embodiment!r} is {list(dims)}; list each dimension once, counted from 0"
                )
            if len(dims):
                dims_of[embodiment] = tuple(sorted(dims))
        if dims_of and (type(self.horizon) is not int or self.horizon < 1):
            raise ValueError(f"horizon={self.horizon!r}; relative actions need the chunk's length, 1 or more")
        if not dims_of and self.horizon is not None:
            raise ValueError(f"horizon={self.horizon!r} says nothing of absolute actions; leave it out")
        # Whatever sequences were given, equal representations compare equal.
        object.__setattr__(self, "relative_dims", dims_of)

    def dims(self, embodiment: str) -> tuple[int, ...]:
        """Return the relative dimensions of an embodiment, ascending."""
        return tuple(self.relative_dims.get(embodiment, ()))

    def __str__(self) -> str:
        if not self.relative_dims:
            return "absolute"
        dims = ", ".join(f"{embodiment} {list(dims)}" for embodiment, dims in self.relative_dims.items())
        return f"relative in {dims} over {self.horizon} actions"


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Statistics of the training split of a release, by source, embodiment and feature."""

    features: dict[Key, FeatureStats]
    """The feature is ``state`` or ``action``; where the frames of a source have no state, there is none of it."""
    actions: Actions
    release_id: str

    @classmethod
    def of_release(cls, release: Release) -> "Statistics":
        """Return the statistics of states and absolute actions, from what is stored of each episode.

        They are folded once for a release and kept beside its tables, so that a thousand ranks need not fold them
        again; where the lake cannot be written to, every call folds.

        Raises:
            ValueError: episodes of one source and embodiment have features of different sizes.
        """
        path = f"_statistics/{release.id}-{VERSION}.json"
        kept = release.storage.read(path)
        if kept is not None:
            with suppress(ValueError):  # Damaged, so it is as good as none.
                return cls.from_json(kept.decode())
        made = cls._folded(release)
        if kept is None:
            with suppress(StoreError):
                release.storage.put_if_absent(path, made.to_json().encode())
        return made

    @classmethod
    def _folded(cls, release: Release) -> "Statistics":
        found = release.sketches().items()
        features = {key: _of_sketch(one) for key, one in sorted(found, key=lambda item: item[0]) if key[2] in FEATURES}
        return cls(features=features, actions=Actions(), release_id=release.id)

    @classmethod
    def of_relative_actions(
        cls,
        release: Release,
        *,
        relative_dims: Mapping[str, Sequence[int]],
        horizon: int,
        where: str | None = None,
        batch_rows: int = _SCAN_ROWS,
    ) -> "Statistics":
        """Return the statistics of states and of actions that are relative, from one pass over both columns.

        Where an embodiment has relative dimensions, the chunk of every frame is counted with all its actions that lie
        within the episode, absolute dimensions likewise. Elsewhere every frame is counted once, as in ``of_release``.
        Memory is that of the longest episode's states and actions, of the index and of the sketches.

        Args:
            relative_dims: as in ``Actions``.
            horizon: actions of a chunk, the first of which is that of the chunk's first frame.
            where: SQL condition on the columns of ``episodes``, beside that of the training split.

        Raises:
            ValueError: an embodiment without training episodes, a dimension that its state or action does not have,
                episodes of one source and embodiment that have features of different sizes, or a bad condition.
            LakeDamagedError: frames of an episode are gone.
        """
        actions = Actions(relative_dims=relative_dims, horizon=horizon)
        wanted = _wanted(release, where)
        _check_dims(actions, {group for group, _ in wanted.values()})
        folds: dict[Key, _Fold] = {}
        for group, state_TS, action_TA in _episodes(release, wanted, batch_rows):
            source, embodiment = group.source, group.embodiment
            if state_TS.shape[1]:
                folds.setdefault((source, embodiment, "state"), _Fold()).add(state_TS)
            fold = folds.setdefault((source, embodiment, "action"), _Fold())
            dims = actions.dims(embodiment)
            for rows_NA in _chunk_rows(state_TS, action_TA, dims, horizon) if dims else [action_TA]:
                fold.add(rows_NA)
        features = {key: _of_sketch(folds[key].sketch()) for key in sorted(folds)}
        return cls(features=features, actions=actions, release_id=release.id)

    def get(self, source: str, embodiment: str, feature: str) -> FeatureStats:
        """Return the statistics of one feature.

        Raises:
            StatisticsMissingError: there are none.
        """
        found = self.features.get((source, embodiment, feature))
        if found is None:
            there = ", ".join(f"{'/'.join(key)}" for key in sorted(self.features)) or "none at all"
            raise StatisticsMissingError(
                f"no statistics of {source}/{embodiment}/{feature} (source/embodiment/feature) in release "
                f"{self.release_id}; there are {there}. They are of the training split alone: leave this source out, "
                "give some of its episodes the split train, or compute the statistics from a release that holds it"
            )
        return found

    def to_json(self) -> str:
        """Return all of it as JSON, from which ``from_json`` makes exactly the same."""
        rows = [
            {"source": source, "embodiment": embodiment, "feature": feature, "count": stats.count}
            | {name: getattr(stats, name).tolist() for name in _VECTORS}
            for (source, embodiment, feature), stats in sorted(self.features.items())
        ]
        actions = {
            "relative_dims": {name: list(dims) for name, dims in self.actions.relative_dims.items()},
            "horizon": self.actions.horizon,
        }
        stored = {"version": VERSION, "release_id": self.release_id, "actions": actions, "features": rows}
        return json.dumps(stored, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Statistics":
        """Return the statistics that ``to_json`` wrote.

        Raises:
            ValueError: it is not what ``to_json`` wrote; says what is missing or wrong.
        """
        try:
            stored = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"statistics are stored as JSON, which this is not: {error}") from error
        if isinstance(stored, dict) and stored.get("version", VERSION) != VERSION:
            raise ValueError(
                f"these statistics have version {stored['version']!r}, and this robolake reads {VERSION}; compute them "
                "again from the release, or use the robolake that wrote them"
            )
        _check("the statistics", stored, {"version": int, "release_id": str, "actions": dict, "features": list})
        _check("actions", stored["actions"], {"relative_dims": dict, "horizon": int | None})
        dims_of = stored["actions"]["relative_dims"]
        _check("relative_dims", dims_of, dict.fromkeys(dims_of, list))
        features: dict[Key, FeatureStats] = {}
        for number, row in enumerate(stored["features"]):
            key, stats = _of_row(f"entry {number} of features", row)
            if key in features:
                raise ValueError(f"entry {number} of features is of {'/'.join(key)}, as one before it is")
            features[key] = stats
        return cls(features=features, actions=Actions(**stored["actions"]), release_id=stored["release_id"])


@dataclass(frozen=True, slots=True)
class _Group:
    """What episodes that are counted together have in common."""

    source: str
    embodiment: str
    state_dim: int
    action_dim: int


class _Fold:
    """The sketch of rows that come by and by."""

    def __init__(self) -> None:
        self._pending: list[Rows] = []
        self._num_values = 0
        self._sketch: Sketch | None = None

    def add(self, rows_ND: Rows) -> None:
        if len(rows_ND):
            self._pending.append(rows_ND)
            self._num_values += max(rows_ND.size, len(rows_ND))
        if self._num_values >= _BLOCK_VALUES:
            self.sketch()

    def sketch(self) -> Sketch:
        if self._pending:
            part = sketch(np.concatenate(self._pending))
            self._sketch = part if self._sketch is None else merge([self._sketch, part])
            self._pending, self._num_values = [], 0
        assert self._sketch is not None, "a fold is made for an episode that has frames"
        return self._sketch


def _wanted(release: Release, where: str | None) -> dict[str, tuple[_Group, int]]:
    """Return the group and number of frames of each training episode, by its uid."""
    condition = "split = 'train'" if where is None else f"({where}) AND split = 'train'"
    columns = ["episode_uid", "num_frames", "source", "embodiment", "state_dim", "action_dim"]
    groups: dict[tuple[str, str], _Group] = {}
    wanted: dict[str, tuple[_Group, int]] = {}
    for batch in release.episodes(condition, columns).to_batches():
        for uid, num_frames, *rest in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            group = _Group(*rest)
            first = groups.setdefault((group.source, group.embodiment), group)
            if first != group:
                raise ValueError(f"{first} and {group} cannot be counted together; select one of them by `where`")
            wanted[uid] = (first, num_frames)
    return wanted


def _check_dims(actions: Actions, groups: set[_Group]) -> None:
    there = sorted({group.embodiment for group in groups})
    unknown = sorted(set(actions.relative_dims) - set(there))
    if unknown or not actions.relative_dims:
        raise ValueError(
            f"relative_dims names {', '.join(map(repr, unknown)) or 'no dimension of any embodiment'}; the embodiments "
            f"of the training episodes are {', '.join(map(repr, there)) or 'none'}. Statistics of absolute actions "
            "come from Statistics.of_release(release)"
        )
    for group in groups:
        beyond = [dim for dim in actions.dims(group.embodiment) if dim >= min(group.state_dim, group.action_dim)]
        if beyond:
            raise ValueError(f"relative_dims has {beyond}, which the state or the action of {group} does not have")


def _episodes(
    release: Release, wanted: dict[str, tuple[_Group, int]], batch_rows: int
) -> Iterator[tuple[_Group, Rows, Rows]]:
    """Yield (group, state [T, S], action [T, A]) of every episode with frames, and take it out of ``wanted``."""
    parts: dict[str, list[tuple[Rows, Rows]]] = {}
    for batch in release.scan(columns=["episode_uid", "state", "action"], batch_rows=batch_rows):
        uids = batch.column("episode_uid").dictionary_encode()
        places = uids.indices.to_numpy()
        starts = np.flatnonzero(np.diff(places, prepend=-1)).tolist()
        for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
            uid = uids.dictionary[int(places[start])].as_py()
            if uid not in wanted:
                continue
            group, num_frames = wanted[uid]
            state_TS = _matrix(batch.column("state").slice(start, end - start), group.state_dim, uid)
            action_TA = _matrix(batch.column("action").slice(start, end - start), group.action_dim, uid)
            parts.setdefault(uid, []).append((state_TS, action_TA))
            if sum(len(action) for _, action in parts[uid]) == num_frames:
                states, actions = zip(*parts.pop(uid), strict=True)
                del wanted[uid]
                yield group, np.concatenate(states), np.concatenate(actions)
    gone = sorted(uid for uid, (_, num_frames) in wanted.items() if num_frames)
    if gone:
        raise LakeDamagedError(f"release {release.name}: frames of {len(gone)} episodes are gone, first of {gone[0]}")


def _matrix(column: pa.ListArray, dim: int, uid: str) -> Rows:
    values = column.flatten().to_numpy(zero_copy_only=False)
    if len(values) != len(column) * dim:
        raise LakeDamagedError(
            f"episode {uid} has {len(values)} values in {len(column)} frames where {dim} dimensions are declared"
        )
    return values.reshape(len(column), dim).astype(np.float32)


def _chunk_rows(state_TS: Rows, action_TA: Rows, dims: tuple[int, ...], horizon: int) -> Iterator[Rows]:
    """Yield every action of the chunk of every frame, a row each, some chunks at a time [N, A]."""
    num_frames, at_once = len(action_TA), max(1, _BLOCK_VALUES // (horizon * action_TA.shape[1]))
    for first in range(0, num_frames, at_once):
        base_T = np.arange(first, min(first + at_once, num_frames))
        length_T = np.minimum(horizon, num_frames - base_T)
        base_N = np.repeat(base_T, length_T)
        ahead_N = np.arange(len(base_N)) - np.repeat(np.cumsum(length_T) - length_T, length_T)
        rows_NA = action_TA[base_N + ahead_N]
        rows_NA[:, dims] -= state_TS[base_N][:, dims]
        yield rows_NA


def _of_sketch(one: Sketch) -> FeatureStats:
    return FeatureStats(
        count=one.count,
        mean=one.mean,
        std=one.std(),
        min=one.min,
        max=one.max,
        q01=one.quantile(0.01),
        q99=one.quantile(0.99),
    )


def _of_row(what: str, row: Any) -> tuple[Key, FeatureStats]:
    names = {"source": str, "embodiment": str, "feature": str, "count": int}
    _check(what, row, names | dict.fromkeys(_VECTORS, list))
    if row["feature"] not in FEATURES:
        raise ValueError(f"{what} is of the feature {row['feature']!r}; it is one of {', '.join(FEATURES)}")
    wrong = [name for name in _VECTORS if any(type(value) not in (int, float) for value in row[name])]
    if wrong:
        raise ValueError(f"{what}: {', '.join(wrong)} are lists of numbers, not {row[wrong[0]]}")
    try:
        stats = FeatureStats(count=row["count"], **{name: np.array(row[name], np.float64) for name in _VECTORS})
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{what}: {error}") from error
    return (row["source"], row["embodiment"], row["feature"]), stats


def _check(what: str, found: Any, types: Mapping[str, Any]) -> None:
    there = found if isinstance(found, dict) else {}
    missing, unknown = sorted(types.keys() - there.keys()), sorted(there.keys() - types.keys())
    if missing or unknown or there is not found:
        raise ValueError(f"{what}: {missing} are missing, {unknown} are unknown; to_json writes {sorted(types)}")
    # JSON's true is an int to Python.
    wrong = [name for name, kind in types.items() if isinstance(found[name], bool) or not isinstance(found[name], kind)]
    if wrong:
        raise ValueError(f"{what}: {wrong[0]} is {found[wrong[0]]!r}, which to_json does not write")
