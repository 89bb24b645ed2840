"""Write the files of a LeRobot dataset, numbered, of limited size and published only when whole."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ingest.video_writer import Video, VideoJoiner

FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{FILE}.parquet"
EPISODES_PATH = f"meta/episodes/{FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{FILE}.mp4"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileLimits:
    """When a new file is begun; an episode is never cut."""

    data_bytes: int = 100 * 2**20
    """Size of a parquet file."""
    video_bytes: int = 200 * 2**20
    """Size of an mp4 file."""
    video_s: float = 1000.0
    """Length of an mp4 file. LeRobot compares times as float32 with a tolerance of 0.1 ms, and from 1,024 s on
    neighbouring float32 values are further apart."""
    files_per_chunk: int = 1000
    """Files in a ``chunk-`` directory."""


class Destination:
    """A directory or fsspec URI that gets a dataset whole, or not at all.

    Files are written in a local staging directory. Where the destination is local that directory is renamed at the
    end; elsewhere each finished file is uploaded and removed here, so that the disk holds only the open ones.

    Raises:
        ValueError: something is already there.
    """

    def __init__(self, uri: str) -> None:
        self._fs, root = fsspec.core.url_to_fs(uri)
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._uploaded: list[str] = []
        if self._is_taken():
            raise ValueError(f"{uri} is not empty: remove what is there, or write elsewhere")
        parent = Path(self._root).parent
        if self._is_local:
            parent.mkdir(parents=True, exist_ok=True)
        self._scratch = Path(tempfile.mkdtemp(prefix=".lerobot-", dir=parent if self._is_local else None))
        self._staging = self._scratch / "dataset"

    def stage(self, path: str) -> Path:
        """Return the local file in which the dataset's file ``path`` is to be written."""
        local = self._staging / path
        local.parent.mkdir(parents=True, exist_ok=True)
        return local

    def publish(self, path: str) -> None:
        """Hand over a file that is whole."""
        if not self._is_local:
            remote = f"{self._root}/{path}"
            self._uploaded.append(remote)
            self._fs.put_file(str(self._staging / path), remote)
            (self._staging / path).unlink()

    def commit(self) -> None:
        """Make the dataset appear, if it has not."""
        if self._is_local:
            self._staging.replace(self._root)
        shutil.rmtree(self._scratch)

    def discard(self) -> None:
        """Remove every trace."""
        shutil.rmtree(self._scratch)
        self._fs.invalidate_cache()
        for remote in self._uploaded:
            if self._fs.exists(remote):
                self._fs.rm_file(remote)

    def _is_taken(self) -> bool:
        if self._is_local:
            root = Path(self._root)
            return root.exists() and (not root.is_dir() or any(root.iterdir()))
        self._fs.invalidate_cache()
        # Some stores keep the name of a folder of which all objects were removed.
        return any(path.rstrip("/") != self._root for path in self._fs.find(self._root))


class ParquetFiles:
    """Tables of one schema, spread over numbered files; every table is a row group."""

    def __init__(self, destination: Destination, pattern: str, *, schema: pa.Schema, limits: FileLimits) -> None:
        self.schema = schema
        self._destination = destination
        self._pattern = pattern
        self._limits = limits
        self._number = 0
        self._open: tuple[pa.OSFile, pq.ParquetWriter] | None = None

    def reserve(self, num_bytes: int) -> tuple[int, int]:
        """Begin a new file unless ``num_bytes`` fit in the open one; return the numbers of its chunk and of itself."""
        if self._open is not None and self._open[0].tell() + num_bytes > self._limits.data_bytes:
            self.close()
            self._number += 1
        return divmod(self._number, self._limits.files_per_chunk)

    def write(self, table: pa.Table) -> tuple[int, int]:
        """Append a table and return where it went."""
        place = self.reserve(table.nbytes)
        if self._open is None:
            sink = pa.OSFile(str(self._destination.stage(self._path())), "wb")
            self._open = sink, pq.ParquetWriter(sink, self.schema)
        self._open[1].write_table(table, row_group_size=max(1, table.num_rows))
        return place

    def close(self) -> None:
        """Finish the open file."""
        if self._open is not None:
            sink, writer = self._open
            writer.close()
            sink.close()
            self._open = None
            self._destination.publish(self._path())

    def _path(self) -> str:
        chunk_index, file_index = divmod(self._number, self._limits.files_per_chunk)
        return self._pattern.format(chunk_index=chunk_index, file_index=file_index)


class VideoFiles:
    """The videos of one view, copied one after the other into numbered files."""

    def __init__(self, destination: Destination, view: str, *, fps: float, limits: FileLimits) -> None:
        self.first: Video | None = None
        self._destination = destination
        self._view = view
        self._fps = fps
        self._limits = limits
        self._number = 0
        self._joiner: VideoJoiner | None = None

    def append(self, video: Video, *, first: int, num_frames: int) -> dict[str, int | float]:
        """Copy a video and return the columns that say where its frames ``first`` and on went."""
        self.first = self.first or video
        if self._joiner is not None and not self._has_room(self._joiner, video):
            self.close()
            self._number += 1
        if self._joiner is None:
            self._joiner = VideoJoiner(self._destination.stage(self._path()), fps=self._fps)
        start = self._joiner.append(video) + first
        chunk_index, file_index = divmod(self._number, self._limits.files_per_chunk)
        return {
            f"videos/{self._view}/chunk_index": chunk_index,
            f"videos/{self._view}/file_index": file_index,
            f"videos/{self._view}/from_timestamp": start / self._fps,
            f"videos/{self._view}/to_timestamp": (start + num_frames) / self._fps,
        }

    def close(self) -> None:
        """Finish the open file."""
        if self._joiner is not None:
            self._joiner.close()
            self._joiner = None
            self._destination.publish(self._path())

    def _has_room(self, joiner: VideoJoiner, video: Video) -> bool:
        num_bytes = joiner.num_bytes + video.num_bytes
        length_s = (joiner.num_frames + video.num_frames) / self._fps
        fits = num_bytes <= self._limits.video_bytes and length_s <= self._limits.video_s
        return fits and joiner.accepts(video)

    def _path(self) -> str:
        chunk_index, file_index = divmod(self._number, self._limits.files_per_chunk)
        return VIDEO_PATH.format(video_key=self._view, chunk_index=chunk_index, file_index=file_index)


def tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """Make the table of tasks, which pandas must open with the texts as its index: LeRobot looks them up there."""
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_kind, "metadata": None}
        for name, (kind, numpy_kind) in kinds.items()
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns}
    schema = pa.schema([("task_index", pa.int64()), ("task", pa.string())], {"pandas": json.dumps(pandas)})
    return pa.table([list(tasks.values()), list(tasks)], schema=schema)
