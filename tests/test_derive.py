"""Tests of ingest/derive.py and jobs/derive.py: another resolution from the lake's own videos."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from support import VIDEO, Made, ingest, last_json, make_v21, run_module

from ingest.video_writer import encode_video
from jobs.derive import Config, run
from jobs.derive import main as derive_main
from lake import Lake
from lake.errors import LakeNotFoundError
from lake.images import decode_jpeg, fitted_size, rgb_of_frame
from lake.tables import open_table

pytestmark = pytest.mark.usefixtures("ray")

SMALL, LARGE = 32, 160
VIEWS = ("top", "wrist")


def derive(lake: object, resolution: int) -> dict[str, Any]:
    return run(Config(lake=str(lake), resolution=resolution))


def make_large(root: Path, num_episodes: int) -> Path:
    """Write a source whose pictures are larger than both resolutions."""
    make_v21(root, [Made(seed=i, num_frames=70 if i == 1 else 12) for i in range(num_episodes)], views=VIEWS)
    for index in range(num_episodes):
        for at, view in enumerate(VIEWS):
            y, x = np.mgrid[:240, :320]
            pictures = [
                np.stack([(x + 3 * n) % 256, (y + 40 * at) % 256, np.full_like(x, 20 * index)], -1).astype(np.uint8)
                for n in range(70 if index == 1 else 12)
            ]
            encode_video(pictures, root / VIDEO.format(view, index), fps=10)
    return root


@dataclass(frozen=True)
class Case:
    lake: Lake
    first: str
    """The release before anything was derived."""
    result: dict[str, Any]
    pictures: dict[tuple[int, str], list[np.ndarray]]
    """What the source's videos decode to at the large resolution."""


@pytest.fixture(scope="module")
def derived(tmp_path_factory: pytest.TempPathFactory, ray: object) -> Case:
    folder = tmp_path_factory.mktemp("derive")
    source = make_large(folder / "toy", 3)
    first = ingest(source, folder / "lake", resolution=SMALL)["release"]
    pictures = {}
    for index in range(3):
        for view in VIEWS:
            with av.open(str(source / VIDEO.format(view, index))) as container:
                pictures[index, view] = [rgb_of_frame(frame, LARGE) for frame in container.decode(video=0)]
    shutil.rmtree(source)
    return Case(Lake(str(folder / "lake")), first, derive(folder / "lake", LARGE), pictures)


def test_the_result_says_what_was_done(derived: Case) -> None:
    assert derived.result == {
        "lake": derived.lake.uri,
        "table": f"frames_{LARGE}",
        "episodes": 3,
        "release": derived.lake.release().name,
        "seconds": derived.result["seconds"],
    }
    assert derived.result["seconds"] > 0
    assert derived.result["release"] != derived.first


def test_pictures_are_those_of_the_source_at_that_resolution(derived: Case) -> None:
    release = derived.lake.release()
    for row in release.episodes(columns=["episode_uid", "source_index", "views"]).to_pylist():
        stored = release.frames(episodes=[row["episode_uid"]], resolution=LARGE).column("views").to_pylist()
        for at, view in enumerate(row["views"]):
            expected = derived.pictures[row["source_index"], view]
            assert len(stored) == len(expected)
            for views, rgb in zip(stored, expected, strict=True):
                picture = decode_jpeg(views[at])
                assert picture.shape == (120, 160, 3)
                assert np.abs(picture.astype(int) - rgb).mean() < 3


def test_all_else_is_as_in_the_frames_ingested(derived: Case) -> None:
    release = derived.lake.release()
    columns = ["episode_uid", "frame_index", "timestamp_s", "state", "action", "task_index"]
    order = [(name, "ascending") for name in columns[:2]]
    there, here = (release.frames(columns=columns, resolution=size).sort_by(order) for size in (LARGE, None))
    assert there.equals(here)
    assert there.num_rows == 12 + 70 + 12
    small = release.frames(columns=["views"]).column(0)[0].as_py()[0]
    assert decode_jpeg(small).shape == (24, 32, 3)


@pytest.mark.filterwarnings("ignore:DataFile.path:DeprecationWarning")
def test_every_way_of_reading_knows_the_resolution(derived: Case) -> None:
    release = derived.lake.release()
    assert sum(batch.num_rows for batch in release.scan(resolution=LARGE, batch_rows=7)) == 94
    assert release.dataset("frame_index = 69", ["frame_index"], resolution=LARGE).take_all() == [{"frame_index": 69}]
    chosen = release.frames("frame_index = 0", ["views"], resolution=LARGE).column(0).to_pylist()
    assert [decode_jpeg(views[1]).shape for views in chosen] == [(120, 160, 3)] * 3


def test_a_release_from_before_does_not_have_it(derived: Case) -> None:
    old = derived.lake.release(derived.first)
    assert old.frames(columns=["frame_index"]).num_rows == 94
    says = f"release {derived.first} has no table frames_{LARGE}; it has derived, episodes, frames, quarantine, "
    with pytest.raises(ValueError, match=says):
        old.frames(resolution=LARGE)


def test_deriving_again_changes_nothing(derived: Case) -> None:
    versions = derived.lake.release().versions
    again = derive(derived.lake.uri, LARGE)
    assert (again["episodes"], again["release"]) == (0, derived.result["release"])
    assert open_table(derived.lake.storage, f"frames_{LARGE}").version == versions[f"frames_{LARGE}"]
    assert len(derived.lake.releases()) == 2


def test_the_lake_stays_whole(derived: Case) -> None:
    assert list(derived.lake.verify()) == []
    assert derived.lake.make_release().name == derived.result["release"]


def test_only_new_episodes_are_derived_the_second_time(tmp_path: Path) -> None:
    ingest(make_v21(tmp_path / "toy", [Made(seed=i) for i in range(2)]), tmp_path / "lake", resolution=SMALL)
    first = derive(tmp_path / "lake", 48)
    lake = Lake(str(tmp_path / "lake"))
    old = lake.release()
    before = old.frames(resolution=48)
    ingest(make_v21(tmp_path / "toy", [Made(seed=i) for i in range(3)]), tmp_path / "lake", resolution=SMALL)
    between = lake.release()
    assert between.num_episodes == 3
    assert between.frames(columns=["frame_index"], resolution=48).num_rows == 24, "the new one is not derived yet"
    second = derive(tmp_path / "lake", 48)
    assert (first["episodes"], second["episodes"]) == (2, 1)
    release = lake.release()
    assert release.frames(resolution=48).num_rows == release.frames().num_rows == 36
    assert lake.release(old.name).frames(resolution=48).equals(before)
    assert list(lake.verify()) == []


def test_small_videos_are_not_enlarged(tmp_path: Path) -> None:
    ingest(make_v21(tmp_path / "toy", [Made(seed=1)]), tmp_path / "lake", resolution=SMALL)
    derive(tmp_path / "lake", 448)
    views = Lake(str(tmp_path / "lake")).release().frames(columns=["views"], resolution=448).column(0)[0].as_py()
    assert fitted_size(64, 48, 448) == (64, 48)
    assert decode_jpeg(views[0]).shape == (48, 64, 3)


def test_several_resolutions_stand_side_by_side(tmp_path: Path) -> None:
    ingest(make_v21(tmp_path / "toy", [Made(seed=1)], views=()), tmp_path / "blind", resolution=SMALL)
    derive(tmp_path / "blind", 48)
    blind = Lake(str(tmp_path / "blind")).release()
    assert blind.frames(columns=["views"], resolution=48).column(0).to_pylist() == [[]] * 12
    ingest(make_v21(tmp_path / "seeing", [Made(seed=1)]), tmp_path / "lake", resolution=SMALL)
    names = [derive(tmp_path / "lake", size)["release"] for size in (16, 48)]
    assert len(set(names)) == 2
    release = Lake(str(tmp_path / "lake")).release()
    sides = [
        max(decode_jpeg(release.frames(columns=["views"], resolution=size).column(0)[0].as_py()[0]).shape)
        for size in (16, None, 48)
    ]
    assert sides == [16, 32, 48]


def test_damage_to_derived_frames_is_found(tmp_path: Path) -> None:
    ingest(make_v21(tmp_path / "toy", [Made(seed=i) for i in range(2)]), tmp_path / "lake", resolution=SMALL)
    derive(tmp_path / "lake", 48)
    lake = Lake(str(tmp_path / "lake"))
    uid = lake.release().episodes(columns=["episode_uid"]).column(0)[1].as_py()
    open_table(lake.storage, "frames_48").delete(f"episode_uid = '{uid}' AND frame_index = 5")
    [problem] = lake.verify()
    assert (problem.episode_uid, problem.table) == (uid, "frames_48")
    assert "1 of 12 rows are gone" in problem.message


def test_cleanup_keeps_derived_frames_of_old_releases(tmp_path: Path) -> None:
    from datetime import timedelta

    ingest(make_v21(tmp_path / "toy", [Made(seed=1)]), tmp_path / "lake", resolution=SMALL)
    derive(tmp_path / "lake", 48)
    lake = Lake(str(tmp_path / "lake"))
    old = lake.release()
    before = old.frames(resolution=48)
    ingest(make_v21(tmp_path / "toy", [Made(seed=1), Made(seed=2)]), tmp_path / "lake", resolution=SMALL)
    derive(tmp_path / "lake", 48)
    open_table(lake.storage, "frames_48").optimize.compact_files()
    lake.cleanup(older_than=timedelta(0))
    assert lake.release(old.name).frames(resolution=48).equals(before)
    assert lake.release().frames(resolution=48).num_rows == 24


def test_a_resolution_below_16_or_a_lake_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resolution=15 is less than 16 pixels"):
        derive(tmp_path / "lake", 15)
    with pytest.raises(LakeNotFoundError):
        derive(tmp_path / "lake", 16)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_lake_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Lake.create(str(tmp_path / "lake"))
    monkeypatch.setattr("sys.argv", ["derive", "--lake", str(tmp_path / "lake"), "--resolution", "48"])
    with pytest.raises(SystemExit) as caught:
        derive_main()
    assert caught.value.code == 1
    assert "ingest something" in capsys.readouterr().err


def test_the_command_line_ends_in_one_json_line(tmp_path: Path) -> None:
    ingest(make_v21(tmp_path / "toy", [Made(seed=1)]), tmp_path / "lake", resolution=SMALL)
    done = run_module("jobs.derive", "--lake", tmp_path / "lake", "--resolution", 48, "--num-cpus", 1)
    assert done.returncode == 0, done.stderr
    result = last_json(done.stdout)
    assert list(result) == ["lake", "table", "episodes", "release", "seconds", "config"]
    assert (result["table"], result["episodes"]) == ("frames_48", 1)
    assert result["config"] == {"lake": str(tmp_path / "lake"), "resolution": 48, "num_cpus": 1}
    assert "derive: 1 of 1 episodes" in done.stderr
