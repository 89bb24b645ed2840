"""Bad input: every bad episode ends in quarantine with its own reason, and nothing else is lost."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import DATA, VIDEO, Made, ingest, make_v21

from ingest.features import parse_map
from ingest.files import open_files
from ingest.formats import format_of, open_source
from ingest.lerobot_files import FileLimits
from ingest.lerobot_writer import Column, DatasetSpec, LeRobotWriter
from ingest.source import EpisodeRef
from ingest.task import PlannedEpisode, Profile, digest_episode, write_task
from ingest.validate import ACCEPTABLE, REASONS
from ingest.video_writer import encode_video
from jobs.ingest import Config, run
from jobs.ingest import main as ingest_main
from lake import Lake
from lake.commit import commit
from lake.errors import (
    EpisodeError,
    LakeTooNewError,
    SourceError,
    SourceMetadataError,
    SourceNotFoundError,
    SourceTooBadError,
    SourceVersionError,
    StoreUnreachableError,
)
from lake.images import decode_jpeg

EPISODES = [Made(seed=i) for i in range(3)]
NUM_FRAMES = EPISODES[0].num_frames
BAD = 1
GOOD = [0, 2]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
INFO, LISTED, TASKS = "meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl"
DATA_V3, VIDEO_V3 = "data/chunk-000/file-00{}.parquet", "videos/observation.images.top/chunk-000/file-00{}.mp4"
LISTED_V3, TASKS_V3 = "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"
PLACE = "videos/observation.images.top/"

Damage = Callable[[Path], object]


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


# LeRobot v2.1: one file an episode.


def at_data(root: Path) -> Path:
    return root / DATA.format(BAD)


def at_video(root: Path) -> Path:
    return root / VIDEO.format("top", BAD)


def put(path: Callable[[Path], Path], content: bytes) -> Damage:
    return lambda root: path(root).write_bytes(content)


def cut(path: Callable[[Path], Path], where: float) -> Damage:
    """Keep a share of a file, or all but some of its last bytes where ``where`` is negative."""

    def damage(root: Path) -> None:
        content = path(root).read_bytes()
        path(root).write_bytes(content[: int(where) if where < 0 else int(where * len(content))])

    return damage


def remove(path: Callable[[Path], Path]) -> Damage:
    return lambda root: path(root).unlink()


def make_folder(path: Callable[[Path], Path]) -> Damage:
    return lambda root: (path(root).unlink(), path(root).mkdir())


def change(edit: Callable[[pa.Table], pa.Table]) -> Damage:
    return lambda root: pq.write_table(edit(pq.read_table(at_data(root))), at_data(root))


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    return table.set_column(table.schema.get_field_index(name), name, array)


def set_column(name: str, values: Any) -> Damage:
    return change(lambda table: with_column(table, name, values))


def set_cell(name: str, frame: int, value: Any) -> Damage:
    """Replace a column's value at a frame, or one number of its list."""

    def edit(table: pa.Table) -> pa.Table:
        values = table.column(name).to_pylist()
        if isinstance(values[frame], list) and not isinstance(value, list) and value is not None:
            values[frame][-1] = value
        else:
            values[frame] = value
        kind = table.column(name).type
        return with_column(table, name, pa.array(values, pa.list_(pa.float32()) if pa.types.is_list(kind) else None))

    return change(edit)


def drop(*names: str) -> Damage:
    return change(lambda table: table.drop_columns(list(names)))


def rows(first: int, end: int) -> Damage:
    return change(lambda table: table.slice(first, end - first))


def edit_lines(root: Path, name: str, edit: Callable[[list[dict[str, Any]]], object]) -> None:
    records = [json.loads(line) for line in (root / name).read_text().splitlines()]
    edit(records)
    (root / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def listed(**fields: Any) -> Damage:
    return lambda root: edit_lines(root, LISTED, lambda records: records[BAD].update(fields))


def edit_info(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    info = json.loads((root / INFO).read_text())
    edit(info)
    (root / INFO).write_text(json.dumps(info))


def set_info(**fields: Any) -> Damage:
    return lambda root: edit_info(root, lambda info: info.update(fields))


def set_feature(name: str, **spec: Any) -> Damage:
    return lambda root: edit_info(root, lambda info: info["features"].setdefault(name, {}).update(spec))


@cache
def video_of(kind: str, num_frames: int = NUM_FRAMES) -> bytes:
    """Return a video that is wrong in some way."""
    import tempfile

    size = (16, 16_400) if kind == "wide" else (48, 64)
    pictures = [np.full((*size, 3), 2 if kind == "black" else 120, np.uint8) for _ in range(num_frames)]
    if kind == "moving" or kind in ("mpeg4", "mjpeg"):
        for i, picture in enumerate(pictures):
            picture[:, 4 * i : 4 * i + 8] = 255
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        if kind in ("black", "frozen", "moving"):
            encode_video(pictures, path, fps=10)
        else:
            encode_with({"wide": "libvpx-vp9"}.get(kind, kind), pictures, path)
        return path.read_bytes()


def encode_with(encoder: str, pictures: list[np.ndarray], path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def blank_packets(root: Path) -> None:
    """Overwrite what is behind the index with zeros: the file's structure stays right."""
    content = at_video(root).read_bytes()
    begin = content.index(b"mdat") + 4 + 700
    at_video(root).write_bytes(content[:begin] + bytes(len(content) - begin))


def moov_last(root: Path) -> None:
    """Write the video with its index at the end, then lose that end."""
    with av.open(str(at_video(root))) as old, av.open(str(root / "moov_last.mp4"), "w", format="mp4") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    content = (root / "moov_last.mp4").read_bytes()
    assert content.index(b"moov") > content.index(b"mdat")
    at_video(root).write_bytes(content[: content.index(b"moov") - 4])


NAN, INF = float("nan"), float("inf")
TIMES = [i / 10 for i in range(NUM_FRAMES)]
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


# LeRobot v3.0: many episodes a file.


def make_v30(root: Path, *, files: bool = False) -> Path:
    """Write the episodes as v3.0.

    Args:
        files: one data file and one video file for each episode.
    """
    spec = DatasetSpec(
        fps=10,
        robot_type="toy",
        columns={"observation.state": Column(size=3), "action": Column(size=2)},
        views=("observation.images.top",),
    )
    v21 = make_v21(root.with_name("v21"), EPISODES)
    with LeRobotWriter(root, spec=spec, limits=FileLimits(data_bytes=1, video_bytes=1) if files else None) as writer:
        for index, episode in enumerate(EPISODES):
            table = pq.read_table(v21 / DATA.format(index))
            columns = {
                name: np.array(table.column(name).to_pylist(), np.float32) for name in ("observation.state", "action")
            }
            view = v21 / VIDEO.format("top", index)
            writer.add_episode(columns, tasks=episode.task, views={"observation.images.top": view})
    return root


def place(column: str, value: Any) -> Damage:
    """Set what meta/episodes says of the bad episode."""

    def damage(root: Path) -> None:
        table = pq.read_table(root / LISTED_V3)
        values = table.column(column).to_pylist()
        values[BAD] = value
        kind = table.schema.field(column).type
        pq.write_table(with_column(table, column, pa.array(values, kind)), root / LISTED_V3)

    return damage


def cells(column: str, value: Any) -> Damage:
    """Set a column of the bad episode in the file of all."""

    def damage(root: Path) -> None:
        path = root / DATA_V3.format(0)
        table = pq.read_table(path)
        of = table.column("episode_index").to_pylist()
        values = [value if i == BAD else old for i, old in zip(of, table.column(column).to_pylist(), strict=True)]
        kind = table.schema.field(column).type
        kind = pa.list_(pa.float32()) if pa.types.is_fixed_size_list(kind) else kind
        pq.write_table(with_column(table, column, pa.array(values, kind)), path, row_group_size=NUM_FRAMES)

    return damage


def without_rows(root: Path) -> None:
    path = root / DATA_V3.format(0)
    table = pq.read_table(path)
    kept = [i != BAD for i in table.column("episode_index").to_pylist()]
    pq.write_table(table.filter(pa.array(kept)), path, row_group_size=NUM_FRAMES)


def at_data_v3(root: Path) -> Path:
    return root / DATA_V3.format(BAD)


def at_video_v3(root: Path) -> Path:
    return root / VIDEO_V3.format(BAD)


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
    ("video that ends before it begins", "video-frame-count", r"from 5\.0 to 2\.4 s", place(f"{PLACE}from_timestamp", 5.0)),
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


def opened(root: object, *feature_map: str) -> tuple[Any, list[EpisodeRef]]:
    """Open a source and list its episodes."""
    source = open_source(open_files(str(root)), parse_map(feature_map))
    return source, [ref for refs in format_of(source).discover(source) for ref in refs]


# Sources that cannot be ingested at all.


def text(name: str, content: str | bytes) -> Damage:
    return lambda root: (root / name).write_bytes(content.encode() if isinstance(content, str) else content)


def lines(name: str, *records: object) -> Damage:
    return text(name, "".join(json.dumps(record) + "\n" for record in records))


def nothing(root: Path) -> None:
    """Leave the source as it is."""


def template(key: str, value: str) -> Damage:
    return set_info(**{key: value})


Refusal = tuple[str, type[SourceError], str, Damage, tuple[str, ...]]
META = SourceMetadataError
OUT = "leads out of the source"
REFUSED_V21: list[Refusal] = [
    ("info.json of no bytes", META, r"toy: meta/info\.json is empty", text(INFO, ""), ()),
    ("info.json of blanks", META, r"meta/info\.json is empty", text(INFO, " \n\t "), ()),
    ("info.json cut", META, r"meta/info\.json is not valid JSON: .*line 1", text(INFO, '{"fps": 10,'), ()),
    ("info.json of no UTF-8", META, r"meta/info\.json is not valid JSON: 'utf-8'", text(INFO, b'{"a": "\xff"}'), ()),
    ("info.json of great depth", META, r"meta/info\.json is not valid JSON: max", text(INFO, "[" * 100_000), ()),
    ("info.json is a list", META, r"meta/info\.json holds a list, expected an object", text(INFO, "[]"), ()),
    ("info.json is null", META, r"meta/info\.json holds a NoneType", text(INFO, "null"), ()),
    ("info.json is an LFS pointer", META, r"info\.json is a Git LFS pointer; run `git lfs pull`", text(INFO, LFS), ()),
    ("no info.json", META, r"meta/info\.json is missing", lambda root: (root / INFO).unlink(), ()),
    ("no meta", META, r"meta/info\.json is missing", lambda root: shutil.rmtree(root / "meta"), ()),
    ("nothing but videos", META, r"no known format\. A LeRobot dataset has meta/info\.json", (
        lambda root: (shutil.rmtree(root / "meta"), shutil.rmtree(root / "data"))
    ), ()),
    ("no episodes.jsonl", META, r"meta/episodes\.jsonl is missing", lambda root: (root / LISTED).unlink(), ()),
    ("episodes.jsonl of no bytes", META, r"episodes\.jsonl lists no episode", text(LISTED, ""), ()),
    ("episodes.jsonl is an LFS pointer", META, r"episodes\.jsonl is a Git LFS pointer", text(LISTED, LFS), ()),
    ("episodes.jsonl breaks off", META, r"episodes\.jsonl line 2 is not valid JSON", (
        text(LISTED, '{"episode_index": 0, "length": 12}\n{"episode')
    ), ()),
    ("episodes.jsonl holds lists", META, r"episodes\.jsonl line 1 holds a list", lines(LISTED, [0, 12]), ()),
    ("episode without an index", META, "episode_index is None in {'length': 12}", lines(LISTED, {"length": 12}), ()),
    ("episode index of text", META, "episode_index is '0'", lines(LISTED, {"episode_index": "0"}), ()),
    ("episode twice", META, "lists episode 0 twice", lines(LISTED, {"episode_index": 0}, {"episode_index": 0}), ()),
    ("negative episode", META, "lists episode -1 ", lines(LISTED, {"episode_index": -1}), ()),
    ("episode beyond all numbers", META, "or too large", lines(LISTED, {"episode_index": 10**30}), ()),
    ("tasks.jsonl is not JSON", META, r"tasks\.jsonl line 1 is not valid JSON", text(TASKS, "push"), ()),
    ("task index of text", META, r"tasks\.jsonl: task_index is 'a'", lines(TASKS, {"task_index": "a"}), ()),
    ("version 1.6", SourceVersionError, r"LeRobot v1\.6 is not supported; v2\.0, v2\.1, v3\.0 are\. Convert it", (
        set_info(codebase_version="v1.6")
    ), ()),
    ("version 4.0", SourceVersionError, r"LeRobot v4\.0 is not supported", set_info(codebase_version="v4.0"), ()),
    ("no version", SourceVersionError, "is not supported", set_info(codebase_version=None), ()),
    ("version 3.0 in name only", META, "meta/episodes holds no parquet", set_info(codebase_version="v3.0"), ()),
    *((f"fps {fps}", META, f"has fps={fps!r}, expected a positive number", set_info(fps=fps), ())
      for fps in (0, -10, True, "10", None)),
    ("features is a list", META, "has no `features`", set_info(features=[]), ()),
    ("feature of text", META, "has no `features`", set_info(features={"action": "float32"}), ()),
    ("no features", META, "no action among .*--map action=FEATURE", set_info(features={}), ()),
    ("splits is a list", META, r"splits=\['train'\]", set_info(splits=["train"]), ()),
    ("chunks_size of text", META, "chunks_size='1000'", set_info(chunks_size="1000"), ()),
    ("no data_path", META, "has no data_path", set_info(data_path=None), ()),
    ("no video_path", META, "has no video_path", set_info(video_path=""), ()),
    ("data above the source", META, OUT, template("data_path", "../../etc/passwd"), ()),
    ("data beside the source", META, OUT, template("data_path", "data/../../{episode_index}.parquet"), ()),
    ("data at an absolute path", META, OUT, template("data_path", "/etc/passwd"), ()),
    ("data at an address", META, OUT, template("data_path", "http://127.0.0.1:9/{episode_index}"), ()),
    ("data with a backslash", META, OUT, template("data_path", "..\\x/{episode_index}"), ()),
    ("data with a NUL", META, OUT, template("data_path", "data\0/{episode_index}"), ()),
    ("videos above the source", META, OUT, template("video_path", "videos/../../../{video_key}/x"), ()),
    ("feature above the source", META, OUT, set_feature("../../../../x", dtype="video"), ()),
    ("template of huge width", META, r"uses \{episode_index\} in a way", template("data_path", "{episode_index:999999999d}"), ()),
    ("template of attributes", META, "in a way that is not known", template("data_path", "{episode_index.__class__}"), ()),
    ("template of items", META, "in a way that is not known", template("data_path", "{episode_index[0]}"), ()),
    ("template of positions", META, "in a way that is not known", template("data_path", "{0}"), ()),
    ("template with a conversion", META, "in a way that is not known", template("data_path", "{episode_index!r}"), ()),
    ("template in a template", META, "in a way that is not known", template("data_path", "{episode_index:{file_index}}"), ()),
    ("template left open", META, "is no path template", template("data_path", "{episode_index"), ()),
    ("template of an unknown name", META, "in a way that is not known", template("data_path", "{HOME}"), ()),
    ("view in the template of data", META, "cannot be filled: 'video_key'", template("data_path", "{video_key}"), ()),
    ("view as a number", META, "cannot be filled: ", template("video_path", "{video_key:03d}"), ()),
    ("two states", META, "both observation.state and state could be the state; say --map state=FEATURE", (
        set_feature("state", dtype="float32", shape=[3])
    ), ()),
    ("two actions", META, "both action and actions could be the action; say --map action=FEATURE", (
        set_feature("actions", dtype="float32", shape=[2])
    ), ()),
    ("single images", META, "holds single images.*--map ignore=observation.images.still", (
        set_feature("observation.images.still", dtype="image")
    ), ()),
    ("map of a feature that is not there", META, r"--map names \['qpos'\], which the source lacks; it has \['action'", (
        nothing
    ), ("state=qpos",)),
    ("map ignores a feature that is not there", META, r"--map names \['x'\]", nothing, ("ignore=x",)),
    ("map ignores the action", META, "no action among", nothing, ("ignore=action",)),
    ("two views of one name", META, r"two views have one name in .*--map view.NAME=FEATURE", (
        set_feature("observation.images.wrist", dtype="video")
    ), ("view.top=observation.images.wrist",)),
]  # fmt: skip
REFUSED_V30: list[Refusal] = [
    ("no meta/episodes", META, "meta/episodes holds no parquet", lambda r: shutil.rmtree(r / "meta/episodes"), ()),
    ("episodes of no bytes", META, r"file-000\.parquet is empty", text(LISTED_V3, ""), ()),
    ("episodes are an LFS pointer", META, r"file-000\.parquet is a Git LFS pointer", text(LISTED_V3, LFS), ()),
    ("episodes of nonsense", META, r"file-000\.parquet is damaged", text(LISTED_V3, "nonsense" * 9), ()),
    ("episodes without lengths", META, r"file-000\.parquet lacks length", (
        lambda root: pq.write_table(pq.read_table(root / LISTED_V3).drop_columns(["length"]), root / LISTED_V3)
    ), ()),
    ("file index of text", META, r"data/file_index holds string, expected numbers", (
        lambda root: pq.write_table(
            with_column(pq.read_table(root / LISTED_V3), "data/file_index", ["../../x"] * 3), root / LISTED_V3
        )
    ), ()),
    ("no episodes", META, "lists no episode", (
        lambda root: pq.write_table(pq.read_table(root / LISTED_V3).slice(0, 0), root / LISTED_V3)
    ), ()),
    ("episode twice", META, "lists episode 0 twice", place("episode_index", 0), ()),
    ("episode without an index", META, "without episode_index", place("episode_index", None), ()),
    ("tasks of nonsense", META, r"meta/tasks\.parquet is damaged", text(TASKS_V3, "nonsense" * 9), ()),
    ("tasks without texts", META, r"tasks\.parquet has \['x'\], expected task_index and task", (
        lambda root: pq.write_table(pa.table({"x": [1]}), root / TASKS_V3)
    ), ()),
    ("data above the source", META, OUT, template("data_path", "../../{chunk_index}"), ()),
]  # fmt: skip


def check_refused(root: Path, error: type[SourceError], says: str, feature_map: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        opened(root, *feature_map)
    assert type(caught.value) is error
    assert str(caught.value).startswith(str(root)), "a message says which source"
    assert re.search(says, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("name", "error", "says", "damage", "feature_map"), REFUSED_V21, ids=[case[0] for case in REFUSED_V21]
)
def test_a_source_of_v21_is_refused(
    tmp_path: Path, name: str, error: type[SourceError], says: str, damage: Damage, feature_map: tuple[str, ...]
) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    damage(source)
    check_refused(source, error, says, feature_map)


@pytest.mark.parametrize(
    ("name", "error", "says", "damage", "feature_map"), REFUSED_V30, ids=[case[0] for case in REFUSED_V30]
)
def test_a_source_of_v30_is_refused(
    tmp_path: Path, name: str, error: type[SourceError], says: str, damage: Damage, feature_map: tuple[str, ...]
) -> None:
    source = make_v30(tmp_path / "toy")
    damage(source)
    check_refused(source, error, says, feature_map)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "URI is empty"),
        ("/nowhere/toy", "/nowhere/toy: nothing is there"),
        ("nowhere://toy", "no file system for nowhere://"),
        ("gs://bucket/toy", "the file system for gs:// is not installed: .*gcsfs"),
    ],
)
def test_a_source_that_is_not_there_is_refused(uri: str, says: str) -> None:
    with pytest.raises(SourceNotFoundError, match=says):
        open_files(uri)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)),
    max_leaves=5,
)
places = st.sampled_from(
    [
        ("codebase_version",), ("robot_type",), ("fps",), ("features",), ("splits",), ("chunks_size",),
        ("data_path",), ("video_path",), ("total_episodes",), ("splits", "train"), ("features", "new"),
        *(("features", name, key) for name in ("action", "observation.state", "observation.images.top", "timestamp")
          for key in ("dtype", "shape", "names", "info", "video_info")),
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_v21(tmp_path_factory.mktemp("fuzz") / "toy", EPISODES[:1], splits={"train": "0:1"})


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=places, value=json_values)
def test_whatever_stands_in_info_json_is_read_or_refused(toy: Path, where: tuple[str, ...], value: Any) -> None:
    kept = (toy / INFO).read_text()
    info = json.loads(kept)
    part = info
    for key in where[:-1]:
        part = part.setdefault(key, {})
    part[where[-1]] = value
    (toy / INFO).write_text(json.dumps(info))
    try:
        source, refs = opened(toy)
        for ref in refs:
            digest_episode(source, ref)
    except (SourceError, EpisodeError) as error:
        assert str(error)
    finally:
        (toy / INFO).write_text(kept)


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


@settings(max_examples=3000, deadline=None, derandomize=True)
@given(where=flips)
def test_whatever_happens_to_the_bytes_of_a_data_file_it_is_read_or_set_aside(
    toy: Path, where: list[tuple[float, int]]
) -> None:
    read_flipped(toy, DATA.format(0), where)


@settings(max_examples=3000, deadline=None, derandomize=True)
@given(name=st.sampled_from([DATA_V3.format(0), LISTED_V3, TASKS_V3]), where=flips)
def test_whatever_happens_to_the_bytes_of_v30_files_they_are_read_or_set_aside(
    toy_v30: Path, name: str, where: list[tuple[float, int]]
) -> None:
    read_flipped(toy_v30, name, where)
