"""Lakes to test with, filled in this process and not released."""

import time
from pathlib import Path

import lance
import pyarrow as pa
from damage import opened
from support import VIDEO, Made, make_v21

from ingest.plan import Discovered, Ordinals, attempt_of, identify, known_episodes, make_plan, new_refs, refs_of
from ingest.task import Profile, digest_episode, write_task
from lake import Lake, Release
from lake.commit import commit
from lake.errors import (
    EpisodeError,
)
from lake.schema import FRAMES
from lake.staging import Rejected, TaskResult

TOY = [Made(seed=i, num_frames=12 + i, task=f"task {i % 2}") for i in range(3)]
OTHER = [Made(seed=10 + i) for i in range(2)]


def add(lake: Lake, root: Path) -> None:
    """Ingest a source in this process and release nothing: what the tables hold is not pinned yet."""
    source, refs = opened(root)
    name, known, so_far = root.name, known_episodes(lake.storage, root.name), Discovered()
    fresh = [ref for rows in new_refs([refs], known, so_far) for ref in refs_of(rows)]
    digested, rejected = [], []
    for ref in fresh:
        try:
            digested.append((ref, digest_episode(source, ref)))
        except EpisodeError as error:
            rejected.append(
                Rejected(
                    source_index=ref.source_index,
                    fingerprint=ref.fingerprint,
                    reason=error.reason,
                    message=error.message,
                )
            )
    new = identify(digested, known, Ordinals(known, so_far.still_there()), name).new
    results = [TaskResult(attempt_id="digest", task=0, created_at=time.time(), rejected=tuple(rejected))]
    if new:
        profile = Profile(source_name=name, resolution=64)
        attempt = attempt_of(make_plan(new), profile, str(root))
        results.append(write_task(lake.storage, source, profile, attempt, 0, new))
    commit(lake.storage, name, results)


def add_orphans(lake: Lake, num_rows: int) -> None:
    """Append frames that no episode names, as a task or committer that died leaves them."""
    rows = [
        {"episode_uid": "f" * 32, "frame_index": i, "timestamp_s": i / 10, "state": [9.0] * 3, "action": [9.0] * 2}
        for i in range(num_rows)
    ]
    table = pa.Table.from_pylist([row | {"task_index": 0, "views": []} for row in rows], FRAMES)
    options = lake.storage.lance_options()
    lance.write_dataset(table, lake.storage.table_uri("frames"), mode="append", storage_options=options)


def uids(release: Release, source: str = "toy") -> list[str]:
    return release.episodes(f"source = '{source}'", ["episode_uid"]).column(0).to_pylist()


def make_sources(root: Path) -> Path:
    """Write two sources: toy, of three episodes, and other, of two good ones and a bad one, two of them validation."""
    make_v21(root / "toy", TOY, views=("top", "wrist"))
    make_v21(root / "other", [*OTHER, Made(seed=20)], robot_type="arm", splits={"train": "0:1", "val": "1:3"})
    (root / "other" / VIDEO.format("top", 2)).unlink()
    return root


def make_unreleased(root: object, sources: Path) -> Lake:
    """Make a lake with both sources and orphans around them, of which nothing is released."""
    lake = Lake.create(str(root))
    add_orphans(lake, 5)
    add(lake, sources / "toy")
    add_orphans(lake, 3)
    add(lake, sources / "other")
    add_orphans(lake, 4)
    return lake
