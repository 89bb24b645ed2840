"""Write LeRobot datasets of format v3.0, copying video packets as they are."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ingest.lerobot_files import (
    DATA_PATH,
    EPISODES_PATH,
    VIDEO_PATH,
    Destination,
    FileLimits,
    ParquetFiles,
    VideoFiles,
    tasks_table,
)
from ingest.lerobot_stats import STATS, count_pixels, matrix_stats, pixel_stats, sketch_stats
from ingest.video_writer import Video, sample_frames, scan_video
from lake.sketch import Sketch, merge, sketch

TOLERANCE_S = 1e-4
"""How far apart LeRobot lets the time of a frame and that of its picture be."""
NUM_IMAGES = 32
"""Frames of a view of an episode from which its statistics are computed."""
EPISODES_PER_BATCH = 64
"""Episodes whose rows and sketches are kept until they are written and merged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One numeric feature of a frame.

    Raises:
        ValueError: names that do not fit the size.
    """

    dtype: str = "float32"
    """A numpy type: float32, float64, int64, bool and so on."""
    size: int = 1
    """Number of dimensions; 1 is stored as a scalar, which is how LeRobot reads a shape of [1]."""
    names: tuple[str, ...] | None = None
    """What each dimension means; None where nobody knows."""

    def __post_init__(self) -> None:
        if self.names is not None and len(self.names) != self.size:
            raise ValueError(f"{len(self.names)} names for {self.size} dimensions: {self.names}")

    @property
    def arrow(self) -> pa.DataType:
        """The column's type in parquet."""
        scalar = pa.from_numpy_dtype(np.dtype(self.dtype))
        return scalar if self.size == 1 else pa.list_(scalar, self.size)


INDEX_COLUMNS = {
    "timestamp": Column(),
    "frame_index": Column(dtype="int64"),
    "episode_index": Column(dtype="int64"),
    "index": Column(dtype="int64"),
    "task_index": Column(dtype="int64"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """What every episode of a dataset has in common.

    Raises:
        ValueError: a rate, a column or a view that LeRobot could not read back.
    """

    fps: float
    """Frames per second."""
    robot_type: str
    """LeRobot's word for the embodiment."""
    columns: Mapping[str, Column]
    """Features by LeRobot's keys: ``observation.state``, ``action``, ``next.reward`` and so on."""
    views: tuple[str, ...] = ()
    """Keys of the views, such as ``observation.images.top``."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What made the dataset, as JSON; stored in ``meta/info.json`` under ``robolake``."""

    def __post_init__(self) -> None:
        if not self.fps > 0 or not self.columns:
            raise ValueError(f"fps is {self.fps} and columns are {dict(self.columns)}; a dataset needs both")
        names = [*self.columns, *self.views]
        for name in names:
            if name in INDEX_COLUMNS or "/" in name or names.count(name) > 1:
                raise ValueError(f"feature {name!r} is LeRobot's own, is given twice, or has a slash in its name")


@dataclass(frozen=True, slots=True)
class ViewFile:
    """A video file that shows an episode, and perhaps frames before and behind it, which are copied with it."""

    path: str | os.PathLike
    """Of a local file."""
    num_lead_frames: int = 0
    """Frames that it shows before the episode's first one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """One view of an episode, looked at before anything is written."""

    video: Video
    first: int
    counts_C256: np.ndarray
    num_images: int


class LeRobotWriter:
    """A LeRobot v3.0 dataset being written, episode by episode.

    Use it as a context manager: the dataset appears when the block ends well. A local directory appears whole, by a
    rename; elsewhere finished files are uploaded as they come, and last ``meta/info.json``, without which nobody can
    open the rest. After an exception nothing stays. Memory does not grow with the number of episodes.

    Args:
        uri: a directory or an fsspec URI with nothing there yet; S3 is found by the usual AWS variables.

    Raises:
        ValueError: something is already there.
    """

    def __init__(
        self,
        uri: str | os.PathLike,
        *,
        spec: DatasetSpec,
        limits: FileLimits | None = None,
    ) -> None:
        self.spec = spec
        self.num_episodes = 0
        self.num_frames = 0
        self._limits = limits or FileLimits()
        self._columns = {**spec.columns, **INDEX_COLUMNS}
        self._destination = Destination(os.fspath(uri))
        schema = pa.schema([(name, column.arrow) for name, column in self._columns.items()])
        self._data = ParquetFiles(self._destination, DATA_PATH, schema=schema, limits=self._limits)
        schema = _episodes_schema([*spec.columns, *INDEX_COLUMNS], spec.views)
        self._episodes = ParquetFiles(self._destination, EPISODES_PATH, schema=schema, limits=self._limits)
        self._videos = {v: VideoFiles(self._destination, v, fps=spec.fps, limits=self._limits) for v in spec.views}
        self._rows: list[dict[str, Any]] = []
        self._tasks: dict[str, int] = {}
        self._sketches: list[Sketch] = []
        self._pixels = {view: (np.zeros((3, 256), np.int64), 0) for view in spec.views}
        self._is_broken = False

    def add_episode(
        self,
        columns: Mapping[str, np.ndarray],
        *,
        tasks: str | Sequence[str],
        views: Mapping[str, ViewFile | str | os.PathLike] | None = None,
        timestamp: np.ndarray | None = None,
    ) -> int:
        """Append one episode and return its index.

        Args:
            columns: every column of the spec, as [T, size], or [T] where the size is 1, of exactly its type.
            tasks: the instruction of the episode, or one per frame.
            views: for every view of the spec an mp4 file, whose packets are copied. A plain path must have exactly the
                episode's frames.
            timestamp: seconds since the first frame, float32 [T]; None means frame / fps.

        Raises:
            ValueError: the episode does not fit the spec, and nothing of it was written.
            av.error.FFmpegError: a video cannot be read, and nothing of the episode was written.
        """
        if self._is_broken:
            raise ValueError("an earlier episode was written half; this dataset cannot be continued")
        num_frames = self._check_columns(columns)
        tasks = [tasks] * num_frames if isinstance(tasks, str) else list(tasks)
        if len(tasks) != num_frames:
            raise ValueError(f"{len(tasks)} tasks for {num_frames} frames")
        timestamp = self._check_timestamp(timestamp, num_frames)
        looked_at = self._check_views(views or {}, num_frames)

        self._is_broken = True
        values = {**columns, **self._index_columns(timestamp, tasks)}
        table = pa.table([_to_arrow(values[name], column) for name, column in self._columns.items()], self._data.schema)
        row = {
            "episode_index": self.num_episodes,
            "tasks": list(dict.fromkeys(tasks)),
            "length": num_frames,
            "dataset_from_index": self.num_frames,
            "dataset_to_index": self.num_frames + num_frames,
            **self._count_stats(values, looked_at),
        }
        row["data/chunk_index"], row["data/file_index"] = self._data.write(table)
        for name, view in looked_at.items():
            row |= self._videos[name].append(view.video, first=view.first, num_frames=num_frames)
        self._rows.append(row)
        self.num_episodes += 1
        self.num_frames += num_frames
        if len(self._rows) == EPISODES_PER_BATCH:
            self._flush()
        self._is_broken = False
        return self.num_episodes - 1

    def close(self) -> None:
        """Finish the dataset, so that it can be opened.

        Raises:
            ValueError: there is no episode, or one was written half.
        """
        if self._is_broken or self.num_episodes == 0:
            raise ValueError("a LeRobot dataset needs at least one episode, and all of them whole")
        self._flush()
        for files in (self._data, self._episodes, *self._videos.values()):
            files.close()
        pq.write_table(tasks_table(self._tasks), self._destination.stage("meta/tasks.parquet"))
        self._destination.publish("meta/tasks.parquet")
        stats = _split(sketch_stats(self._sketches[0]), self._columns)
        stats |= {view: pixel_stats(counts, num_images=n) for view, (counts, n) in self._pixels.items()}
        self._write_json("meta/stats.json", _to_lists(stats))
        self._write_json("meta/info.json", self._info())
        self._destination.commit()

    def discard(self) -> None:
        """Remove everything that was written."""
        self._destination.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        is_done = False
        try:
            if kind is None:
                self.close()
                is_done = True
        finally:
            if not is_done:
                self.discard()

    def _check_columns(self, columns: Mapping[str, np.ndarray]) -> int:
        if set(columns) != set(self.spec.columns):
            raise ValueError(f"columns are {sorted(columns)}; the dataset has {sorted(self.spec.columns)}")
        num_frames = len(next(iter(columns.values())))
        for name, column in self.spec.columns.items():
            values = columns[name]
            shapes = [(num_frames, column.size), (num_frames,)] if column.size == 1 else [(num_frames, column.size)]
            if values.dtype != column.dtype or values.shape not in shapes:
                raise ValueError(f"{name} is {values.dtype} {values.shape}; it must be {column.dtype} {shapes[0]}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} is not finite in frame {np.argwhere(~np.isfinite(values))[0][0]}")
        if num_frames == 0:
            raise ValueError("the episode has no frames")
        return num_frames

    def _check_views(self, views: Mapping[str, ViewFile | str | os.PathLike], num_frames: int) -> dict[str, _View]:
        if set(views) != set(self.spec.views):
            raise ValueError(f"views are {sorted(views)}; the dataset has {sorted(self.spec.views)}")
        looked_at = {}
        for name in self.spec.views:
            given = views[name]
            file = given if isinstance(given, ViewFile) else ViewFile(given)
            video, begin = scan_video(file.path), self._videos[name].first
            end = file.num_lead_frames + num_frames
            if video.num_frames < end or (file is not given and video.num_frames > end):
                raise ValueError(f"{video.path} has {video.num_frames} frames; the episode needs {end}")
            if begin is not None and (video.width, video.height) != (begin.width, begin.height):
                size = f"{video.width} x {video.height}"
                raise ValueError(f"{video.path} is {size}; {name} began as {begin.width} x {begin.height}")
            counts_C256, num_images = _sample_pixels(video, file.num_lead_frames, end)
            looked_at[name] = _View(
                video=video, first=file.num_lead_frames, counts_C256=counts_C256, num_images=num_images
            )
        return looked_at

    def _check_timestamp(self, timestamp: np.ndarray | None, num_frames: int) -> np.ndarray:
        nominal = (np.arange(num_frames) / self.spec.fps).astype(np.float32)
        if timestamp is None:
            return nominal
        if timestamp.dtype != np.float32 or timestamp.shape != (num_frames,):
            raise ValueError(f"timestamp is {timestamp.dtype} {timestamp.shape}; it must be float32 {(num_frames,)}")
        error_s = np.abs(timestamp.astype(np.float64) - nominal).max()
        if self.spec.views and not error_s <= TOLERANCE_S:
            raise ValueError(f"timestamps are up to {error_s:.6f} s off frame / fps; LeRobot would not find the images")
        return timestamp

    def _index_columns(self, timestamp: np.ndarray, tasks: list[str]) -> dict[str, np.ndarray]:
        num_frames = len(tasks)
        return {
            "timestamp": timestamp,
            "frame_index": np.arange(num_frames),
            "episode_index": np.full(num_frames, self.num_episodes),
            "index": np.arange(self.num_frames, self.num_frames + num_frames),
            "task_index": np.array([self._tasks.setdefault(task, len(self._tasks)) for task in tasks]),
        }

    def _count_stats(self, values: Mapping[str, np.ndarray], views: Mapping[str, _View]) -> dict[str, list]:
        parts = [values[name].reshape(-1, column.size).astype(np.float64) for name, column in self._columns.items()]
        matrix_TD = np.concatenate(parts, axis=1)
        self._sketches.append(sketch(matrix_TD))
        stats = _split(matrix_stats(matrix_TD), self._columns)
        for name, view in views.items():
            counts, num_images = self._pixels[name]
            self._pixels[name] = (counts + view.counts_C256, num_images + view.num_images)
            stats[name] = pixel_stats(view.counts_C256, num_images=view.num_images)
        return {
            f"stats/{name}/{stat}": value for name, entry in _to_lists(stats).items() for stat, value in entry.items()
        }

    def _flush(self) -> None:
        """Write the rows of the last episodes and merge their sketches, so that memory does not grow."""
        self._sketches = [merge(self._sketches)]
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, self._episodes.schema)
        place = self._episodes.reserve(table.nbytes)
        for name, number in zip(("chunk_index", "file_index"), place, strict=True):
            at = table.schema.get_field_index(f"meta/episodes/{name}")
            table = table.set_column(at, table.schema.field(at), pa.array([number] * table.num_rows))
        self._episodes.write(table)
        self._rows.clear()

    def _write_json(self, path: str, content: Mapping[str, Any]) -> None:
        self._destination.stage(path).write_text(json.dumps(content, indent=4, allow_nan=False) + "\n")
        self._destination.publish(path)

    def _info(self) -> dict[str, Any]:
        fps = int(self.spec.fps) if self.spec.fps == int(self.spec.fps) else self.spec.fps
        features = {name: _column_info(column) for name, column in self.spec.columns.items()}
        features |= {view: _view_info(files.first, fps) for view, files in self._videos.items() if files.first}
        features |= {name: _column_info(column) for name, column in INDEX_COLUMNS.items()}
        return {
            "codebase_version": "v3.0",
            "robot_type": self.spec.robot_type,
            "total_episodes": self.num_episodes,
            "total_frames": self.num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": self._limits.files_per_chunk,
            "data_files_size_in_mb": max(1, self._limits.data_bytes >> 20),
            "video_files_size_in_mb": max(1, self._limits.video_bytes >> 20),
            "fps": fps,
            "splits": {"train": f"0:{self.num_episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.spec.views else None,
            "features": features,
            "robolake": dict(self.spec.provenance),
        }


def _to_arrow(values: np.ndarray, column: Column) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if column.size == 1 else pa.FixedSizeListArray.from_arrays(flat, column.size)


def _split(stats: Mapping[str, np.ndarray], columns: Mapping[str, Column]) -> dict[str, dict[str, np.ndarray]]:
    """Cut statistics of all dimensions side by side into those of each column."""
    ends = np.cumsum([column.size for column in columns.values()])
    return {
        name: {stat: value if stat == "count" else value[end - column.size : end] for stat, value in stats.items()}
        for (name, column), end in zip(columns.items(), ends.tolist(), strict=True)
    }


def _to_lists(stats: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, list]]:
    return {name: {stat: value.tolist() for stat, value in entry.items()} for name, entry in stats.items()}


def _sample_pixels(video: Video, start: int, end: int) -> tuple[np.ndarray, int]:
    """Count the pixels of some frames; return the counts [3, 256] and the number of frames."""
    wanted = np.linspace(start, end - 1, min(NUM_IMAGES, end - start)).round().astype(int).tolist()
    counts = [count_pixels(image) for image in sample_frames(video, wanted)]
    if not counts:
        raise ValueError(f"no frame of {video.path} can be decoded")
    return np.sum(counts, axis=0), len(counts)


def _episodes_schema(columns: Sequence[str], views: Sequence[str]) -> pa.Schema:
    whole, real = pa.int64(), pa.float64()
    fields = [("episode_index", whole), ("tasks", pa.list_(pa.string())), ("length", whole)]
    fields += [("data/chunk_index", whole), ("data/file_index", whole)]
    fields += [("dataset_from_index", whole), ("dataset_to_index", whole)]
    for view in views:
        fields += [(f"videos/{view}/chunk_index", whole), (f"videos/{view}/file_index", whole)]
        fields += [(f"videos/{view}/from_timestamp", real), (f"videos/{view}/to_timestamp", real)]
    image = pa.list_(pa.list_(pa.list_(real)))
    for name in (*columns, *views):
        value = image if name in views else pa.list_(real)
        fields += [(f"stats/{name}/{stat}", pa.list_(whole) if stat == "count" else value) for stat in STATS]
    fields += [("meta/episodes/chunk_index", whole), ("meta/episodes/file_index", whole)]
    return pa.schema(fields)


def _column_info(column: Column) -> dict[str, Any]:
    return {"dtype": column.dtype, "shape": [column.size], "names": list(column.names) if column.names else None}


def _view_info(video: Video, fps: float) -> dict[str, Any]:
    return {
        "dtype": "video",
        "shape": [video.height, video.width, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": video.height,
            "video.width": video.width,
            "video.codec": video.codec,
            "video.pix_fmt": video.pix_fmt,
            "video.is_depth_map": False,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
        },
    }
