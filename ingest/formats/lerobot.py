"""What LeRobot v2.x and v3.0 have in common: info.json, path templates, parquet columns."""

import json
import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ingest.features import Features, choose_features, declared_dim, dimension_names
from ingest.files import SourceFiles
from ingest.source import Episode, Source, ViewSource
from lake.errors import EpisodeError, SourceMetadataError, SourceVersionError

SUPPORTED = ("v2.0", "v2.1", "v3.0")
MAX_EPISODE_ROWS = 50_000_000

_SPEC = re.compile(r"(0?[1-9])?d?")


def version_of(files: SourceFiles) -> str | None:
    """Return the version of a LeRobot dataset, or None where it is none.

    Raises:
        SourceVersionError: LeRobot, in a version that is not supported.
    """
    if not files.exists("meta/info.json"):
        if files.exists("meta") or files.exists("data"):
            raise SourceMetadataError(f"{files.uri}: meta/info.json is missing")
        return None
    version = str(read_info(files).get("codebase_version", ""))
    version = version if version.startswith("v") else f"v{version}"
    if version not in SUPPORTED:
        raise SourceVersionError(
            f"{files.uri}: LeRobot {version} is not supported; {', '.join(SUPPORTED)} are. "
            "Convert it with LeRobot's own converter."
        )
    return version


def read_info(files: SourceFiles) -> dict[str, Any]:
    """Return info.json.

    Raises:
        SourceMetadataError: it is missing, empty, or not a JSON object.
    """
    return parse_json(files, "meta/info.json", files.read_meta("meta/info.json"))


def parse_json(files: SourceFiles, name: str, data: bytes) -> dict[str, Any]:
    """Return a JSON object of a metadata file.

    Raises:
        SourceMetadataError: it is no JSON object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceMetadataError(f"{files.uri}: {name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceMetadataError(f"{files.uri}: {name} holds a {type(value).__name__}, expected an object")
    return value


def open_lerobot(files: SourceFiles, feature_map: Mapping[str, str], name: str, meta: Mapping[str, Any]) -> Source:
    """Return the source that info.json describes.

    Args:
        name: of the format.
        meta: what the version adds to the source's ``meta``.

    Raises:
        SourceMetadataError: features or fps are missing or make no sense.
    """
    info = read_info(files)
    fps = info.get("fps")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < 100_000:
        raise SourceMetadataError(f"{files.uri}: meta/info.json has fps={fps!r}, expected a positive number")
    features = info.get("features")
    if not isinstance(features, dict) or not all(isinstance(spec, dict) for spec in features.values()):
        raise SourceMetadataError(f"{files.uri}: meta/info.json has no `features`")
    chosen = choose_features(features, feature_map, files.uri)
    robot = info.get("robot_type")
    splits, chunks_size = info.get("splits") or {}, info.get("chunks_size") or 1000
    if not isinstance(splits, dict) or not isinstance(chunks_size, int):
        message = f"splits={splits!r} and chunks_size={chunks_size!r}, expected an object and a whole number"
        raise SourceMetadataError(f"{files.uri}: meta/info.json has {message}")
    return Source(
        files=files,
        format=name,
        fps=float(fps),
        embodiment=str(robot) if robot else "unknown",
        meta={
            "features": {key: spec for key, spec in features.items() if key in (*chosen.state, *chosen.action)},
            "columns": sorted(features),
            "chosen": chosen,
            "data_path": _template(files, info, "data_path"),
            "video_path": _template(files, info, "video_path") if chosen.views else "",
            "splits": splits,
            "chunks_size": chunks_size,
            **meta,
        },
        num_episodes=info.get("total_episodes") if isinstance(info.get("total_episodes"), int) else None,
    )


def fill(template: str, **values: int | str) -> str:
    """Fill a path template; the names of one version are understood in another."""
    aliases = {"episode_chunk": "chunk_index", "episode_index": "file_index"}
    both = dict(values)
    for old, new in aliases.items():
        both.setdefault(old, values.get(new, 0))
        both.setdefault(new, both[old])
    return template.format(**both)


def read_rows(source: Source, relative: str, episode_index: int, *, many: bool) -> pa.Table:
    """Return an episode's rows of a parquet file, in the order of the file.

    Args:
        many: the file holds several episodes; row groups without this one are not read.

    Raises:
        EpisodeError: the file is missing, empty or damaged, or lacks a column.
    """
    source.files.check_episode_file(relative, "data")
    chosen: Features = source.meta["chosen"]
    needed = [*chosen.state, *chosen.action]
    try:
        with source.files.open(relative) as file:
            parquet = pq.ParquetFile(file)
            there = parquet.schema_arrow.names
            missing = [name for name in needed if name not in there]
            if missing:
                raise EpisodeError(
                    "column-missing", f"{relative} lacks {', '.join(missing)}; it has {', '.join(there)}"
                )
            optional = ["timestamp", "frame_index", "task_index", "next.success"]
            columns = needed + [name for name in optional if name in there and name not in needed]
            twice = [name for name in columns if there.count(name) > 1]
            if twice:
                raise EpisodeError("data-unreadable", f"{relative} has several columns named {', '.join(twice)}")
            if many and "episode_index" not in there:
                raise EpisodeError("column-missing", f"{relative} lacks episode_index")
            if many and not _is_number(parquet.schema_arrow.field("episode_index").type):
                raise EpisodeError("wrong-shape", f"{relative}: episode_index holds no plain numbers")
            groups = _groups(parquet, episode_index) if many else list(range(parquet.num_row_groups))
            if sum(parquet.metadata.row_group(g).num_rows for g in groups) > MAX_EPISODE_ROWS:
                raise EpisodeError("data-unreadable", f"{relative} claims more than {MAX_EPISODE_ROWS} rows")
            table = parquet.read_row_groups(groups, columns=[*columns, "episode_index"] if many else columns)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise EpisodeError("data-unreadable", f"{relative}: {_brief(error)}") from error
    except OSError as error:
        # Arrow reports a damaged page or Thrift header as a bare OSError.
        if error.errno is not None:
            raise
        raise EpisodeError("data-unreadable", f"{relative}: {_brief(error)}") from error
    return table.filter(pa.array(table.column("episode_index").to_numpy() == episode_index)) if many else table


def assemble(
    source: Source, rows: pa.Table, *, index: int, declared: int, tasks: Sequence[str], views: tuple[ViewSource, ...]
) -> Episode:
    """Turn parquet rows into an episode.

    Args:
        index: of the episode, which decides its split.
        declared: number of frames by the metadata.
        tasks: the episode's tasks by its metadata record.

    Raises:
        EpisodeError: a column has the wrong shape.
    """
    chosen: Features = source.meta["chosen"]
    features = source.meta["features"]
    used, task_index = _tasks(source, rows, tasks)
    return Episode(
        state=_joined(rows, chosen.state, features),
        action=_joined(rows, chosen.action, features),
        timestamp_s=_timestamps(rows, source.fps),
        task_index=task_index,
        tasks=used,
        views=views,
        fps=source.fps,
        embodiment=source.embodiment,
        declared_frames=declared,
        state_names=dimension_names(features, chosen.state),
        action_names=dimension_names(features, chosen.action),
        success=_success(rows),
        split=_split(source.meta["splits"], index),
        unmapped=chosen.unmapped,
    )


def _template(files: SourceFiles, info: Mapping[str, Any], key: str) -> str:
    """Return a path template that is safe to fill."""
    template = info.get(key)
    if not isinstance(template, str) or not template:
        raise SourceMetadataError(f"{files.uri}: meta/info.json has no {key}")
    allowed = {"episode_chunk", "episode_index", "chunk_index", "file_index", "video_key"}
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise SourceMetadataError(f"{files.uri}: {key} {template!r} is no path template: {error}") from error
    for _, name, spec, conversion in parts:
        if name is not None and (name not in allowed or conversion or not _SPEC.fullmatch(spec or "")):
            raise SourceMetadataError(f"{files.uri}: {key} {template!r} uses {{{name}}} in a way that is not known")
    views = {"video_key": "view"} if key == "video_path" else {}
    try:
        fill(template, chunk_index=0, file_index=0, **views)
    except (KeyError, ValueError) as error:
        raise SourceMetadataError(f"{files.uri}: {key} {template!r} cannot be filled: {error}") from error
    return template


def _groups(parquet: pq.ParquetFile, episode_index: int) -> list[int]:
    """Return the row groups that may hold an episode, by their statistics."""
    leaf = next(i for i in range(parquet.metadata.num_columns) if parquet.schema.column(i).path == "episode_index")
    groups: list[int] = []
    for group in range(parquet.num_row_groups):
        statistics = parquet.metadata.row_group(group).column(leaf).statistics
        if statistics is None or not statistics.has_min_max or statistics.min <= episode_index <= statistics.max:
            groups.append(group)
    return groups


def _joined(rows: pa.Table, keys: Sequence[str], features: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    if not keys:
        return np.zeros((rows.num_rows, 0), np.float32)
    with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinite, which the checks find.
        parts = [_matrix(rows, key, declared_dim(features[key])).astype(np.float32) for key in keys]
    return np.concatenate(parts, axis=1)


def _matrix(rows: pa.Table, key: str, declared: int | None) -> npt.NDArray[np.float64]:
    """Return a column of numbers or (nested) lists of numbers as [num_frames, dim]."""
    column = rows.column(key).combine_chunks()
    dim = 1
    while (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    ):
        if column.null_count:
            raise EpisodeError("wrong-shape", f"{key} has {column.null_count} rows without a value")
        lengths = _lengths(column)
        if len(lengths) > 1:
            raise EpisodeError("wrong-shape", f"{key} has rows of {sorted(lengths)[:5]} values; all must be alike")
        dim *= lengths[0] if lengths else 0
        column = column.flatten()
    if not _is_number(column.type):
        raise EpisodeError("wrong-shape", f"{key} holds {column.type}, expected numbers")
    if column.null_count:
        raise EpisodeError("not-finite", f"{key} has {column.null_count} missing values")
    if declared is not None and rows.num_rows and dim != declared:
        raise EpisodeError("wrong-shape", f"{key} has {dim} values a row, the metadata says {declared}")
    values = column.to_numpy(zero_copy_only=False).astype(np.float64)
    return values.reshape(rows.num_rows, dim)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _lengths(column: pa.Array) -> list[int]:
    """Return the different lengths of a column's lists."""
    if pa.types.is_fixed_size_list(column.type):
        return [column.type.list_size]
    return np.unique(np.diff(column.offsets.to_numpy())).tolist()


def _timestamps(rows: pa.Table, fps: float) -> npt.NDArray[np.float64]:
    if "timestamp" in rows.column_names:
        return _matrix(rows, "timestamp", 1).reshape(-1)
    if "frame_index" in rows.column_names:
        return _matrix(rows, "frame_index", 1).reshape(-1) / fps
    return np.arange(rows.num_rows, dtype=np.float64) / fps


def _tasks(source: Source, rows: pa.Table, tasks: Sequence[str]) -> tuple[tuple[str, ...], npt.NDArray[np.int32]]:
    """Return the tasks in the order in which frames use them, and each frame's index into them."""
    known: Mapping[int, str] = source.meta["tasks"]
    if "task_index" not in rows.column_names or not known:
        return tuple(tasks[:1]) if tasks else ("",), np.zeros(rows.num_rows, np.int32)
    values = _matrix(rows, "task_index", 1).reshape(-1)
    if not np.isfinite(values).all():
        raise EpisodeError("not-finite", f"task_index is {values[~np.isfinite(values)][0]} at some frame")
    per_frame = values.astype(np.int64).tolist()
    order: dict[int, int] = {}
    for index in per_frame:
        order.setdefault(index, len(order))
    unknown = [index for index in order if index not in known]
    if unknown:
        raise EpisodeError("task-unknown", f"frames have task_index {unknown[:5]}, which the metadata does not list")
    return tuple(known[index] for index in order), np.array([order[index] for index in per_frame], np.int32)


def _success(rows: pa.Table) -> bool | None:
    if "next.success" not in rows.column_names:
        return None
    return bool(_matrix(rows, "next.success", None).any())


def _split(splits: Mapping[str, Any], index: int) -> str:
    """Return the split whose declared range "FIRST:END" holds an index; train where none does."""
    for name, span in splits.items():
        first, colon, end = str(span).partition(":")
        if colon and first.isdecimal() and end.isdecimal() and int(first) <= index < int(end):
            return str(name)
    return "train"


def _brief(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]
