"""Sources to damage, and ways to do it."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from support import DATA, VIDEO, Made, make_v21

from ingest.features import parse_map
from ingest.files import open_files
from ingest.formats import format_of, open_source
from ingest.lerobot_files import FileLimits
from ingest.lerobot_writer import Column, DatasetSpec, LeRobotWriter
from ingest.source import EpisodeRef
from ingest.video_writer import encode_video

EPISODES = [Made(seed=i) for i in range(3)]
NUM_FRAMES = EPISODES[0].num_frames
TIMES = [i / 10 for i in range(NUM_FRAMES)]
BAD = 1
GOOD = [0, 2]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
INFO, LISTED, TASKS = "meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl"
DATA_V3, VIDEO_V3 = "data/chunk-000/file-00{}.parquet", "videos/observation.images.top/chunk-000/file-00{}.mp4"
LISTED_V3, TASKS_V3 = "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"
PLACE = "videos/observation.images.top/"

Damage = Callable[[Path], object]


def opened(root: object, *feature_map: str) -> tuple[Any, list[EpisodeRef]]:
    """Open a source and list its episodes."""
    source = open_source(open_files(str(root)), parse_map(feature_map))
    return source, [ref for refs in format_of(source).discover(source) for ref in refs]


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


def text(name: str, content: str | bytes) -> Damage:
    return lambda root: (root / name).write_bytes(content.encode() if isinstance(content, str) else content)


def lines(name: str, *records: object) -> Damage:
    return text(name, "".join(json.dumps(record) + "\n" for record in records))


def nothing(root: Path) -> None:
    """Leave the source as it is."""


def rename(**names: str) -> Damage:
    """Rename features, in the metadata and in the files."""

    def damage(root: Path) -> None:
        for index in range(len(EPISODES)):
            path = root / DATA.format(index)
            table = pq.read_table(path)
            pq.write_table(table.rename_columns([names.get(c, c) for c in table.column_names]), path)
        edit_info(root, lambda info: info.update(features={names.get(k, k): v for k, v in info["features"].items()}))

    return damage


def every_file(edit: Callable[[pa.Table], pa.Table]) -> Damage:
    def damage(root: Path) -> None:
        for index in range(len(EPISODES)):
            path = root / DATA.format(index)
            pq.write_table(edit(pq.read_table(path)), path)

    return damage


def every_video(kind: str) -> Damage:
    def damage(root: Path) -> None:
        for index in range(len(EPISODES)):
            (root / VIDEO.format("top", index)).write_bytes(video_of(kind))

    return damage


def both(*damages: Damage) -> Damage:
    return lambda root: [damage(root) for damage in damages]
