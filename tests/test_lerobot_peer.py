"""LeRobot itself, in an environment of its own, reads what ingest/lerobot_writer.py writes."""

import json
import subprocess
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from g1 import GOOD, good_v21
from support import ROOT, read_with_lerobot

from ingest.lerobot_files import FileLimits
from ingest.lerobot_writer import Column, DatasetSpec, LeRobotWriter, ViewFile
from ingest.video_writer import encode_video

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TOP, WRIST = "observation.images.top", "observation.images.wrist"
CAM_HIGH = "observation.images.cam_high"


def pictures(num_frames: int, seed: int) -> list[np.ndarray]:
    """Return frames that brighten by 2 of 255 each, so that each is known by its mean."""
    pattern = np.random.default_rng(seed).integers(0, 40, (12, 16, 3)).repeat(4, axis=0).repeat(4, axis=1)
    return [(pattern + 20 + 2 * n).astype(np.uint8) for n in range(num_frames)]


def decoded_means(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        return [float(frame.to_ndarray(format="rgb24").mean() / 255) for frame in container.decode(video=0)]


def encode_with_b_frames(frames: list[np.ndarray], path: Path, *, fps: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"bf": "3", "g": "12"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def test_lerobot_reads_every_value_and_every_frame(lerobot: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    state = Column(size=5, names=("a", "b", "c", "d", "e"))
    spec = DatasetSpec(
        fps=30,
        robot_type="toy",
        columns={"observation.state": state, "action": Column(size=2), "next.done": Column(dtype="bool")},
        views=(TOP, WRIST),
    )
    expected = []
    limits = FileLimits(data_bytes=6000, video_bytes=30_000, files_per_chunk=2)
    with LeRobotWriter(tmp_path / "out", spec=spec, limits=limits) as writer:
        for episode in range(8):
            num_frames = 30 + 7 * episode
            frames = pictures(num_frames, episode)
            encode_video(frames, tmp_path / "top.mp4", fps=30, codec="av1" if episode > 4 else "h264")
            lead = 3 if episode % 2 else 0
            encode_with_b_frames(pictures(num_frames + lead, 50 + episode), tmp_path / "wrist.mp4", fps=30)
            columns = {
                "observation.state": rng.normal(size=(num_frames, 5)).astype(np.float32),
                "action": rng.normal(size=(num_frames, 2)).astype(np.float32),
                "next.done": np.arange(num_frames) == num_frames - 1,
            }
            task = f"do {episode % 3}"
            views = {TOP: tmp_path / "top.mp4", WRIST: ViewFile(tmp_path / "wrist.mp4", num_lead_frames=lead)}
            writer.add_episode(columns, tasks=task, views=views)
            means = decoded_means(tmp_path / "top.mp4"), decoded_means(tmp_path / "wrist.mp4")[lead:]
            for n in range(num_frames):
                values = {name: column[n].tolist() for name, column in columns.items()}
                expected.append((episode, n, task, values, {TOP: means[0][n], WRIST: means[1][n]}))
    assert len(list((tmp_path / "out/videos" / TOP).rglob("*.mp4"))) > 2
    assert len(list((tmp_path / "out/data").rglob("*.parquet"))) > 2

    read = read_with_lerobot(lerobot, tmp_path / "out", *range(len(expected)))
    assert (read["num_episodes"], read["num_frames"], read["fps"]) == (8, len(expected), 30)
    assert read["tasks"] == ["do 0", "do 1", "do 2"]
    assert read["lengths"] == [30 + 7 * episode for episode in range(8)]
    for sample, (episode, frame, task, values, means) in zip(read["samples"], expected, strict=True):
        assert (sample["episode_index"], sample["columns"]["frame_index"], sample["task"]) == (episode, frame, task)
        assert {name: sample["columns"][name] for name in values} == values
        assert sample["timestamp"] == np.float32(frame / 30)
        assert sample["view_mean"] == pytest.approx(means, abs=2e-3)  # The frame before or behind is 8e-3 away.
    stats = json.loads((tmp_path / "out/meta/stats.json").read_text())
    assert read["stats"] == stats


def test_lerobot_reads_the_same_as_from_its_own_conversion(lerobot: Path, g1: Path, tmp_path: Path) -> None:
    v21 = good_v21(g1, tmp_path / "v21")
    info = json.loads((v21 / "meta/info.json").read_text())
    command = [lerobot, ROOT / "tests" / "lerobot_convert.py", v21, tmp_path / "theirs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    size = info["features"]["action"]["shape"][0]
    columns = {name: Column(size=size) for name in ("observation.state", "action")}
    spec = DatasetSpec(fps=30, robot_type=info["robot_type"], columns=columns, views=(CAM_HIGH,))
    with LeRobotWriter(tmp_path / "ours", spec=spec) as writer:
        for episode in range(len(GOOD)):
            at = {"episode_chunk": 0, "episode_index": episode}
            table = pq.read_table(v21 / info["data_path"].format(**at))
            writer.add_episode(
                {name: np.array(table[name].to_pylist(), np.float32) for name in columns},
                tasks="Pick up the yellow bottle on the table.",
                views={CAM_HIGH: v21 / info["video_path"].format(video_key=CAM_HIGH, **at)},
                timestamp=table["timestamp"].to_numpy(),
            )
    ours, theirs = (read_with_lerobot(lerobot, tmp_path / name) for name in ("ours", "theirs"))
    assert len(ours["samples"]) == 3 * len(GOOD)
    assert ours["samples"] == theirs["samples"]
    for name in ("num_episodes", "num_frames", "fps", "views", "tasks", "lengths"):
        assert ours[name] == theirs[name]
    for name in columns:
        for stat in ("min", "max", "mean", "std"):
            assert ours["stats"][name][stat] == pytest.approx(theirs["stats"][name][stat], rel=1e-4, abs=1e-5)
    assert np.ravel(ours["stats"][CAM_HIGH]["mean"]) == pytest.approx(
        np.ravel(theirs["stats"][CAM_HIGH]["mean"]), abs=0.02
    )
