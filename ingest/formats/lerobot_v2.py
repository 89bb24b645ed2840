"""LeRobot v2.0 and v2.1: one parquet file and one mp4 a view for each episode."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ingest.features import Features
from ingest.files import SourceFiles
from ingest.formats import lerobot
from ingest.source import Episode, EpisodeRef, Source, ViewSource, fingerprint
from lake.errors import SourceMetadataError

_EPISODES = "meta/episodes.jsonl"
_TASKS = "meta/tasks.jsonl"
_MAX_INT = 2**40


def detect(files: SourceFiles) -> bool:
    """Whether a source is LeRobot v2.x."""
    return lerobot.version_of(files) in ("v2.0", "v2.1")


def open_source(files: SourceFiles, feature_map: Mapping[str, str]) -> Source:
    """Read the metadata.

    Raises:
        SourceMetadataError: some of it is missing or invalid.
    """
    tasks = {
        int(_field(files, _TASKS, record, "task_index", int)): str(record.get("task", ""))
        for record in (_records(files, _TASKS) if files.exists(_TASKS) else ())
    }
    version = lerobot.version_of(files)
    return lerobot.open_lerobot(files, feature_map, f"lerobot-{version}", {"tasks": tasks})


def discover(source: Source) -> Iterator[list[EpisodeRef]]:
    """Yield the episodes that episodes.jsonl lists, one folder of files at a time.

    Raises:
        SourceMetadataError: a line is no JSON object, or an index comes twice.
    """
    seen: set[int] = set()
    batch: list[dict[str, Any]] = []
    for record in _records(source.files, _EPISODES):
        index = _field(source.files, _EPISODES, record, "episode_index", int)
        if index in seen or not 0 <= index <= _MAX_INT:
            message = f"{_EPISODES} lists episode {index} twice, or it is negative or too large"
            raise SourceMetadataError(f"{source.files.uri}: {message}")
        seen.add(index)
        if batch and _chunk(source, index) != _chunk(source, batch[0]["episode_index"]):
            yield _refs(source, batch)
            batch = []
        batch.append(record)
    if not seen:
        raise SourceMetadataError(f"{source.files.uri}: {_EPISODES} lists no episode")
    yield _refs(source, batch)


def read_episode(source: Source, ref: EpisodeRef) -> Episode:
    """Read an episode's columns.

    Raises:
        EpisodeError: its parquet file is missing, damaged or has the wrong shape.
    """
    locator = json.loads(ref.locator)
    index = ref.source_index
    rows = lerobot.read_rows(source, locator["data"], index, many=False)
    views = tuple(ViewSource(name=name, path=path) for name, path in locator["views"])
    return lerobot.assemble(source, rows, index=index, declared=ref.num_frames, tasks=locator["tasks"], views=views)


def _refs(source: Source, records: list[dict[str, Any]]) -> list[EpisodeRef]:
    states: dict[str, str] = {}
    folders: set[str] = set()
    refs: list[EpisodeRef] = []
    chosen: Features = source.meta["chosen"]
    for record in records:
        index = record["episode_index"]
        names = {"chunk_index": _chunk(source, index), "file_index": index}
        data = lerobot.fill(source.meta["data_path"], **names)
        views = [(name, lerobot.fill(source.meta["video_path"], **names, video_key=key)) for name, key in chosen.views]
        for path in (data, *(path for _, path in views)):
            folder = path.rpartition("/")[0]
            if folder not in folders:
                folders.add(folder)
                states |= source.files.states(folder)
        known = [[path, states.get(path)] for path in (data, *(path for _, path in views))]
        length = record.get("length", 0)
        tasks = record.get("tasks")
        tasks = [str(task) for task in tasks] if isinstance(tasks, list) else []
        refs.append(
            EpisodeRef(
                source_index=index,
                num_frames=min(length, _MAX_INT) if isinstance(length, int) and length > 0 else 0,
                fingerprint=fingerprint(_identity(source), record, known),
                locator=json.dumps({"data": data, "views": views, "tasks": tasks}),
            )
        )
    return refs


def _identity(source: Source) -> list[Any]:
    """Return what the meaning of every episode depends on."""
    meta = source.meta
    return [
        source.format,
        source.fps,
        source.embodiment,
        str(meta["chosen"]),
        str(meta["features"]),
        str(meta["tasks"]),
    ]


def _chunk(source: Source, index: int) -> int:
    return index // max(1, source.meta["chunks_size"])


def _records(files: SourceFiles, name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(files.meta_lines(name), 1):
        if line.strip():
            yield lerobot.parse_json(files, f"{name} line {number}", line)


def _field(files: SourceFiles, name: str, record: dict[str, Any], key: str, kind: type) -> Any:
    value = record.get(key)
    if not isinstance(value, kind):
        raise SourceMetadataError(f"{files.uri}: {name}: {key} is {value!r} in {str(record)[:100]}")
    return value
