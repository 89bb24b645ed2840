"""Decode a stretch of a video file to small RGB images, by one of three libraries.

Every back end here is a generator of the same form: frames ``first`` to ``first + count`` of the file, counted in the
order in which they are shown, each uint8 [H, W, 3] with its longer side at most ``longer_side``. They decode in one
thread, because ingestion runs one process per core, and they raise EpisodeError where a video is at fault.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from heapq import heappop, heappush
from importlib import import_module
from itertools import chain
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ingest.files import LFS_MARK
from lake.errors import EpisodeError
from lake.images import resize_rgb, rgb_of_frame

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream

Source = str | PathLike[str] | BinaryIO
"""A path, or a file object that reads bytes and seeks."""

CODECS = ("av1", "h264", "hevc", "mpeg4", "vp9")
DECORD_CODECS = ("h264", "hevc", "vp9")
"""decord cannot open AV1, and was seen to give a wrong frame without a word in MPEG-4 with B-frames."""
MAX_SIDE = 16_384
MAX_PIXELS = 64_000_000

_LIMITS = {
    # Only these demuxers and decoders ever see a file: others open further files and addresses, or are rarely tested.
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2",
    "codec_whitelist": "libdav1d,av1,h264,hevc,mpeg4,vp9,aac,mp3,opus,vorbis,flac,ac3,pcm_s16le",
    "max_pixels": str(4 * MAX_PIXELS),  # So that the size of what is too large is still found out.
}
_READ_BYTES = 1 << 18


def name_of(source: Source) -> str:
    """Return what to call a source in messages."""
    if isinstance(source, str | PathLike):
        return fspath(source)
    return str(getattr(source, "path", None) or getattr(source, "name", None) or "video")


@contextmanager
def open_video(source: Source) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Open the first video stream of an mp4 or mov file; a file object stays open afterwards.

    Raises:
        EpisodeError: video-empty, lfs-pointer, video-truncated, video-undecodable, video-too-large or unknown-codec.
        FileNotFoundError: no file at this path.
    """
    import av
    from av.error import FFmpegError

    name = name_of(source)
    with ExitStack() as stack:
        # FFmpeg never sees a path: in its eyes one may be an address, or a list of other files.
        file = stack.enter_context(Path(source).open("rb")) if isinstance(source, str | PathLike) else source
        _check_file(file, name)
        try:
            container = av.open(file, "r", options=_LIMITS, metadata_errors="replace", buffer_size=_READ_BYTES)
        except FFmpegError as error:
            raise EpisodeError("video-undecodable", f"{name} is no mp4 or mov video: {error}") from error
        stack.enter_context(container)
        if not container.streams.video:
            raise EpisodeError("video-undecodable", f"{name} has no video stream")
        stream = container.streams.video[0]
        _check_stream(stream, name)
        yield container, stream


def codec_of(stream: "VideoStream") -> str:
    """Return the codec that is inside, by FFmpeg's name for it, or "" if nothing here decodes it."""
    return "" if stream.codec_context is None else stream.codec_context.codec.canonical_name


def read_packets(container: "InputContainer", stream: "VideoStream", name: str) -> Iterator["Packet"]:
    """Yield a stream's packets in file order.

    Raises:
        EpisodeError: video-truncated where the file ends inside a packet or its index points outside.
    """
    from av.error import FFmpegError

    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise EpisodeError("video-truncated", f"{name} ends inside a packet; copy or download it again")
            if packet.size:
                yield packet
    except FFmpegError as error:
        raise EpisodeError("video-truncated", f"{name} ends early or has a damaged index: {error}") from error


def decode_pyav(
    source: Source, *, size: tuple[int, int], first: int, count: int, longer_side: int
) -> Generator[np.ndarray, None, None]:
    """Decode with PyAV, converting and shrinking each frame in one pass.

    A decoder may swallow a damaged frame without a word, and every later frame would then be taken for its neighbour:
    so each frame that comes out must carry the earliest time among the packets that went in.

    Args:
        size: (width, height) that every frame must have.

    Raises:
        EpisodeError: video-truncated or video-undecodable.
    """
    from av.error import FFmpegError
    from av.video.reformatter import VideoReformatter

    name, reformatter, due, at = name_of(source), VideoReformatter(), [], 0
    with open_video(source) as (container, stream):
        context = stream.codec_context
        context.thread_count, context.thread_type = 1, "NONE"
        context.options = {"max_pixels": str(MAX_PIXELS)}
        for packet in chain(read_packets(container, stream, name), [None]):
            if packet is not None and packet.pts is not None:
                heappush(due, packet.pts)
            try:
                frames = context.decode(packet)
            except FFmpegError as error:
                raise EpisodeError("video-undecodable", f"{name} breaks after frame {at}: {error}") from error
            for frame in frames:
                if not due or heappop(due) != frame.pts:
                    raise EpisodeError("video-undecodable", f"{name}: frame {at} cannot be decoded")
                if at >= first:
                    if frame.is_corrupt or (frame.width, frame.height) != size:
                        what = "is damaged" if frame.is_corrupt else f"is {frame.width} x {frame.height}, not {size}"
                        raise EpisodeError("video-undecodable", f"{name}: frame {at} {what}")
                    yield rgb_of_frame(frame, longer_side, reformatter)
                at += 1
                if at == first + count:
                    return
    raise EpisodeError("video-truncated", f"{name} ends after {at} of {first + count} frames")


def decode_torchcodec(
    source: Source, *, size: tuple[int, int], first: int, count: int, longer_side: int
) -> Generator[np.ndarray, None, None]:
    """Decode with torchcodec, then shrink the RGB image.

    Raises:
        EpisodeError: video-truncated or video-undecodable.
    """
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

    name = name_of(source)
    width, height = size
    step = max(1, min(16, MAX_PIXELS // (width * height)))
    try:
        video: Any = fspath(source) if isinstance(source, str | PathLike) else source
        decoder = VideoDecoder(video, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    except (RuntimeError, ValueError) as error:
        raise EpisodeError("video-undecodable", f"{name}: torchcodec cannot open it: {error}") from error
    if len(decoder) < first + count:
        raise EpisodeError("video-truncated", f"{name} has {len(decoder)} of {first + count} frames")
    for at in range(first, first + count, step):
        try:
            batch = decoder.get_frames_in_range(at, min(at + step, first + count)).data.numpy()
        except (RuntimeError, ValueError, IndexError) as error:
            raise EpisodeError("video-undecodable", f"{name} breaks at frame {at}: {error}") from error
        if batch.shape[1:3] != (height, width):
            raise EpisodeError("video-undecodable", f"{name}: frame {at} is {batch.shape[2]} x {batch.shape[1]}")
        yield from (resize_rgb(rgb, longer_side) for rgb in batch)


def decode_decord(
    source: Source, *, size: tuple[int, int], first: int, count: int, longer_side: int
) -> Generator[np.ndarray, None, None]:
    """Decode with decord, then shrink the RGB image.

    Raises:
        EpisodeError: video-truncated or video-undecodable.
    """
    import decord

    name = name_of(source)
    try:
        video = fspath(source) if isinstance(source, str | PathLike) else source
        reader = decord.VideoReader(video, ctx=decord.cpu(0), num_threads=1)
    except (decord.DECORDError, RuntimeError) as error:
        raise EpisodeError("video-undecodable", f"{name}: decord cannot open it: {error}") from error
    if len(reader) < first + count:
        raise EpisodeError("video-truncated", f"{name} has {len(reader)} of {first + count} frames")
    for at in range(first, first + count):
        try:
            rgb = reader[at].asnumpy()
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise EpisodeError("video-undecodable", f"{name} breaks at frame {at}: {error}") from error
        if rgb.shape[:2] != (size[1], size[0]):
            raise EpisodeError("video-undecodable", f"{name}: frame {at} is {rgb.shape[1]} x {rgb.shape[0]}")
        yield resize_rgb(rgb, longer_side)


DECODERS: dict[str, Callable[..., Generator[np.ndarray, None, None]]] = {
    "pyav": decode_pyav,
    "torchcodec": decode_torchcodec,
    "decord": decode_decord,
}

DEFAULT_BACKEND: dict[str, str] = {"av1": "pyav", "h264": "pyav", "hevc": "pyav", "mpeg4": "pyav", "vp9": "pyav"}
"""The fastest on one core, by ``python -m jobs.bench decode``: it alone shrinks a frame while converting it to RGB."""


def backend_for(codec: str, backend: str | None = None) -> str:
    """Return the back end to decode a codec with: the one asked for, or the codec's default.

    Raises:
        ValueError: it is unknown or not installed.
    """
    if backend is None:
        return DEFAULT_BACKEND[codec]
    if backend not in DECODERS:
        raise ValueError(f"there is no back end {backend!r}; take one of {list(DECODERS)}")
    if backend == "decord" and codec not in DECORD_CODECS:
        raise ValueError(f"decord cannot be trusted with {codec}; take pyav or torchcodec")
    module = "av" if backend == "pyav" else backend
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"the back end {backend} does not load: {error}; pip install 'robolake[codecs]'") from error
    return backend


def _check_file(file: BinaryIO, name: str) -> None:
    """Refuse what is no video or has lost its end, before a parser sees it."""
    num_bytes = file.seek(0, 2)
    file.seek(0)
    head = file.read(len(LFS_MARK))
    file.seek(0)
    if num_bytes == 0:
        raise EpisodeError("video-empty", f"{name} has no bytes")
    if head == LFS_MARK:
        raise EpisodeError("lfs-pointer", f"{name} is a Git LFS pointer; run `git lfs pull` in the source")
    if num_bytes < 16:
        raise EpisodeError("video-truncated", f"{name} has {num_bytes} bytes")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        _check_boxes(file, num_bytes, name)
        file.seek(0)


def _check_boxes(file: BinaryIO, num_bytes: int, name: str) -> None:
    """Walk the outermost boxes of an mp4 file: FFmpeg would take some cut files for shorter whole ones.

    Source: ISO/IEC 14496-12, 4.2: a 32-bit length, a type, and a 64-bit length where the first is 1; 0 is "to the end".
    """
    at, found = 0, set()
    while at + 8 <= num_bytes:
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:
            length = num_bytes - at
        if length < 8 or at + length > num_bytes:
            if {b"moov", b"mdat"} <= found and kind not in (b"moov", b"moof", b"mdat"):
                return  # Only what some writers leave behind the video.
            raise EpisodeError("video-truncated", f"{name} ends at byte {num_bytes}, inside the box {kind!r}")
        found.add(kind)
        at += length
    file.seek(at)
    if not {b"moov", b"mdat"} <= found or any(file.read(8)):
        lost = "index (moov)" if b"moov" not in found else "frames (mdat)"
        raise EpisodeError("video-truncated", f"{name} has no {lost}: its end is missing; copy or download it again")


def _check_stream(stream: "VideoStream", name: str) -> None:
    codec = codec_of(stream)
    if codec not in CODECS:
        raise EpisodeError("unknown-codec", f"{name} holds {codec or 'a codec without decoder'}, not {list(CODECS)}")
    width, height = stream.width, stream.height
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        limits = f"{MAX_SIDE} a side and {MAX_PIXELS} in all"
        raise EpisodeError("video-too-large", f"{name} is {width} x {height} pixels; the limits are {limits}")
    if min(width, height) < 1:
        raise EpisodeError("video-undecodable", f"{name} does not say how large its frames are")
