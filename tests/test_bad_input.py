"""Bad episodes: each ends in quarantine with its own reason, and nothing else is lost."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import (
    BAD,
    DATA_V3,
    EPISODES,
    GOOD,
    LFS,
    LISTED_V3,
    NUM_FRAMES,
    PLACE,
    TASKS_V3,
    TIMES,
    Damage,
    at_data,
    at_data_v3,
    at_video,
    at_video_v3,
    blank_packets,
    cells,
    change,
    cut,
    drop,
    listed,
    make_folder,
    make_v30,
    moov_last,
    opened,
    place,
    put,
    remove,
    rows,
    set_cell,
    set_column,
    video_of,
    with_column,
    without_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DATA, VIDEO, Made, ingest, make_v21

from ingest.task import PlannedEpisode, Profile, digest_episode, write_task
from ingest.validate import ACCEPTABLE, REASONS
from lake import Lake
from lake.commit import commit
from lake.errors import (
    EpisodeError,
    SourceError,
    SourceTooBadError,
)
from lake.images import decode_jpeg


def check_others_are_whole(result: dict[str, Any], reason: str, says: str) -> Lake:
    """Check that one episode is in quarantine for a reason, and that the others are committed, right and readable."""
    assert (result["discovered"], result["committed"], result["quarantined"]) == (3, 2, 1)
    lake = Lake(result["lake"])
    [bad] = lake.quarantine().to_pylist()
    assert (bad["source_index"], bad["reason"]) == (BAD, reason), bad["message"]
    assert re.search(says, bad["message"]), bad["message"]
    assert list(lake.verify()) == []
    release = lake.release(result["release"])
    episodes = release.episodes(columns=["episode_uid", "source_index", "num_frames"]).to_pylist()
    assert [episode["source_index"] for episode in episodes] == GOOD
    assert release.frames().num_rows == len(GOOD) * NUM_FRAMES
    for episode in episodes:
        frames = release.frames(episodes=[episode["episode_uid"]])
        rng = np.random.default_rng(EPISODES[episode["source_index"]].seed)
        state = rng.normal(size=(NUM_FRAMES, 3)).astype(np.float32)
        assert np.array_equal(np.array(frames.column("state").to_pylist(), np.float32), state)
        assert all(decode_jpeg(views[0]).shape == (48, 64, 3) for views in frames.column("views").to_pylist())
        assert release.video(episode["episode_uid"], "top")
    return lake


NAN, INF = float("nan"), float("inf")
V21: list[tuple[str, str, str, Damage]] = [
    ("video missing", "video-missing", r"episode_000001\.mp4 is not there", remove(at_video)),
    ("folder in place of a video", "video-missing", r"episode_000001\.mp4 is not there", make_folder(at_video)),
    ("video of no bytes", "video-empty", r"episode_000001\.mp4 has no bytes", put(at_video, b"")),
    ("video is an LFS pointer", "lfs-pointer", r"episode_000001\.mp4 .*`git lfs pull`", put(at_video, LFS)),
    ("video of 5 bytes", "video-truncated", "has 5 bytes", put(at_video, b"\0\0\0\x20f")),
    ("video cut in its head", "video-truncated", "inside the box", cut(at_video, 0.01)),
    ("video cut in its index", "video-truncated", r"inside the box b'moov'", cut(at_video, 0.1)),
    ("video cut early in its packets", "video-truncated", r"inside the box b'mdat'", cut(at_video, 0.4)),
    ("video cut late in its packets", "video-truncated", r"inside the box b'mdat'", cut(at_video, 0.9)),
    ("video without its last byte", "video-truncated", "inside the box", cut(at_video, -1)),
    ("video without its index", "video-truncated", r"no index \(moov\).*copy or download it again", moov_last),
    ("text in place of a video", "video-undecodable", "is no mp4", put(at_video, b"hello " * 99)),
    ("video of blank packets", "video-undecodable", "frame|packet|breaks", blank_packets),
    ("video with a frame less", "video-frame-count", "has 11 frames, the columns have 12", put(at_video, b"")),
    ("video with a frame more", "video-frame-count", "has 13 frames, the columns have 12", put(at_video, b"")),
    ("video of a codec nobody uses", "unknown-codec", "holds mjpeg, not", put(at_video, b"")),
    ("video larger than cameras", "video-too-large", r"16400 x 16 pixels; the limits are", put(at_video, b"")),
    ("black video", "black-video", r"view top: no frame is brighter than 4", put(at_video, b"")),
    ("frozen video", "frozen-video", r"view top: all frames differ by less than 0\.5", put(at_video, b"")),
    ("data missing", "data-missing", r"episode_000001\.parquet is not there", remove(at_data)),
    ("folder in place of data", "data-missing", r"episode_000001\.parquet is not there", make_folder(at_data)),
    ("data of no bytes", "data-empty", r"episode_000001\.parquet has no bytes", put(at_data, b"")),
    ("data is an LFS pointer", "lfs-pointer", r"episode_000001\.parquet .*`git lfs pull`", put(at_data, LFS)),
    ("text in place of data", "data-unreadable", r"episode_000001\.parquet: Parquet", put(at_data, b"a,b\n1,2\n" * 9)),
    ("data of nonsense", "data-unreadable", r"\.parquet: ", put(at_data, b"PAR1" + b"x" * 99 + b"PAR1")),
    ("data cut in the middle", "data-unreadable", r"magic bytes not found", cut(at_data, 0.5)),
    ("data without its last byte", "data-unreadable", r"magic bytes not found", cut(at_data, -1)),
    ("no action column", "column-missing", "lacks action; it has observation.state, ", drop("action")),
    ("two state columns", "data-unreadable", "several columns named observation.state", change(
        lambda table: table.append_column("observation.state", table.column("observation.state"))
    )),
    ("state of too many values", "wrong-shape", "observation.state has 4 values a row, the metadata says 3", (
        set_column("observation.state", [[0.0] * 4] * NUM_FRAMES)
    )),
    ("action of a single value", "wrong-shape", "action has 1 values a row, the metadata says 2", (
        set_column("action", [0.5] * NUM_FRAMES)
    )),
    ("ragged action", "wrong-shape", r"action has rows of \[2, 3\] values", set_cell("action", 3, [1.0, 2.0, 3.0])),
    ("action without a value", "wrong-shape", "action has 1 rows without a value", set_cell("action", 5, None)),
    ("action of text", "wrong-shape", "action holds string", set_column("action", ["left"] * NUM_FRAMES)),
    ("action of nulls", "wrong-shape", "action holds null", set_column("action", pa.nulls(NUM_FRAMES))),
    ("null in an action", "not-finite", "action has 1 missing values", set_cell("action", 5, [1.0, None])),
    ("NaN in the state", "not-finite", r"state is .*nan.* at frame 7", set_cell("observation.state", 7, NAN)),
    ("infinity in the action", "not-finite", r"action is .*inf.* at frame 2", set_cell("action", 2, -INF)),
    ("action beyond float32", "not-finite", r"action is .*inf.* at frame 0", (
        set_column("action", pa.array([[1e300, 0.0]] * NUM_FRAMES, pa.list_(pa.float64())))
    )),
    ("time is NaN", "not-finite", r"time is .*nan.* at frame 4", set_cell("timestamp", 4, NAN)),
    ("time is null", "not-finite", "timestamp has 1 missing values", set_cell("timestamp", 4, None)),
    ("time runs backwards", "timestamps-not-monotone", r"from 0\.4 s to 0\.05 s at frame 5", (
        set_column("timestamp", [*TIMES[:5], 0.05, *TIMES[6:]])
    )),
    ("time stands still", "timestamps-not-monotone", r"from 0\.4 s to 0\.4 s at frame 5", (
        set_column("timestamp", [*TIMES[:5], TIMES[4], *TIMES[6:]])
    )),
    ("two times a frame", "wrong-shape", "timestamp has 2 values a row", (
        set_column("timestamp", [[t, t] for t in TIMES])
    )),
    ("a row less than the metadata says", "frame-count", "have 11 frames, the metadata says 12", rows(0, 11)),
    ("metadata says a row more", "frame-count", "have 12 frames, the metadata says 13", listed(length=13)),
    ("metadata says an absurd length", "frame-count", "have 12 frames, the metadata says", listed(length=10**30)),
    ("no rows", "empty-episode", "has no frames", rows(0, 0)),
    ("no rows, and the metadata agrees", "empty-episode", "has no frames", (
        lambda root: (rows(0, 0)(root), listed(length=0)(root))
    )),
    ("task that is not listed", "task-unknown", r"task_index \[7\]", set_column("task_index", [7] * NUM_FRAMES)),
    ("one frame of a task that is not listed", "task-unknown", r"task_index \[-1\]", set_cell("task_index", 6, -1)),
    ("task is null", "not-finite", "task_index has 1 missing values", set_cell("task_index", 6, None)),
]  # fmt: skip
VIDEOS = {
    "video with a frame less": ("moving", 11),
    "video with a frame more": ("moving", 13),
    "video of a codec nobody uses": ("mjpeg", NUM_FRAMES),
    "video larger than cameras": ("wide", 1),
    "black video": ("black", NUM_FRAMES),
    "frozen video": ("frozen", NUM_FRAMES),
}


@pytest.mark.parametrize(("name", "reason", "says", "damage"), V21, ids=[case[0] for case in V21])
@pytest.mark.usefixtures("ray")
def test_a_bad_episode_of_v21_is_set_aside(tmp_path: Path, name: str, reason: str, says: str, damage: Damage) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    damage(source)
    if name in VIDEOS:
        at_video(source).write_bytes(video_of(*VIDEOS[name]))
    check_others_are_whole(ingest(source, tmp_path / "lake"), reason, says)


@pytest.mark.parametrize("content", [b"", video_of("frozen")], ids=["seen without decoding", "seen by decoding"])
@pytest.mark.usefixtures("ray")
def test_a_bad_episode_is_not_read_again(tmp_path: Path, content: bytes) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    at_video(source).write_bytes(content)
    ingest(source, tmp_path / "lake")
    again = ingest(source, tmp_path / "lake")
    assert (again["committed"], again["skipped"], again["quarantined"], again["quarantined_new"]) == (0, 2, 1, 0)
    assert "decode" not in again["phases_s"]


@pytest.mark.parametrize(
    ("kind", "accept", "reason"),
    [
        ("black", ("black-video",), None),
        ("frozen", ("frozen-video",), None),
        ("black", ("frozen-video",), "black-video"),
        ("frozen", ("black-video",), "frozen-video"),
    ],
)
@pytest.mark.usefixtures("ray")
def test_suspicious_videos_can_be_accepted(
    tmp_path: Path, kind: str, accept: tuple[str, ...], reason: str | None
) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    at_video(source).write_bytes(video_of(kind))
    result = ingest(source, tmp_path / "lake", accept=accept)
    if reason:
        check_others_are_whole(result, reason, "view top")
    else:
        assert (result["committed"], result["quarantined"]) == (3, 0)
        assert list(Lake(result["lake"]).verify()) == []


def test_an_episode_that_changes_between_plan_and_read_is_set_aside(tmp_path: Path) -> None:
    root = make_v21(tmp_path / "toy", EPISODES)
    source, refs = opened(root)
    planned = [PlannedEpisode(ref=r, content_digest=digest_episode(source, r), ordinal=0) for r in refs]
    set_cell("action", 3, 0.5)(root)
    lake = Lake.create(str(tmp_path / "lake"))
    result = write_task(lake.storage, source, Profile(source_name="toy"), "attempt", 0, planned)
    assert [(r.source_index, r.reason) for r in result.rejected] == [(BAD, "source-changed")]
    assert commit(lake.storage, "toy", [result]).episodes == 2
    assert list(lake.verify()) == []
    assert lake.make_release().episodes(columns=["source_index"]).column(0).to_pylist() == GOOD


def test_every_reason_is_brought_about_here() -> None:
    assert {reason for _, reason, _, _ in [*V21, *V30_FILES, *V30_SHARED]} | {"source-changed"} == set(REASONS)
    assert set(ACCEPTABLE) < set(REASONS)


@pytest.mark.usefixtures("ray")
def test_bad_episodes_are_set_aside_on_an_object_store(tmp_path: Path, bucket: str) -> None:
    import s3fs

    source = make_v21(tmp_path / "toy", [Made(seed=i) for i in range(10)])
    videos = {1: b"", 2: LFS, 4: (source / VIDEO.format("top", 4)).read_bytes()[:-1], 5: b"hello " * 99}
    for index, content in videos.items():
        (source / VIDEO.format("top", index)).write_bytes(content)
    (source / DATA.format(6)).write_bytes(b"")
    (source / DATA.format(7)).write_bytes(LFS)
    (source / DATA.format(8)).write_bytes((source / DATA.format(8)).read_bytes()[:-9])
    (source / VIDEO.format("top", 9)).unlink()
    s3fs.S3FileSystem(use_listings_cache=False).put(str(source), f"{bucket}/toy", recursive=True)
    result = ingest(f"{bucket}/toy", f"{bucket}/lake", max_bad_fraction=0.9)
    assert (result["committed"], result["quarantined"]) == (2, 8)
    lake = Lake(f"{bucket}/lake")
    assert {row["source_index"]: row["reason"] for row in lake.quarantine().to_pylist()} == {
        1: "video-empty",
        2: "lfs-pointer",
        4: "video-truncated",
        5: "video-undecodable",
        6: "data-empty",
        7: "lfs-pointer",
        8: "data-unreadable",
        9: "video-missing",
    }
    assert lake.release().episodes(columns=["source_index"]).column(0).to_pylist() == [0, 3]
    assert list(lake.verify()) == []


V30_FILES: list[tuple[str, str, str, Damage]] = [
    ("video missing", "video-missing", r"file-001\.mp4 is not there", remove(at_video_v3)),
    ("video of no bytes", "video-empty", r"file-001\.mp4 has no bytes", put(at_video_v3, b"")),
    ("video is an LFS pointer", "lfs-pointer", r"file-001\.mp4 is a Git LFS", put(at_video_v3, LFS)),
    ("video cut in the middle", "video-truncated", r"inside the box", cut(at_video_v3, 0.5)),
    ("video of another codec", "unknown-codec", "holds mjpeg", put(at_video_v3, video_of("mjpeg"))),
    ("black video", "black-video", "no frame is brighter", put(at_video_v3, video_of("black"))),
    ("data missing", "data-missing", r"file-001\.parquet is not there", remove(at_data_v3)),
    ("data of no bytes", "data-empty", r"file-001\.parquet has no bytes", put(at_data_v3, b"")),
    ("data is an LFS pointer", "lfs-pointer", r"file-001\.parquet is a Git LFS", put(at_data_v3, LFS)),
    ("data cut in the middle", "data-unreadable", "magic bytes", cut(at_data_v3, 0.5)),
    ("no episode_index", "column-missing", "file-001.parquet lacks episode_index", (
        lambda root: pq.write_table(pq.read_table(at_data_v3(root)).drop_columns(["episode_index"]), at_data_v3(root))
    )),
    ("episode_index of text", "wrong-shape", "episode_index holds", (
        lambda root: pq.write_table(
            with_column(pq.read_table(at_data_v3(root)), "episode_index", ["1"] * NUM_FRAMES), at_data_v3(root)
        )
    )),
]  # fmt: skip
V30_SHARED: list[tuple[str, str, str, Damage]] = [
    ("video said to be in a file that is not there", "video-missing", "file-007.mp4", place(f"{PLACE}file_index", 7)),
    ("video said to be nowhere", "video-missing", "view top", place(f"{PLACE}file_index", None)),
    ("video of no time", "video-missing", "view top", place(f"{PLACE}to_timestamp", None)),
    ("video that ends before it begins", "video-frame-count", "from 5.0 to 2.4", place(f"{PLACE}from_timestamp", 5.0)),
    ("video that begins before the file", "video-frame-count", "from -1.0 to", place(f"{PLACE}from_timestamp", -1.0)),
    ("video until infinity", "video-frame-count", "to inf s", place(f"{PLACE}to_timestamp", INF)),
    ("video until NaN", "video-frame-count", "to nan s", place(f"{PLACE}to_timestamp", NAN)),
    ("video beyond the file", "video-frame-count", "top has 24 frames", place(f"{PLACE}to_timestamp", 1e8)),
    ("video longer than the columns", "video-frame-count", "has 14 frames", place(f"{PLACE}to_timestamp", 2.6)),
    ("data said to be in a file that is not there", "data-missing", "file-007", place("data/file_index", 7)),
    ("data said to be nowhere", "data-missing", "does not say", place("data/file_index", None)),
    ("metadata says a row more", "frame-count", "metadata says 13", place("length", 13)),
    ("no rows", "empty-episode", "no frames", without_rows),
    ("NaN", "not-finite", "state is", cells("observation.state", [0.0, NAN, 0.0])),
    ("ragged", "wrong-shape", "action has 1 values", cells("action", [0.0])),
    ("time stands still", "timestamps-not-monotone", "at frame 1", cells("timestamp", 0.5)),
    ("task that is not listed", "task-unknown", r"\[7\]", cells("task_index", 7)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "reason", "says", "damage"), V30_FILES, ids=[case[0] for case in V30_FILES])
@pytest.mark.usefixtures("ray")
def test_a_bad_file_of_v30_is_set_aside(tmp_path: Path, name: str, reason: str, says: str, damage: Damage) -> None:
    source = make_v30(tmp_path / "toy", files=True)
    damage(source)
    check_others_are_whole(ingest(source, tmp_path / "lake"), reason, says)


@pytest.mark.parametrize(("name", "reason", "says", "damage"), V30_SHARED, ids=[case[0] for case in V30_SHARED])
@pytest.mark.usefixtures("ray")
def test_a_bad_part_of_a_shared_file_is_set_aside(
    tmp_path: Path, name: str, reason: str, says: str, damage: Damage
) -> None:
    source = make_v30(tmp_path / "toy")
    damage(source)
    check_others_are_whole(ingest(source, tmp_path / "lake"), reason, says)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_v21(tmp_path_factory.mktemp("v21") / "toy", EPISODES[:1], splits={"train": "0:1"})


@pytest.fixture(scope="module")
def toy_v30(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_v30(tmp_path_factory.mktemp("fuzz") / "toy")


flips = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3)


def read_flipped(root: Path, name: str, where: list[tuple[float, int]]) -> None:
    """Flip bits of a file and read the source; what is wrong with it must come out as one of our errors."""
    kept = (root / name).read_bytes()
    content = bytearray(kept)
    for share, mask in where:
        content[int(share * (len(content) - 1))] ^= mask
    (root / name).write_bytes(content)
    try:
        source, refs = opened(root)
        for ref in refs:
            try:
                digest_episode(source, ref)
            except EpisodeError as error:
                assert error.reason in REASONS  # noqa: PT017
    except SourceError as error:
        assert str(error).startswith(str(root))  # noqa: PT017
    finally:
        (root / name).write_bytes(kept)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(where=flips)
def test_whatever_happens_to_the_bytes_of_a_data_file_it_is_read_or_set_aside(
    toy: Path, where: list[tuple[float, int]]
) -> None:
    read_flipped(toy, DATA.format(0), where)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(name=st.sampled_from([DATA_V3.format(0), LISTED_V3, TASKS_V3]), where=flips)
def test_whatever_happens_to_the_bytes_of_v30_files_they_are_read_or_set_aside(
    toy_v30: Path, name: str, where: list[tuple[float, int]]
) -> None:
    read_flipped(toy_v30, name, where)


# A source that is too bad, and a lake that cannot take it.


@pytest.mark.parametrize("content", [b"", video_of("frozen")], ids=["seen without decoding", "seen by decoding"])
@pytest.mark.usefixtures("ray")
def test_a_source_that_is_too_bad_is_not_released(tmp_path: Path, content: bytes) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    for index in (0, 2):
        (source / VIDEO.format("top", index)).write_bytes(content)
    says = (
        r"2 of 3 episodes of .*/toy are bad \(2 \w+-\w+\), more than max_bad_fraction=0\.5 allows\. See `python -m lake"
    )
    with pytest.raises(SourceTooBadError, match=says):
        ingest(source, tmp_path / "lake")
    lake = Lake(str(tmp_path / "lake"))
    assert lake.releases() == []
    assert lake.quarantine().column("source_index").to_pylist() == [0, 2]
    with pytest.raises(SourceTooBadError):
        ingest(source, tmp_path / "lake")
    result = ingest(source, tmp_path / "lake", max_bad_fraction=0.7)
    assert lake.release().name == result["release"]
    assert lake.release().episodes(columns=["source_index"]).column(0).to_pylist() == [1]
    assert list(lake.verify()) == []


@pytest.mark.usefixtures("ray")
def test_a_source_without_a_good_episode_makes_no_release(tmp_path: Path) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    shutil.rmtree(source / "videos")
    result = ingest(source, tmp_path / "lake", max_bad_fraction=1.0)
    assert (result["committed"], result["quarantined"], result["release"]) == (0, 3, None)
    assert Lake(str(tmp_path / "lake")).releases() == []
