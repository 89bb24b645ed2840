"""LeRobot's own v3.0 datasets come in, and releases go out to LeRobot, with nothing changed."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from g1 import good_v21
from support import ROOT, ingest, read_with_lerobot

from ingest.files import open_files
from ingest.formats import format_of, open_source
from ingest.task import digest_episode
from jobs.export import Config, run
from lake import Lake
from lake.images import decode_jpeg

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("ray")]


def test_what_lerobot_converted_to_v30_is_the_same_release(lerobot: Path, g1: Path, tmp_path: Path) -> None:
    v21 = good_v21(g1, tmp_path / "v21")
    subprocess.run([lerobot, ROOT / "tests/lerobot_convert.py", v21, tmp_path / "v30"], check=True, capture_output=True)
    old = ingest(g1, tmp_path / "old", name="g1")
    new = ingest(tmp_path / "v30", tmp_path / "new", name="g1")
    assert (new["committed"], new["quarantined"], new["frames"]) == (6, 0, old["frames"])
    assert Lake(str(tmp_path / "new")).release().id == Lake(str(tmp_path / "old")).release().id
    into_one = ingest(tmp_path / "v30", tmp_path / "old", name="g1")
    assert (into_one["committed"], into_one["skipped"]) == (0, 6), "what changed its format is known again"


def test_digests_do_not_depend_on_the_format(lerobot: Path, g1: Path, tmp_path: Path) -> None:
    v21 = good_v21(g1, tmp_path / "v21")
    subprocess.run([lerobot, ROOT / "tests/lerobot_convert.py", v21, tmp_path / "v30"], check=True, capture_output=True)
    digests = []
    for root in (v21, tmp_path / "v30"):
        source = open_source(open_files(str(root)), {})
        refs = [ref for refs in format_of(source).discover(source) for ref in refs]
        digests.append([digest_episode(source, ref) for ref in refs])
    assert digests[0] == digests[1]


def test_lerobot_opens_an_exported_release(lerobot: Path, g1: Path, tmp_path: Path) -> None:
    ingest(g1, tmp_path / "lake")
    run(Config(lake=str(tmp_path / "lake"), out=str(tmp_path / "v30")))
    release = Lake(str(tmp_path / "lake")).release()
    frames = release.frames(
        columns=["state", "action", "views"], episodes=release.episodes(columns=["episode_uid"]).column(0).to_pylist()
    )
    wanted = [0, 1, 59, 60, frames.num_rows // 2, frames.num_rows - 1]
    seen = read_with_lerobot(lerobot, tmp_path / "v30", *wanted)
    assert (seen["num_episodes"], seen["num_frames"], seen["fps"]) == (6, release.num_frames, 30)
    by_index = {sample["index"]: sample for sample in seen["samples"]}
    for index in wanted:
        row = frames.slice(index, 1).to_pylist()[0]
        assert np.array_equal(np.float32(by_index[index]["state"]), np.float32(row["state"]))
        assert np.array_equal(np.float32(by_index[index]["action"]), np.float32(row["action"]))
        mean = next(iter(by_index[index]["view_mean"].values()))
        assert abs(mean - decode_jpeg(row["views"][0]).mean() / 255) < 0.01
