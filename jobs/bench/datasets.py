"""Datasets for benchmarks: a user's own, repeated as often as needed, or a made one."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ingest.files import open_files
from ingest.formats import format_of, open_source
from ingest.video_writer import encode_video
from jobs import ingest
from jobs.cluster import connect
from jobs.store import store_from_environment_or_local
from lake.errors import EpisodeError

_DATA = "data/chunk-{:03d}/episode_{:06d}.parquet"
_VIDEO = "videos/chunk-{:03d}/{}/episode_{:06d}.mp4"
_CHUNK = 1000
_PREFIX = "observation.images."
_VIEWS = ("front", "wrist", "left", "right")


def make_source(folder: Path, *, episodes: int = 4, num_frames: int = 240, views: int = 1, codec: str = "av1") -> Path:
    """Write a LeRobot v2.1 dataset of drifting textures at 640 x 480 and 30 frames/s, 14 dimensions.

    Raises:
        ValueError: fewer than one view, or more than there are names for.
    """
    if not 1 <= views <= len(_VIEWS):
        raise ValueError(f"{views} views; a made source has 1 to {len(_VIEWS)}")
    rng = np.random.default_rng(0)
    keys = [_PREFIX + view for view in _VIEWS[:views]]
    video = {"dtype": "video", "shape": [480, 640, 3], "names": ["height", "width", "channel"]}
    features = {
        "observation.state": {"dtype": "float32", "shape": [14], "names": None},
        "action": {"dtype": "float32", "shape": [14], "names": None},
        **dict.fromkeys(keys, video),
    }
    for index in range(episodes):
        for key in keys:
            path = folder / _VIDEO.format(0, key, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            encode_video(_drift(rng, num_frames), path, fps=30, codec="av1" if codec == "av1" else "h264")
        walk = np.cumsum(rng.normal(0, 0.02, (num_frames, 28)), axis=0).astype(np.float32)
        table = pa.table(
            {
                "observation.state": pa.array(list(walk[:, :14]), pa.list_(pa.float32(), 14)),
                "action": pa.array(list(walk[:, 14:]), pa.list_(pa.float32(), 14)),
                "timestamp": (np.arange(num_frames) / 30).astype(np.float32),
                "frame_index": np.arange(num_frames),
                "episode_index": np.full(num_frames, index),
                "task_index": np.zeros(num_frames, np.int64),
            }
        )
        path = folder / _DATA.format(0, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    info = {"codebase_version": "v2.1", "robot_type": "made", "fps": 30, "features": features}
    _write_meta(folder, info, [{"length": num_frames, "tasks": ["drift"]}] * episodes)
    return folder


def _drift(rng: np.random.Generator, num_frames: int) -> Iterator[np.ndarray]:
    far = np.kron(rng.integers(0, 256, (60, 80, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    noise = rng.integers(0, 6, (8, *far.shape), np.uint8)
    return (np.roll(far, (at, 2 * at), (0, 1)) // 2 + noise[at % 8] + 40 for at in range(num_frames))


def repeat_source(source: Path, folder: Path, num_episodes: int) -> Path:
    """Write a dataset that repeats the good episodes of a local LeRobot v2.x dataset, by links to its files.

    Raises:
        ValueError: not such a dataset, or no episode of it is good.
    """
    opened = open_source(open_files(str(source)), {})
    if not opened.format.startswith("lerobot-v2"):
        raise ValueError(f"{source} is {opened.format}; only a local LeRobot v2.x dataset can be repeated")
    module = format_of(opened)
    good: list[tuple[dict, dict]] = []
    for ref in (ref for refs in module.discover(opened) for ref in refs):
        locator = json.loads(ref.locator)
        try:
            for _, path in locator["views"]:
                opened.files.check_episode_file(path, "video")
        except EpisodeError:
            continue
        good.append(({"length": ref.num_frames, "tasks": locator["tasks"]}, locator))
    if not good:
        raise ValueError(f"{source} has no episode with all its videos")
    info = json.loads((source / "meta/info.json").read_text(encoding="utf-8"))
    keys = dict(opened.meta["chosen"].views)
    for index in range(num_episodes):
        _, locator = good[index % len(good)]
        _link(source / locator["data"], folder / _DATA.format(index // _CHUNK, index))
        for name, path in locator["views"]:
            _link(source / path, folder / _VIDEO.format(index // _CHUNK, keys[name], index))
    _write_meta(folder, info, [good[index % len(good)][0] for index in range(num_episodes)])
    tasks = source / "meta/tasks.jsonl"
    if tasks.exists():
        (folder / "meta/tasks.jsonl").write_text(tasks.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def _write_meta(folder: Path, info: dict, records: list[dict]) -> None:
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    head = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "chunks_size": _CHUNK,
        "total_episodes": len(records),
        "splits": {"train": f"0:{len(records)}"},
    }
    (folder / "meta/info.json").write_text(json.dumps(info | head), encoding="utf-8")
    lines = (json.dumps({"episode_index": index} | record) for index, record in enumerate(records))
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _link(target: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target.resolve(), path)  # noqa: PTH211


@contextmanager
def ingested(source: str, folder: Path, bucket: str) -> Iterator[dict[str, str]]:
    """Ingest a dataset into a lake on the file system and into one on an object store; give their URIs as local, s3.

    The store is the one of AWS_ENDPOINT_URL, or else one that is started here; its environment is that of this process
    from then on. Ray is left running.
    """
    with ExitStack() as stack:
        store = stack.enter_context(store_from_environment_or_local(folder / "store", bucket=bucket))
        os.environ.update(store.environment())
        os.environ.setdefault("RAY_TMPDIR", stack.enter_context(tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp")))
        connect()
        lakes = {"local": str(folder / "lake"), "s3": f"s3://{store.bucket}/bench-{uuid4().hex[:8]}"}
        for uri in lakes.values():
            ingest.run(ingest.Config(source=source, lake=uri))
        yield lakes
