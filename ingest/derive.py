"""Frames at another resolution, from the packets in ``videos``; no source is needed."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from lance import LanceDataset
from lance.fragment import FragmentMetadata

from ingest.parallel import blocks_of, rows_of
from ingest.task import write_fragment
from ingest.video import Clip, decode_clip
from lake import Lake, Release
from lake.checksum import FramesDigest
from lake.images import encode_jpeg
from lake.schema import DERIVED, FRAMES, frames_table
from lake.storage import Storage
from lake.tables import append_fragments, create_table, merge_new, open_table, take_rows

_BATCH_FRAMES = 64
_COLUMNS = [name for name in FRAMES.names if name != "views"]
_COMMIT_TASKS = 16


def derive(lake: Lake, resolution: int, say: Callable[[int, int], None]) -> Release:
    """Make the frames table of a resolution hold every episode of the lake, and release it.

    Safe to repeat and to interrupt: an episode counts from the moment its row is merged
    into ``derived``.

    Args:
        resolution: longer side in pixels; smaller videos are not enlarged.
        say: called with (episodes done, episodes in all).

    Raises:
        ValueError: the lake has no episode.
    """
    storage, table = lake.storage, frames_table(resolution)
    episodes = open_table(storage, "episodes").to_table(columns=["episode_uid", "views", "num_frames", *_RANGES])
    if not episodes.num_rows:
        raise ValueError(f"the lake at {lake.uri} has no episode yet; ingest something")
    done = set(_derived_uids(storage, resolution))
    todo = episodes.filter(
        pa.array([uid not in done for uid in episodes.column("episode_uid").to_pylist()], pa.bool_())
    )
    say(0, todo.num_rows)
    if todo.num_rows:
        create_table(storage, table)

    def write(block: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(_write(storage, table, resolution, block.to_pylist()), _WRITTEN)

    waiting: list[dict[str, Any]] = []
    for count, row in enumerate(rows_of(blocks_of(todo, 8), write, "DeriveFrames"), 1):
        waiting.append(row)
        say(count, todo.num_rows)
        if len({r["fragment"] for r in waiting}) > _COMMIT_TASKS:
            # The last task's rows may still be coming; those before it are whole.
            last = waiting[-1]["fragment"]
            _commit(storage, table, resolution, [r for r in waiting if r["fragment"] != last])
            waiting = [r for r in waiting if r["fragment"] == last]
    _commit(storage, table, resolution, waiting)
    return lake.make_release()


_RANGES = ["frames_first_row", "frames_rows", "videos_first_row", "videos_rows"]

_WRITTEN = pa.schema(
    [
        ("episode_uid", pa.string()),
        ("fragment", pa.string()),
        ("base_version", pa.int64()),
        ("offset", pa.int64()),
        ("rows", pa.int64()),
        ("sha256", pa.string()),
    ]
)


@dataclass
class _Deriver:
    """The frames of a task's episodes at another resolution, streaming."""

    storage: Storage
    resolution: int
    folder: Path
    written: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    error: Exception | None = None

    def frames(self, episodes: list[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
        try:
            frames, videos = open_table(self.storage, "frames"), open_table(self.storage, "videos")
            offset = 0
            for episode in episodes:
                checksum = FramesDigest()
                for batch in self._episode(episode, frames, videos):
                    checksum.update(batch)
                    yield batch
                row = {"offset": offset, "rows": checksum.num_frames, "sha256": checksum.hexdigest()}
                self.written.append(row | {"episode_uid": episode["episode_uid"]})
                offset += checksum.num_frames
        except Exception as error:  # Arrow's C stream would turn it into a string.
            self.error = error
            raise

    def _episode(self, episode: dict[str, Any], frames: LanceDataset, videos: LanceDataset) -> Iterator[pa.RecordBatch]:
        first, count = episode["frames_first_row"], episode["frames_rows"]
        decoders = [
            decode_clip(path, clip=clip, longer_side=self.resolution)
            for path, clip in _clips(videos, episode, self.folder)
        ]
        for start in range(0, count, _BATCH_FRAMES):
            ids = list(range(first + start, first + min(start + _BATCH_FRAMES, count)))
            rows = take_rows(frames, ids, _COLUMNS).combine_chunks()
            views: list[list[bytes]] = [[] for _ in ids]
            for decoder in decoders:
                for at, rgb in enumerate(islice(decoder, len(ids))):
                    views[at].append(encode_jpeg(rgb))
            arrays = {name: rows.column(name).chunk(0) for name in _COLUMNS}
            yield pa.record_batch(arrays | {"views": pa.array(views, pa.list_(pa.binary()))}, schema=FRAMES)


def _write(storage: Storage, table: str, resolution: int, episodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="robolake-") as folder:
        deriver = _Deriver(storage=storage, resolution=resolution, folder=Path(folder))
        reader = pa.RecordBatchReader.from_batches(FRAMES, deriver.frames(episodes))
        write = write_fragment(storage, table, open_table(storage, table), reader, deriver)[table]
    return [row | {"fragment": write.json, "base_version": write.base_version} for row in deriver.written]


def _clips(videos: LanceDataset, episode: dict[str, Any], folder: Path) -> Iterator[tuple[Path, Clip]]:
    """Write each view's mp4 to a file; yield it with what is needed to decode it."""
    ids = list(range(episode["videos_first_row"], episode["videos_first_row"] + episode["videos_rows"]))
    names = ["codec", "width", "height", "num_lead_frames", "num_frames", "num_bytes", "packets_sha256"]
    if not ids:
        return
    described = take_rows(videos, ids, names).to_pylist()
    for at, (blob, row) in enumerate(zip(videos.take_blobs("video", ids=ids), described, strict=True)):
        assert blob is not None
        path = folder / f"{episode['episode_uid']}-{at}.mp4"
        with blob, path.open("wb") as file:
            while chunk := blob.read(1 << 20):
                file.write(chunk)
        yield path, Clip(**row)


def _commit(storage: Storage, table: str, resolution: int, written: list[dict[str, Any]]) -> None:
    if not written:
        return
    fragments = {row["fragment"]: FragmentMetadata.from_json(row["fragment"]) for row in written}
    base_version = min(row["base_version"] for row in written)
    first_rows = append_fragments(storage, table, list(fragments.values()), base_version, {})
    attempt = hashlib.sha256("".join(sorted(fragments)).encode()).hexdigest()[:24]
    rows = [
        {
            "key": f"{row['episode_uid']}/{table}",
            "episode_uid": row["episode_uid"],
            "table": table,
            "resolution": resolution,
            "first_row": first_rows[fragments[row["fragment"]].files[0].path] + row["offset"],
            "rows": row["rows"],
            "sha256": row["sha256"],
            "attempt_id": attempt,
        }
        for row in written
    ]
    merge_new(storage, "derived", pa.Table.from_pylist(rows, DERIVED))


def _derived_uids(storage: Storage, resolution: int) -> list[str]:
    derived = open_table(storage, "derived").to_table(columns=["episode_uid"], filter=f"resolution = {resolution}")
    return derived.column("episode_uid").to_pylist()
