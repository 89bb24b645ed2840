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
    ("text in place of a video", "video-undecodable", "is no mp4, mov, mkv or webm", put(at_video, b"hello " * 99)),
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
    again = ingest(source, tmp_path / "lake")
    assert (again["committed"], again["skipped"], again["quarantined"], again["quarantined_new"]) == (0, 2, 1, 0)
