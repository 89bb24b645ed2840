"""Sources that tests make, and short ways to ingest them."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ingest.video_writer import encode_video

ROOT = Path(__file__).resolve().parents[1]
G1 = ROOT / "tests" / "data" / "g1_bottle"
DATA = "data/chunk-000/episode_{:06d}.parquet"
VIDEO = "videos/chunk-000/observation.images.{}/episode_{:06d}.mp4"


@dataclass(frozen=True, kw_only=True)
class Made:
    """One made episode; equal seeds make equal contents."""

    seed: int
    num_frames: int = 12
    task: str = "push the button"


def make_v21(root: Path, episodes: Sequence[Made], *, views: Sequence[str] = ("top",), **info: Any) -> Path:
    """Write a LeRobot v2.1 dataset of small moving pictures; ``info`` overrides info.json."""
    (root / "meta").mkdir(parents=True, exist_ok=True)
    tasks = sorted({episode.task for episode in episodes})
    for index, episode in enumerate(episodes):
        write_episode(root, index, episode, tasks.index(episode.task), views)
    write_meta(root, episodes, views, tasks, info)
    return root


def write_episode(root: Path, index: int, episode: Made, task_index: int, views: Sequence[str]) -> None:
    """Write the parquet file and the videos of one episode."""
    rng = np.random.default_rng(episode.seed)
    n = episode.num_frames
    columns = {
        "observation.state": pa.array(rng.normal(size=(n, 3)).astype(np.float32).tolist(), pa.list_(pa.float32(), 3)),
        "action": pa.array(rng.normal(size=(n, 2)).astype(np.float32).tolist(), pa.list_(pa.float32(), 2)),
        "timestamp": pa.array((np.arange(n) / 10).astype(np.float32)),
        "frame_index": pa.array(np.arange(n)),
        "episode_index": pa.array(np.full(n, index)),
        "index": pa.array(np.arange(n) + 1000 * index),
        "task_index": pa.array(np.full(n, task_index)),
    }
    path = root / DATA.format(index)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    for view in views:
        video = root / VIDEO.format(view, index)
        video.parent.mkdir(parents=True, exist_ok=True)
        video.write_bytes(encoded_video(n, episode.seed))


@cache
def encoded_video(num_frames: int, seed: int) -> bytes:
    """Return an mp4 file; the encoder's output may differ from run to run, so each is made once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        encode_video(moving_pictures(num_frames, seed), path, fps=10)
        return path.read_bytes()


def moving_pictures(num_frames: int, seed: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Return frames in which a bright bar moves over a gradient."""
    rng = np.random.default_rng(seed)
    base = np.linspace(0, 160, width)[None, :, None] * np.ones((height, 1, 3)) * rng.uniform(0.5, 1, 3)
    frames = []
    for i in range(num_frames):
        frame = base.copy()
        frame[:, (7 * i + seed) % width] = 255
        frames.append(frame.astype(np.uint8))
    return frames


def write_meta(
    root: Path, episodes: Sequence[Made], views: Sequence[str], tasks: Sequence[str], info: dict[str, Any]
) -> None:
    """Write the metadata files."""
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "z"]}},
        "action": {"dtype": "float32", "shape": [2], "names": ["dx", "dy"]},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        "frame_index": {"dtype": "int64", "shape": [1], "names": None},
        "episode_index": {"dtype": "int64", "shape": [1], "names": None},
        "index": {"dtype": "int64", "shape": [1], "names": None},
        "task_index": {"dtype": "int64", "shape": [1], "names": None},
    }
    for view in views:
        features[f"observation.images.{view}"] = {"dtype": "video", "shape": [48, 64, 3], "names": ["h", "w", "c"]}
    head = {
        "codebase_version": "v2.1",
        "robot_type": "toy",
        "total_episodes": len(episodes),
        "fps": 10,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(head | info))
    records = [
        {"episode_index": i, "tasks": [episode.task], "length": episode.num_frames}
        for i, episode in enumerate(episodes)
    ]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [json.dumps({"task_index": i, "task": task}) + "\n" for i, task in enumerate(tasks)]
    (root / "meta/tasks.jsonl").write_text("".join(lines))


def ingest(source: object, lake: object, **config: Any) -> dict[str, Any]:
    """Ingest in this process, on the Ray that is running."""
    from jobs.ingest import Config, run

    return run(Config(source=str(source), lake=str(lake), **config))


def run_module(module: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE`` as a user would."""
    return subprocess.run(
        [sys.executable, "-m", module, *(str(argument) for argument in arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def last_json(output: str) -> dict[str, Any]:
    """Return the JSON of the last line that a job printed."""
    return json.loads(output.strip().splitlines()[-1])


def read_with_lerobot(lerobot: Path, root: Path, *indices: int) -> dict[str, Any]:
    """Open a LeRobot v3.0 dataset with LeRobot itself; return what tests/lerobot_open.py prints."""
    command = [lerobot, ROOT / "tests" / "lerobot_open.py", root, *map(str, indices)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
