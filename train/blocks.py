"""Read blocks of frames from a release, through a cache that the processes of a node share."""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lake import Release
from lake.errors import LakeDamagedError
from lake.schema import frames_table

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_READ_ROWS = 1024
"""Rows of one request, so that memory does not grow with a window."""
_LOW = ("state", "action", "task_index")
_SCHEMA = pa.schema(
    [
        pa.field("state", pa.list_(pa.float32())),
        pa.field("action", pa.list_(pa.float32())),
        pa.field("task_index", pa.int32()),
        pa.field("views", pa.list_(pa.binary())),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockKey:
    """Which rows of an episode a block needs: two ranges of frames, by index."""

    uid: bytes
    content: int
    """Key of the checksum of the episode's rows: an episode has others where it was ingested in another way."""
    first_row: int
    """Row id of the episode's frame 0."""
    views: tuple[int, int]
    """Frames whose views are needed."""
    rows: tuple[int, int]
    """Frames whose state and action are needed; the former lie within."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """The rows of a block. R is the number of its rows."""

    first: int
    """Frame index of row 0."""
    state: Floats
    """[R, D]; D is 0 where the episode has no state."""
    action: Floats
    """[R, A]."""
    task: Ints
    """Index into the episode's tasks [R]."""
    view_ends: list[int]
    """Index behind the last view of each row among all views [R + 1], from 0."""
    jpeg_ends: list[int]
    """Where each view's bytes end, from where the first begins [V + 1]."""
    jpegs: memoryview

    def num_views(self, row: int) -> int:
        """Return how many views a row has."""
        return self.view_ends[row + 1] - self.view_ends[row]

    def jpeg(self, row: int, view: int) -> memoryview:
        """Return the JPEG file of one view; its memory is shared, never copied.

        Raises:
            IndexError: the row has no such view.
        """
        at = self.view_ends[row] + view
        if at >= self.view_ends[row + 1]:
            raise IndexError(f"the frame has {self.num_views(row)} views there, and no view {view}")
        return self.jpegs[self.jpeg_ends[at] : self.jpeg_ends[at + 1]]


class BlockReader:
    """Reads blocks of one release."""

    def __init__(self, release: Release, *, resolution: int | None = None, cache: "BlockCache | None" = None) -> None:
        self._release = release
        self._resolution = resolution
        self._cache = cache
        derived = None if resolution is None else release.digests.get(frames_table(resolution))
        self._place = f"{release.storage.uri} {resolution} {derived}"

    def read(self, keys: Sequence[BlockKey]) -> list[Block]:
        """Return the blocks, in the order given: one range of rows a block, many ranges a request.

        Raises:
            LakeDamagedError: rows are gone, or cannot be read.
        """
        found: dict[int, Block] = {}
        if self._cache is not None:
            for at, key in enumerate(keys):
                batch = self._cache.get(self._name(key))
                if batch is not None:
                    found[at] = _block(key, batch)
        missing = sorted((at for at in range(len(keys)) if at not in found), key=lambda at: keys[at].first_row)
        for group in _groups([keys[at] for at in missing]):
            ats, missing = missing[: len(group)], missing[len(group) :]
            for at, key, batch in zip(ats, group, self._read(group), strict=True):
                if self._cache is not None:
                    batch = self._cache.put(self._name(key), batch)  # noqa: PLW2901
                found[at] = _block(key, batch)
        return [found[at] for at in range(len(keys))]

    def _read(self, keys: Sequence[BlockKey]) -> list[pa.RecordBatch]:
        low_ids = [row for key in keys for row in range(key.first_row + key.rows[0], key.first_row + key.rows[1])]
        view_ids = [row for key in keys for row in range(key.first_row + key.views[0], key.first_row + key.views[1])]
        try:
            low = self._release.take_frames(low_ids, list(_LOW), resolution=self._resolution)
            shown = self._release.take_frames(view_ids, ["views"], resolution=self._resolution)
        except OSError as error:
            where = f"{self._release.storage.uri}, release {self._release.name}"
            raise LakeDamagedError(f"{where}: frames cannot be read: {str(error)[:300]}") from error
        columns, views = [_whole(low, name) for name in _LOW], _whole(shown, "views")
        batches: list[pa.RecordBatch] = []
        low_at = view_at = 0
        for key in keys:
            num_low, num_views = key.rows[1] - key.rows[0], key.views[1] - key.views[0]
            around = (key.views[0] - key.rows[0], key.rows[1] - key.views[1])
            padded = _padded(views.slice(view_at, num_views), around)
            parts = [column.slice(low_at, num_low) for column in columns]
            batches.append(pa.RecordBatch.from_arrays([*parts, padded], schema=_SCHEMA))
            low_at, view_at = low_at + num_low, view_at + num_views
        return batches

    def _name(self, key: BlockKey) -> str:
        text = f"{self._place} {key.uid.decode()} {key.content} {key.views} {key.rows}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class BlockCache:
    """Blocks in files of a folder that the processes of a node share; they are mapped into memory, not read.

    Files are never changed, only replaced as a whole, and the longest unused go first. A file that a process still has
    mapped stays readable for it after it was removed.

    Raises:
        ValueError: the folder belongs to another user, who could put anything there.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._written = 0
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._folder.stat().st_uid != os.getuid():
            raise ValueError(f"{folder} belongs to another user; name another folder with cache_dir")

    def get(self, name: str) -> pa.RecordBatch | None:
        """Return a block's rows; None where it is not there."""
        path = self._path(name)
        try:
            batch = _mapped(path)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (pa.ArrowInvalid, OSError):  # A disk's fault; it is read from the release again.
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return batch

    def put(self, name: str, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Keep a block's rows and return them as mapped memory; where there is no room, as they came."""
        path = self._path(name)
        temporary: str | None = None
        try:
            path.parent.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
            with os.fdopen(handle, "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
                writer.write_batch(batch)
            size = Path(temporary).stat().st_size
            Path(temporary).replace(path)
            mapped = _mapped(path)
        except OSError:  # A full disk only makes reading slower.
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            return batch
        self._written += size
        # Every process looks after a part of its own writing, so the folder may be over by as much a process.
        if self._written > self._max_bytes // 16:
            self._written = 0
            self.evict()
        return mapped

    def evict(self) -> None:
        """Remove the longest unused files until the folder is within its bounds."""
        entries: list[tuple[float, int, Path]] = []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                stale = path.suffix == ".part" and stat.st_mtime < time.time() - 3600
                entries.append((0.0 if stale else stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in entries)
        for mtime, size, path in sorted(entries):
            if total <= self._max_bytes and mtime:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / name[2:]


def _mapped(path: Path) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_next_batch()


def _groups(keys: Sequence[BlockKey]) -> list[list[BlockKey]]:
    """Cut a list of blocks where a request holds enough rows."""
    groups: list[list[BlockKey]] = []
    rows = _READ_ROWS
    for key in keys:
        count = key.views[1] - key.views[0]
        if rows + count > _READ_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(key)
        rows += count
    return groups


def _whole(table: pa.Table, name: str) -> pa.Array:
    """Return a column as one array; ``combine_chunks`` copies even where there is one already."""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _padded(views: pa.ListArray, around: tuple[int, int]) -> pa.ListArray:
    """Return the lists with empty ones before and behind them."""
    ends = views.offsets.to_numpy()
    first = int(ends[0])
    padded = np.concatenate(
        [np.zeros(around[0], np.int32), ends - first, np.full(around[1], ends[-1] - first, np.int32)]
    )
    return pa.ListArray.from_arrays(pa.array(padded, pa.int32()), views.values.slice(first, int(ends[-1]) - first))


def _block(key: BlockKey, batch: pa.RecordBatch) -> Block:
    views = batch.column("views")
    data = views.values
    assert isinstance(data, pa.BinaryArray)
    _, ends, content = data.buffers()
    jpeg_ends = np.frombuffer(ends, np.int32, len(data) + 1, 4 * data.offset) if ends else np.zeros(1, np.int32)
    return Block(
        first=key.rows[0],
        state=_matrix(batch.column("state"), key, "state"),
        action=_matrix(batch.column("action"), key, "action"),
        task=batch.column("task_index").fill_null(0).to_numpy().astype(np.int64),
        view_ends=views.offsets.to_numpy().tolist(),
        jpeg_ends=jpeg_ends.tolist(),
        jpegs=memoryview(content or b"").cast("B"),
    )


def _matrix(column: pa.ListArray, key: BlockKey, name: str) -> Floats:
    """Return a column of equally long lists [R, D]; null counts as nothing."""
    ends = column.offsets.to_numpy()
    lengths = np.diff(ends)
    if len(lengths) and lengths.min() != lengths.max():
        raise LakeDamagedError(
            f"episode {key.uid.decode()} has a {name} of {lengths.min()} dimensions at one frame and {lengths.max()} "
            "at another; verify the lake (python -m lake verify)"
        )
    values = column.values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return values[int(ends[0]) : int(ends[-1])].reshape(len(lengths), -1 if ends[-1] > ends[0] else 0)
