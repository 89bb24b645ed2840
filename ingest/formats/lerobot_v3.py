"""LeRobot v3.0: many episodes in each parquet and mp4 file."""

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.features import Features
from ingest.files import SourceFiles
from ingest.formats import lerobot
from ingest.source import Episode, EpisodeRef, Source, ViewSource, fingerprint
from lake.errors import EpisodeError, SourceMetadataError

_BATCH = 1000
_MAX_S = 1e9


def detect(files: SourceFiles) -> bool:
    """Whether a source is LeRobot v3.0."""
    return lerobot.version_of(files) == "v3.0"


def open_source(files: SourceFiles, feature_map: Mapping[str, str]) -> Source:
    """Read the metadata.

    Raises:
        SourceMetadataError: some of it is missing or invalid.
    """
    return lerobot.open_lerobot(files, feature_map, "lerobot-v3.0", {"tasks": _tasks(files)})


def discover(source: Source) -> Iterator[list[EpisodeRef]]:
    """Yield the episodes that meta/episodes lists, a batch at a time.

    Raises:
        SourceMetadataError: a metadata file is missing or damaged, or an index comes twice.
    """
    names = [name for name in source.files.find("meta/episodes") if name.endswith(".parquet")]
    if not names:
        raise SourceMetadataError(f"{source.files.uri}: meta/episodes holds no parquet file")
    seen: set[int] = set()
    states: dict[str, dict[str, str]] = {}
    for name in names:
        for records in _batches(source, name):
            refs = [_ref(source, record, states) for record in records]
            for ref in refs:
                if ref.source_index in seen:
                    raise SourceMetadataError(f"{source.files.uri}: {name} lists episode {ref.source_index} twice")
                seen.add(ref.source_index)
            yield refs
    if not seen:
        raise SourceMetadataError(f"{source.files.uri}: meta/episodes lists no episode")


def read_episode(source: Source, ref: EpisodeRef) -> Episode:
    """Read an episode's columns.

    Raises:
        EpisodeError: its parquet file is missing, damaged or has the wrong shape.
    """
    locator = json.loads(ref.locator)
    if locator["data"] is None:
        raise EpisodeError("data-missing", "meta/episodes does not say which parquet file holds the episode")
    for name, path, start_s, end_s in locator["views"]:
        if path is None or start_s is None or end_s is None:
            raise EpisodeError("video-missing", f"meta/episodes does not say where the video of view {name} is")
        if not 0 <= start_s < end_s < _MAX_S:
            raise EpisodeError("video-frame-count", f"view {name} is said to last from {start_s} to {end_s} s")
    rows = lerobot.read_rows(source, locator["data"], ref.source_index, many=True)
    views = tuple(
        ViewSource(name=name, path=path, start_s=start_s, end_s=end_s)
        for name, path, start_s, end_s in locator["views"]
    )
    return lerobot.assemble(
        source, rows, index=ref.source_index, declared=ref.num_frames, tasks=locator["tasks"], views=views
    )


def _batches(source: Source, name: str) -> Iterator[list[dict[str, Any]]]:
    files = source.files
    chosen: Features = source.meta["chosen"]
    needed = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for _, key in chosen.views:
        needed += [f"videos/{key}/{part}" for part in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    try:
        parquet = pq.ParquetFile(io.BytesIO(files.read_meta(name)))
        missing = [column for column in needed if column not in parquet.schema_arrow.names]
        if missing:
            raise SourceMetadataError(f"{files.uri}: {name} lacks {', '.join(missing)}")
        for column in needed:
            kind = parquet.schema_arrow.field(column).type
            if not (pa.types.is_integer(kind) or (column.endswith("_timestamp") and pa.types.is_floating(kind))):
                raise SourceMetadataError(f"{files.uri}: {name}: {column} holds {kind}, expected numbers")
        columns = [*needed, "tasks"] if "tasks" in parquet.schema_arrow.names else needed
        for batch in parquet.iter_batches(_BATCH, columns=columns):
            yield batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceMetadataError(f"{files.uri}: {name} is damaged: {str(error)[:200]}") from error


def _ref(source: Source, record: dict[str, Any], states: dict[str, dict[str, str]]) -> EpisodeRef:
    chosen: Features = source.meta["chosen"]
    index = record["episode_index"]
    if index is None:
        raise SourceMetadataError(f"{source.files.uri}: meta/episodes lists an episode without episode_index")
    data = _path(source.meta["data_path"], record, "data")
    views: list[tuple[str, str | None, float | None, float | None]] = []
    for name, key in chosen.views:
        path = _path(source.meta["video_path"], record, f"videos/{key}", video_key=key)
        views.append((name, path, record[f"videos/{key}/from_timestamp"], record[f"videos/{key}/to_timestamp"]))
    known = [[path, _state(source, path, states)] for path in (data, *(view[1] for view in views))]
    meta = source.meta
    return EpisodeRef(
        source_index=index,
        num_frames=max(0, record["length"] or 0),
        fingerprint=fingerprint(
            source.format, source.fps, source.embodiment, str(meta["chosen"]), str(meta["features"]), record, known
        ),
        locator=json.dumps({"data": data, "views": views, "tasks": _texts(record.get("tasks"))}),
    )


def _path(template: str, record: dict[str, Any], prefix: str, **names: str) -> str | None:
    """Return the path of the file that a record names; None where it names none."""
    chunk, file = record[f"{prefix}/chunk_index"], record[f"{prefix}/file_index"]
    return (
        None if chunk is None or file is None else lerobot.fill(template, chunk_index=chunk, file_index=file, **names)
    )


def _texts(tasks: Any) -> list[str]:
    return [str(task) for task in tasks] if isinstance(tasks, list) else []


def _state(source: Source, path: str | None, states: dict[str, dict[str, str]]) -> str | None:
    """Return a file's state; a folder is listed when it first comes up, the last few are kept."""
    if path is None:
        return None
    folder = path.rpartition("/")[0]
    if folder not in states:
        if len(states) > 64:
            states.clear()
        states[folder] = source.files.states(folder)
    return states[folder].get(path)


def _tasks(files: SourceFiles) -> dict[int, str]:
    """Return task texts by index; LeRobot keeps the text as the table's index."""
    if not files.exists("meta/tasks.parquet"):
        return {}
    try:
        table = pq.read_table(io.BytesIO(files.read_meta("meta/tasks.parquet")))
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise SourceMetadataError(f"{files.uri}: meta/tasks.parquet is damaged: {str(error)[:200]}") from error
    texts = [name for name in ("task", "__index_level_0__") if name in columns]
    if not texts or "task_index" not in columns:
        raise SourceMetadataError(f"{files.uri}: meta/tasks.parquet has {list(columns)}, expected task_index and task")
    return {index: str(text) for index, text in zip(columns["task_index"], columns[texts[0]], strict=True)}
