"""A task: a few episodes from a source to fragments of the lake's tables, not yet committed."""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from lance import Blob, LanceDataset, blob_array
from lance.fragment import write_fragments

from ingest.formats import format_of
from ingest.source import Episode, EpisodeRef, Source, ViewSource, content_digest
from ingest.validate import ViewWatch, check_columns, check_frame_count
from ingest.video import Clip, decode_clip, read_clip
from lake.checksum import FramesDigest
from lake.commit import episode_uid
from lake.errors import EpisodeError
from lake.failpoints import failpoint
from lake.images import encode_jpeg
from lake.schema import FRAMES, STATS, VIDEOS
from lake.sketch import Sketch, merge, sketch
from lake.staging import EpisodeWrite, Rejected, TableWrite, TaskResult, get_result, put_result
from lake.storage import Storage, store_error
from lake.tables import open_table

_BATCH_FRAMES = 64
_HASH_BYTES = 1 << 20
_PIXEL_STRIDE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedEpisode:
    """One episode of a plan."""

    ref: EpisodeRef
    content_digest: str
    ordinal: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """How episodes are written."""

    source_name: str
    resolution: int = 224
    """Longer side of the stored views in pixels."""
    backend: str | None = None
    """Video back end; None means the fastest for the codec."""
    accept: tuple[str, ...] = ()
    """Reasons of ``validate.ACCEPTABLE`` that do not reject."""


def digest_episode(source: Source, ref: EpisodeRef) -> str:
    """Return the content digest of an episode, after every check that needs no decoding.

    Raises:
        EpisodeError: the episode is bad.
    """
    episode = format_of(source).read_episode(source, ref)
    check_columns(episode)
    clips = {view.name: _clip(source, view, None) for view in episode.views}
    for name, clip in clips.items():
        check_frame_count(name, clip.num_frames, episode.num_frames)
    return content_digest(episode, {name: clip.packets_sha256 for name, clip in clips.items()})


def write_task(
    storage: Storage, source: Source, profile: Profile, attempt_id: str, task: int, planned: list[PlannedEpisode]
) -> TaskResult:
    """Write the fragments of a task and stage what was done; a staged result is returned as it is.

    Raises:
        StoreError: the lake's storage, or this node's temporary space, cannot take more.
    """
    staged = get_result(storage, profile.source_name, attempt_id, task)
    if staged is not None:
        return staged
    with tempfile.TemporaryDirectory(prefix="robolake-") as folder:
        writer = _TaskWriter(source=source, profile=profile, folder=Path(folder))
        writes = _write(storage, writer, planned)
    result = TaskResult(
        attempt_id=attempt_id,
        task=task,
        created_at=time.time(),
        writes=writes,
        episodes=tuple(writer.episodes),
        rejected=tuple(writer.rejected),
    )
    failpoint("task.before_stage")
    result = put_result(storage, profile.source_name, result)
    failpoint("task.after_stage")
    return result


@dataclass
class _TaskWriter:
    """What is known of a task's episodes while their frames stream by."""

    source: Source
    profile: Profile
    folder: Path
    episodes: list[EpisodeWrite] = field(default_factory=list[EpisodeWrite])
    rejected: list[Rejected] = field(default_factory=list[Rejected])
    videos: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    stats: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    num_frames: int = 0
    error: Exception | None = None

    def frames(self, planned: list[PlannedEpisode]) -> Iterator[pa.RecordBatch]:
        """Yield the frames of all episodes; a bad one's frames stay behind unseen."""
        try:
            for episode in planned:
                try:
                    yield from self._episode(episode)
                except EpisodeError as error:
                    ref = episode.ref
                    self.rejected.append(
                        Rejected(
                            source_index=ref.source_index,
                            fingerprint=ref.fingerprint,
                            reason=error.reason,
                            message=error.message,
                        )
                    )
        except Exception as error:  # Arrow's C stream would turn it into a string.
            self.error = error
            raise

    def _episode(self, planned: PlannedEpisode) -> Iterator[pa.RecordBatch]:
        source, ref = self.source, planned.ref
        uid = episode_uid(self.profile.source_name, planned.content_digest, planned.ordinal)
        episode = format_of(source).read_episode(source, ref)
        check_columns(episode)
        paths = {view.name: self.folder / f"{uid}-{i}.mp4" for i, view in enumerate(episode.views)}
        clips = {view.name: _clip(source, view, paths[view.name]) for view in episode.views}
        digest = content_digest(episode, {name: clip.packets_sha256 for name, clip in clips.items()})
        if digest != planned.content_digest:
            raise EpisodeError("source-changed", "the episode changed between planning and reading")
        checksum = FramesDigest()
        first_frame = self.num_frames
        pictures: dict[str, list[Sketch]] = {}
        for batch in self._batches(uid, episode, clips, paths, pictures):
            checksum.update(batch)
            self.num_frames += batch.num_rows
            yield batch
        videos = [_video_row(uid, view.name, clips[view.name], paths[view.name]) for view in episode.views]
        stats = [_stats_row(uid, "action", sketch(episode.action))]
        if episode.state.shape[1]:
            stats.append(_stats_row(uid, "state", sketch(episode.state)))
        stats += [_stats_row(uid, f"view.{name}", merge(parts)) for name, parts in pictures.items()]
        ranges = {
            "frames": (first_frame, episode.num_frames),
            "videos": (len(self.videos), len(videos)),
            "stats": (len(self.stats), len(stats)),
        }
        self.videos += videos
        self.stats += stats
        row = self._row(planned, episode) | {"frames_sha256": checksum.hexdigest()}
        self.episodes.append(EpisodeWrite(episode_uid=uid, row=row, ranges=ranges))

    def _batches(
        self,
        uid: str,
        episode: Episode,
        clips: dict[str, Clip],
        paths: dict[str, Path],
        pictures: dict[str, list[Sketch]],
    ) -> Iterator[pa.RecordBatch]:
        watches = [ViewWatch(view.name, episode.num_frames) for view in episode.views]
        with ExitStack() as stack:
            decoders = [
                decode_clip(
                    paths[view.name],
                    clip=clips[view.name],
                    longer_side=self.profile.resolution,
                    backend=self.profile.backend,
                )
                for view in episode.views
            ]
            for decoder in decoders:
                stack.callback(decoder.close)
            for start in range(0, episode.num_frames, _BATCH_FRAMES):
                end = min(start + _BATCH_FRAMES, episode.num_frames)
                views: list[list[bytes]] = [[] for _ in range(start, end)]
                for decoder, watch in zip(decoders, watches, strict=True):
                    for index, rgb in enumerate(islice(decoder, end - start), start):
                        if watch.look(index, rgb):
                            pictures.setdefault(watch.view, []).append(_picture_sketch(rgb))
                        views[index - start].append(encode_jpeg(rgb))
                yield _frames_batch(uid, episode, start, views)
            for decoder, watch in zip(decoders, watches, strict=True):
                if next(decoder, None) is not None:
                    message = f"view {watch.view} decodes to more than {episode.num_frames} frames"
                    raise EpisodeError("video-frame-count", message)
                watch.check(self.profile.accept)

    def _row(self, planned: PlannedEpisode, episode: Episode) -> dict[str, Any]:
        return {
            "source": self.profile.source_name,
            "source_index": planned.ref.source_index,
            "source_uri": self.source.files.uri,
            "source_format": self.source.format,
            "content_digest": planned.content_digest,
            "ordinal": planned.ordinal,
            "fingerprint": planned.ref.fingerprint,
            "embodiment": episode.embodiment,
            "tasks": list(episode.tasks),
            "num_frames": episode.num_frames,
            "fps": episode.fps,
            "views": [view.name for view in episode.views],
            "state_dim": episode.state.shape[1],
            "action_dim": episode.action.shape[1],
            "state_names": list(episode.state_names),
            "action_names": list(episode.action_names),
            "success": episode.success,
            "split": episode.split,
            "resolution": self.profile.resolution,
            "unmapped": list(episode.unmapped),
        }


def _write(storage: Storage, writer: _TaskWriter, planned: list[PlannedEpisode]) -> dict[str, TableWrite]:
    tables = {table: open_table(storage, table) for table in ("frames", "videos", "stats")}
    writes: dict[str, TableWrite] = {}
    reader = pa.RecordBatchReader.from_batches(FRAMES, writer.frames(planned))
    writes |= write_fragment(storage, "frames", tables["frames"], reader, writer)
    failpoint("task.after_frames")
    if writer.videos:
        paths = [row.pop("path") for row in writer.videos]
        columns = {name: [row[name] for row in writer.videos] for name in VIDEOS.names if name != "video"}
        arrays = {name: pa.array(values, VIDEOS.field(name).type) for name, values in columns.items()}
        arrays["video"] = blob_array([Blob.from_uri(path.as_uri()) for path in paths])
        writes |= write_fragment(storage, "videos", tables["videos"], pa.table(arrays, schema=VIDEOS), writer)
    if writer.stats:
        writes |= write_fragment(storage, "stats", tables["stats"], pa.Table.from_pylist(writer.stats, STATS), writer)
    return writes


def write_fragment(
    storage: Storage, table: str, dataset: LanceDataset, data: pa.RecordBatchReader | pa.Table, writer: Any
) -> dict[str, TableWrite]:
    """Write one uncommitted fragment; none where there are no rows.

    Args:
        writer: its ``error`` is what went wrong in ``data``'s own code, if anything.
    """
    try:
        fragments = write_fragments(
            data,
            dataset,
            schema=data.schema,
            mode="append",
            enable_stable_row_ids=True,
            storage_options=storage.lance_options(),
            external_blob_mode="ingest",
        )
    except (OSError, RuntimeError) as error:
        if isinstance(writer.error, OSError) and writer.error.errno is not None:
            raise store_error("this node's temporary folder or the source", writer.error) from writer.error
        if writer.error is not None:
            raise writer.error from None
        raise store_error(dataset.uri, error) from error
    if not fragments:
        return {}
    assert len(fragments) == 1, f"{len(fragments)} fragments for one task"
    return {table: TableWrite(json=json.dumps(fragments[0].to_json()), base_version=dataset.version)}


def _clip(source: Source, view: ViewSource, dest: Path | None) -> Clip:
    """Read a view's packets, and copy them to a file of its own."""
    files = source.files
    files.check_episode_file(view.path, "video")
    if files.is_local:
        return read_clip(files.path(view.path), start_s=view.start_s, end_s=view.end_s, fps=source.fps, dest=dest)
    with files.open(view.path) as file:
        return read_clip(file, start_s=view.start_s, end_s=view.end_s, fps=source.fps, dest=dest)


def _frames_batch(uid: str, episode: Episode, start: int, views: list[list[bytes]]) -> pa.RecordBatch:
    end = start + len(views)
    return pa.record_batch(
        {
            "episode_uid": pa.array([uid] * (end - start), pa.string()),
            "frame_index": pa.array(np.arange(start, end, dtype=np.int32)),
            "timestamp_s": pa.array(episode.timestamp_s[start:end]),
            "state": _lists(episode.state[start:end]),
            "action": _lists(episode.action[start:end]),
            "task_index": pa.array(episode.task_index[start:end]),
            "views": pa.array(views, pa.list_(pa.binary())),
        },
        schema=FRAMES,
    )


def _lists(values: npt.NDArray[np.float32]) -> pa.ListArray:
    rows, dim = values.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * dim
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values).reshape(-1)))


def _picture_sketch(rgb: npt.NDArray[np.uint8]) -> Sketch:
    """Return statistics of a picture's channels in [0, 1], over every few pixels."""
    pixels = rgb[::_PIXEL_STRIDE, ::_PIXEL_STRIDE].reshape(-1, 3)
    return sketch(pixels.astype(np.float64) / 255.0)


def _video_row(uid: str, view: str, clip: Clip, path: Path) -> dict[str, Any]:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_BYTES):
            sha256.update(chunk)
    return {
        "episode_uid": uid,
        "view": view,
        "codec": clip.codec,
        "width": clip.width,
        "height": clip.height,
        "num_frames": clip.num_frames,
        "num_lead_frames": clip.num_lead_frames,
        "num_bytes": path.stat().st_size,
        "packets_sha256": clip.packets_sha256,
        "sha256": sha256.hexdigest(),
        "path": path,
    }


def _stats_row(uid: str, feature: str, of: Sketch) -> dict[str, Any]:
    return {"episode_uid": uid, "feature": feature, **of.to_columns()}
