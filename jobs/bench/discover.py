"""Measure discovery, anti-join and index commits at a million episodes."""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.files import open_files
from ingest.formats import format_of, open_source
from ingest.plan import Discovered, Ordinals, identify, known_episodes, make_plan, new_refs, refs_of
from ingest.source import Source
from lake import Lake
from lake.commit import episode_uid
from lake.schema import EPISODES
from lake.tables import merge_new

_NAME = "bench"
_KEY = "observation.images.front"
_FILE_EPISODES = 50_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Discover a large source against a lake that knows most of it.

    The metadata is real in form and made up in content; no video exists, since discovery opens none.
    """

    source: str = ""
    """A dataset of your own, of which nothing is ingested; empty makes metadata of `episodes` episodes."""
    episodes: int = 1_000_000
    """Episodes of the made source."""
    new: int = 10_000
    """Episodes of it that the lake does not know."""
    batch: int = 16_384
    """Episodes of one commit to the index."""


def run(config: Config) -> dict[str, Any]:
    """Return {"what", "numbers", "rows"}; every step runs in a process of its own, whose peak memory is taken."""
    with tempfile.TemporaryDirectory(prefix="bench-discover-") as folder:
        source = config.source or str(_make(Path(folder) / "source", config.episodes))
        lake = f"{folder}/lake"
        commits = _child(_fill, lake, source, config)
        found = _child(_discover, lake, source, config)
    last = [row for row in commits["rows"][-5:] if row["rows"] == config.batch] or commits["rows"][-1:]
    numbers = {
        "episodes": found["episodes"],
        "new": found["new"],
        "discover_s": found["discover_s"],
        "episodes_per_s": found["episodes"] / found["discover_s"],
        "discover_peak_mib": found["peak_mib"],
        "commit_rows_per_s": sum(row["rows"] for row in commits["rows"])
        / sum(row["seconds"] for row in commits["rows"]),
        "commit_rows_per_s_at_the_end": sum(row["rows"] for row in last) / sum(row["seconds"] for row in last),
        "commit_peak_mib": commits["peak_mib"],
    }
    return {"what": "discovery and anti-join of many episodes", "numbers": numbers, "rows": [*commits["rows"], found]}


def _make(root: Path, episodes: int) -> Path:
    features = {
        "observation.state": {"dtype": "float32", "shape": [14], "names": None},
        "action": {"dtype": "float32", "shape": [14], "names": None},
        _KEY: {"dtype": "video", "shape": [480, 640, 3], "names": ["height", "width", "channel"]},
    }
    info = {
        "codebase_version": "v3.0",
        "robot_type": "made",
        "fps": 30,
        "total_episodes": episodes,
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info), encoding="utf-8")
    pq.write_table(pa.table({"task_index": [0], "task": ["move"]}), root / "meta/tasks.parquet")
    for number, start in enumerate(range(0, episodes, _FILE_EPISODES)):
        index = list(range(start, min(start + _FILE_EPISODES, episodes)))
        columns = {
            "episode_index": index,
            "tasks": [["move"]] * len(index),
            "length": [300] * len(index),
            "data/chunk_index": [i // 1_000_000 for i in index],
            "data/file_index": [i // 1000 for i in index],
            f"videos/{_KEY}/chunk_index": [i // 100_000 for i in index],
            f"videos/{_KEY}/file_index": [i // 100 % 1000 for i in index],
            f"videos/{_KEY}/from_timestamp": [i % 100 * 10.0 for i in index],
            f"videos/{_KEY}/to_timestamp": [i % 100 * 10.0 + 10.0 for i in index],
        }
        pq.write_table(pa.table(columns), root / f"meta/episodes/chunk-000/file-{number:03d}.parquet")
    return root


def _fill(lake_uri: str, source_uri: str, config: Config) -> dict[str, Any]:
    """Commit all but the last episodes to the index, as the committer does; return how long each commit took."""
    lake, source = Lake.create(lake_uri), open_source(open_files(source_uri), {})
    total = sum(len(refs) for refs in format_of(source).discover(source))
    rows: list[dict[str, Any]] = []
    for episodes in _batches(source, max(0, total - config.new), config.batch):
        since = time.perf_counter()
        merge_new(lake.storage, "episodes", episodes)
        rows.append({"side": "commit", "rows": episodes.num_rows, "seconds": time.perf_counter() - since})
        print(rows[-1], file=sys.stderr, flush=True)
    return {"rows": rows or [{"side": "commit", "rows": 0, "seconds": 1e-9}]}


def _batches(source: Source, most: int, size: int) -> Iterator[pa.Table]:
    waiting: list[dict[str, Any]] = []
    done = 0
    for refs in format_of(source).discover(source):
        for ref in refs[: most - done]:
            digest = f"{ref.source_index:032x}"
            waiting.append(
                {
                    "episode_uid": episode_uid(_NAME, digest, 0),
                    "source": _NAME,
                    "source_index": ref.source_index,
                    "content_digest": digest,
                    "ordinal": 0,
                    "fingerprint": ref.fingerprint,
                    "num_frames": ref.num_frames,
                    "tasks": ["move"],
                    "views": ["front"],
                    "ingested_at": datetime.now(UTC),
                }
            )
            done += 1
            if len(waiting) == size:
                yield pa.Table.from_pylist(waiting, EPISODES)
                waiting = []
    if waiting:
        yield pa.Table.from_pylist(waiting, EPISODES)


def _discover(lake_uri: str, source_uri: str, config: Config) -> dict[str, Any]:
    """Discover, anti-join, identify and plan, as an ingestion does."""
    del config
    lake, source = Lake(lake_uri), open_source(open_files(source_uri), {})
    since = time.perf_counter()
    known = known_episodes(lake.storage, _NAME)
    so_far = Discovered()
    found = list(new_refs(format_of(source).discover(source), known, so_far))
    seconds = time.perf_counter() - since
    pairs = [(ref, f"{ref.source_index:032x}") for table in found for ref in refs_of(table)]
    new = make_plan(identify(pairs, known, Ordinals(known, so_far.still_there()), _NAME).new).num_rows
    return {"side": "discover", "episodes": so_far.total, "skipped": so_far.skipped, "new": new, "discover_s": seconds}


def _child(step: Any, *arguments: Any) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (step, *arguments))


def _measured(step: Any, *arguments: Any) -> dict[str, Any]:
    result = step(*arguments)
    return result | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
