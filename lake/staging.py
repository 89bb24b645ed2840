"""What a task leaves behind for the committer: plain JSON at deterministic paths.

_staging/<source key>/<attempt id>/plan.parquet      which episodes, which tasks
_staging/<source key>/<attempt id>/task-000012.json  what a task wrote
_staging/<source key>/<attempt id>/closed            nothing is left to commit
"""

import hashlib
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lake.storage import Storage
from lake.tables import data_path

MAX_AGE_S = 5 * 24 * 3600.0
"""Results older than this are decoded anew: Lance may sweep files it does not know after 7 days."""

_READERS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TableWrite:
    """The fragment that a task wrote to one table."""

    json: str
    """Lance's fragment metadata as JSON."""
    base_version: int
    """Version of the table when the task began."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeWrite:
    """One good episode inside a task's fragments."""

    episode_uid: str
    row: dict[str, Any]
    """Its columns in ``episodes``, without the row ranges."""
    ranges: dict[str, tuple[int, int]]
    """Offset in the task's fragment and number of rows, by table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """One bad episode."""

    source_index: int
    fingerprint: str
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """Everything that a task did."""

    attempt_id: str
    task: int
    created_at: float
    writes: dict[str, TableWrite] = field(default_factory=dict[str, TableWrite])
    episodes: tuple[EpisodeWrite, ...] = ()
    rejected: tuple[Rejected, ...] = ()

    def to_json(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "TaskResult":
        """Read it back."""
        raw = json.loads(data)
        return cls(
            attempt_id=raw["attempt_id"],
            task=raw["task"],
            created_at=raw["created_at"],
            writes={table: TableWrite(**write) for table, write in raw["writes"].items()},
            episodes=tuple(
                EpisodeWrite(
                    episode_uid=e["episode_uid"],
                    row=e["row"],
                    ranges={table: (first, rows) for table, (first, rows) in e["ranges"].items()},
                )
                for e in raw["episodes"]
            ),
            rejected=tuple(Rejected(**r) for r in raw["rejected"]),
        )


def source_key(source: str) -> str:
    """Return a source's folder name: safe on every store, whatever the source is called."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def put_plan(storage: Storage, source: str, attempt_id: str, plan: pa.Table) -> None:
    """Persist a plan unless it is there; its name is the hash of what it says."""
    sink = io.BytesIO()
    pq.write_table(plan, sink, compression="zstd")
    storage.put_if_absent(f"{_folder(source, attempt_id)}/plan.parquet", sink.getvalue())


def put_result(storage: Storage, source: str, result: TaskResult) -> TaskResult:
    """Stage a task's result unless a usable one is there; return the one that counts."""
    path = _task_path(source, result.attempt_id, result.task)
    if storage.put_if_absent(path, result.to_json()):
        return result
    staged = _read_usable(storage, path)
    if staged is None:
        storage.delete([path])
        storage.put_if_absent(path, result.to_json())
    return staged or result


def get_result(storage: Storage, source: str, attempt_id: str, task: int) -> TaskResult | None:
    """Return the staged result of a task, if a usable one is there."""
    return _read_usable(storage, _task_path(source, attempt_id, task))


def close_attempt(storage: Storage, source: str, attempt_id: str) -> None:
    """Say that nothing of an attempt is left to commit."""
    storage.put_if_absent(f"{_folder(source, attempt_id)}/closed", b"{}")


def is_closed(storage: Storage, source: str, attempt_id: str) -> bool:
    """Whether nothing of an attempt is left to commit."""
    return storage.exists(f"{_folder(source, attempt_id)}/closed")


def forget_attempt(storage: Storage, source: str, attempt_id: str) -> None:
    """Remove everything that an attempt staged, so that its tasks are done anew."""
    storage.delete([path for path, _ in storage.files(_folder(source, attempt_id))])


def open_results(storage: Storage, source: str) -> Iterator[TaskResult]:
    """Yield what earlier attempts at a source staged and may not have committed."""
    by_attempt: dict[str, list[str]] = {}
    for path, _ in storage.files(f"_staging/{source_key(source)}"):
        by_attempt.setdefault(path.split("/")[-2], []).append(path)
    with ThreadPoolExecutor(_READERS) as pool:
        for paths in by_attempt.values():
            if any(path.endswith("/closed") for path in paths):
                continue
            results = sorted(path for path in paths if path.endswith(".json"))
            yield from filter(None, pool.map(partial(_read_usable, storage), results))


def open_attempts(storage: Storage, source: str) -> set[str]:
    """Return the attempts at a source that are not closed."""
    seen: set[str] = set()
    closed: set[str] = set()
    for path, _ in storage.files(f"_staging/{source_key(source)}"):
        attempt_id, name = path.split("/")[-2:]
        seen.add(attempt_id)
        if name == "closed":
            closed.add(attempt_id)
    return seen - closed


def _read_usable(storage: Storage, path: str) -> TaskResult | None:
    """Return a staged result, unless it is too old or its files were cleaned away."""
    data = storage.read(path)
    result = TaskResult.from_json(data) if data else None
    if result is None or time.time() - result.created_at >= MAX_AGE_S:
        return None
    files = [(table, json.loads(write.json)["files"][0]["path"]) for table, write in result.writes.items()]
    return result if all(storage.exists(data_path(table, file)) for table, file in files) else None


def _task_path(source: str, attempt_id: str, task: int) -> str:
    return f"{_folder(source, attempt_id)}/task-{task:06d}.json"


def _folder(source: str, attempt_id: str) -> str:
    return f"_staging/{source_key(source)}/{attempt_id}"
