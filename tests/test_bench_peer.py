"""LeRobot, the peer of the loader's benchmark, reads the very episodes that a lake holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import ROOT, Made, ingest, make_v21

from ingest.video_writer import scan_video
from jobs.bench.datasets import make_source
from jobs.bench.peer import Reading, as_lerobot_v3, lerobot_python, measure
from lake import Lake

HORIZON = 5
VIEWS = ("left", "right")
LENGTHS = (12, 17, 23)
READ_CHUNKS = """
import json, sys
sys.path.insert(0, sys.argv[2])
from lerobot_open import prepare
prepare()
from lerobot.datasets.lerobot_dataset import LeRobotDataset
times = [step / 10 for step in range(int(sys.argv[3]))]
dataset = LeRobotDataset("local/dataset", root=sys.argv[1], delta_timestamps={"action": times})
items = [dataset[index] for index in range(len(dataset))]
names = ("observation.state", "action", "action_is_pad", "episode_index", "frame_index")
print(json.dumps([{name: item[name].tolist() for name in names} | {"task": item["task"]} for item in items]))
"""


@pytest.fixture(scope="module")
def lake(ray: object, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake of three episodes with two views, at 10 frames/s."""
    folder = tmp_path_factory.mktemp("peer")
    episodes = [Made(seed=at, num_frames=length, task=f"task {at % 2}") for at, length in enumerate(LENGTHS)]
    ingest(make_v21(folder / "toy", episodes, views=VIEWS), folder / "lake")
    return str(folder / "lake")


@pytest.fixture(scope="module")
def dataset(lake: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lake as a LeRobot v3.0 dataset."""
    return as_lerobot_v3(lake, tmp_path_factory.mktemp("peer-v30") / "v30")


def test_a_made_source_has_as_many_views_as_asked_for(tmp_path: Path) -> None:
    one = make_source(tmp_path / "one", episodes=1, num_frames=4, codec="h264")
    assert [path.name for path in (one / "videos/chunk-000").iterdir()] == ["observation.images.front"]
    two = make_source(tmp_path / "two", episodes=2, num_frames=4, views=2, codec="h264")
    videos = sorted((two / "videos").rglob("*.mp4"))
    assert {path.parent.name for path in videos} == {"observation.images.front", "observation.images.wrist"}
    assert [scan_video(path).num_frames for path in videos] == [4] * 4
    assert len({path.read_bytes() for path in videos}) == 4, "no two videos are alike"
    features = json.loads((two / "meta/info.json").read_text())["features"]
    assert [name for name, feature in features.items() if feature["dtype"] == "video"] == [
        "observation.images.front",
        "observation.images.wrist",
    ]


@pytest.mark.parametrize("views", [0, 5])
def test_a_made_source_refuses_views_that_have_no_name(views: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{views} views; a made source has 1 to 4"):
        make_source(tmp_path / "made", views=views)
    assert not (tmp_path / "made").exists()


def test_the_dataset_has_the_frames_and_packets_of_the_release(lake: str, dataset: Path) -> None:
    release = Lake(lake).release()
    info = json.loads((dataset / "meta/info.json").read_text())
    assert (info["codebase_version"], info["total_episodes"], info["total_frames"]) == ("v3.0", 3, sum(LENGTHS))
    rows = pq.read_table(dataset / "data", columns=["action"])["action"].to_pylist()
    assert rows == release.frames(columns=["action"])["action"].to_pylist()
    for view in VIEWS:
        [video] = (dataset / f"videos/observation.images.{view}").rglob("*.mp4")
        assert scan_video(video).num_frames == sum(LENGTHS)


def test_an_environment_that_cannot_be_made_is_said_clearly(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("not to be lost")
    with pytest.raises(RuntimeError, match=r"could not make .* a folder that is free"):
        lerobot_python(tmp_path)
    assert (tmp_path / "mine").read_text() == "not to be lost"


def test_a_peer_that_fails_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"LeRobot cannot read .*torchcodec.*ModuleNotFoundError.*pyav"):
        measure(tmp_path, Reading(), python=Path(sys.executable))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_lerobot_gives_the_states_and_action_chunks_of_the_release(lake: str, dataset: Path, lerobot: Path) -> None:
    done = subprocess.run(
        [lerobot, "-c", READ_CHUNKS, dataset, ROOT / "tests", str(HORIZON)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    items = json.loads(done.stdout.splitlines()[-1])
    assert len(items) == sum(LENGTHS)
    release = Lake(lake).release()
    at = 0
    for number, episode in enumerate(release.episodes().to_pylist()):
        frames = release.frames(columns=["state", "action"], episodes=[episode["episode_uid"]])
        states, actions = (np.array(frames[name].to_pylist(), np.float32) for name in ("state", "action"))
        for index in range(frames.num_rows):
            item, steps = items[at], np.arange(index, index + HORIZON)
            at += 1
            assert (item["episode_index"], item["frame_index"], item["task"]) == (number, index, episode["tasks"][0])
            np.testing.assert_array_equal(np.float32(item["observation.state"]), states[index])
            np.testing.assert_array_equal(np.float32(item["action"]), actions[np.minimum(steps, len(actions) - 1)])
            assert item["action_is_pad"] == (steps >= len(actions)).tolist()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("workers", "augment"), [(0, False), (2, True)])
def test_every_sample_that_comes_out_is_counted(workers: int, augment: bool, dataset: Path, lerobot: Path) -> None:
    reading = Reading(horizon=HORIZON, batch_size=4, workers=workers, augment=augment, seconds=2.0)
    result = measure(dataset, reading, python=lerobot)
    assert set(result["backends"]) == {"torchcodec", "pyav"}
    assert result["samples_per_s"] == max(result["backends"].values()) == result["backends"][result["backend"]]
    assert result["samples_per_s"] == pytest.approx(result["samples"] / result["seconds"], rel=1e-2)
    assert result["seconds"] >= 2.0
    assert result["samples"] > sum(LENGTHS), "it goes on after all frames were seen"
    assert result["samples"] % 4 == 0
    assert (result["workers"], result["augment"], result["horizon"]) == (workers, augment, HORIZON)
    assert (result["episodes"], result["frames"]) == (len(LENGTHS), sum(LENGTHS))
    assert result["views"] == [f"observation.images.{view}" for view in VIEWS]
    assert 0 < result["cpu_s"] < result["seconds"] * (os.cpu_count() or 1) * 1.5
    assert result["first_batch_s"] > 0
    assert result["peak_mib"] > 200, "torch alone is larger"
    assert result["versions"]["lerobot"] == "0.4.4"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_lerobot_cannot_read_is_said_with_its_reason(tmp_path: Path, lerobot: Path) -> None:
    with pytest.raises(RuntimeError, match=r"pyav.*exit status 1"):
        measure(tmp_path / "nothing", Reading(seconds=1.0, backend="pyav"), python=lerobot)
