"""A release exported and ingested again is the same release."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import Made, ingest, make_v21, run_module

from ingest.export import export_lerobot
from jobs.export import Config, run
from lake import Lake

pytestmark = pytest.mark.usefixtures("ray")


def test_real_episodes_come_back_as_they_went(g1: Path, tmp_path: Path) -> None:
    ingest(g1, tmp_path / "lake", name="g1")
    result = run(Config(lake=str(tmp_path / "lake"), out=str(tmp_path / "v30")))
    release = Lake(str(tmp_path / "lake")).release()
    assert (result["episodes"], result["frames"]) == (6, release.num_frames)
    assert json.loads((tmp_path / "v30/meta/info.json").read_text())["codebase_version"] == "v3.0"
    again = ingest(tmp_path / "v30", tmp_path / "again", name="g1")
    assert (again["committed"], again["quarantined"]) == (6, 0)
    assert Lake(str(tmp_path / "again")).release().id == release.id


def test_several_views_tasks_and_files(tmp_path: Path) -> None:
    episodes = [Made(seed=i, num_frames=10 + i, task=f"task {i % 2}") for i in range(5)]
    ingest(make_v21(tmp_path / "toy", episodes, views=("left", "right")), tmp_path / "lake")
    run(Config(lake=str(tmp_path / "lake"), out=str(tmp_path / "v30")))
    ingest(tmp_path / "v30", tmp_path / "again", name="toy")
    assert Lake(str(tmp_path / "again")).release().id == Lake(str(tmp_path / "lake")).release().id
    assert pq.read_table(tmp_path / "v30/meta/tasks.parquet").num_rows == 2


def test_only_what_is_asked_for(tmp_path: Path) -> None:
    ingest(make_v21(tmp_path / "toy", [Made(seed=i) for i in range(3)]), tmp_path / "lake")
    release = Lake(str(tmp_path / "lake")).release()
    said: list[tuple[int, int]] = []
    counts = export_lerobot(
        release, str(tmp_path / "one"), where="source_index = 1", say=lambda done, total: said.append((done, total))
    )
    assert counts == {"episodes": 1, "frames": 12}
    assert said == [(1, 1)]


def test_episodes_that_one_dataset_cannot_hold_are_refused(tmp_path: Path) -> None:
    ingest(make_v21(tmp_path / "one", [Made(seed=1)]), tmp_path / "lake")
    ingest(make_v21(tmp_path / "two", [Made(seed=2)], robot_type="other"), tmp_path / "lake")
    release = Lake(str(tmp_path / "lake")).release()
    with pytest.raises(ValueError, match=r"differ in embodiment .*--where"):
        export_lerobot(release, str(tmp_path / "out"), where=None, say=lambda *_: None)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no episode where"):
        export_lerobot(release, str(tmp_path / "out"), where="source = 'none'", say=lambda *_: None)


def test_the_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    done = run_module("jobs.export", "--lake", tmp_path / "nothing", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("LakeNotFoundError: no lake at")
