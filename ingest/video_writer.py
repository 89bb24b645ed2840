"""Write mp4 files from frames, or from the packets of other files."""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.container import OutputContainer

# Speed before size: a recorder encodes while the robot or the simulator waits. AV1 has LeRobot's settings.
ENCODERS = {
    "h264": ("libx264", {"crf": "20", "preset": "veryfast", "sc_threshold": "0"}),
    "av1": ("libsvtav1", {"crf": "30", "preset": "8", "svtav1-params": "lp=1"}),
}
TICKS_PER_FRAME = 512


def start_encoding(container: OutputContainer) -> None:
    """Open the encoders of a container whose streams are set up, and keep the scheduling of this process as it was.

    Opened by root, SVT-AV1 asks for real-time priority for the calling thread and its own. Whatever the process starts
    later (threads, Ray's servers) would inherit it, and one that spins then starves the whole machine.
    """
    threads = Path("/proc/self/task")
    if not threads.exists():  # Not Linux: there it asks for nothing.
        container.start_encoding()
        return
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        container.start_encoding()
    finally:
        for thread in threads.iterdir():
            with suppress(ProcessLookupError):  # It ended meanwhile.
                if os.sched_getscheduler(int(thread.name)) == os.SCHED_FIFO != policy:
                    os.sched_setscheduler(int(thread.name), policy, param)


def encode_video(
    frames: Iterable[np.ndarray],
    path: str | PathLike,
    *,
    fps: float,
    codec: Literal["h264", "av1"] = "h264",
    gop: int = 2,
) -> int:
    """Encode frames as an mp4 file of one H.264 or AV1 stream in yuv420p.

    H.264 is the default because every player, browser and decoder opens it; AV1 is LeRobot's. Without B-frames,
    decoding order is showing order. One frame in ``gop`` can be decoded alone: 2 makes random access cheap.

    Args:
        frames: uint8 RGB images [H, W, 3] of one even size.

    Returns:
        The number of frames written.

    Raises:
        ValueError: no frames, an odd size, or a frame that is not such an image.
    """
    name, options = ENCODERS[codec]
    os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 otherwise writes thirty lines per file to stderr.
    num_frames, rate = 0, Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(name, rate=rate, options=dict(options))
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.gop_size, context.max_b_frames, context.thread_count = gop, 0, 1
        for frame in frames:
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError(f"frame {num_frames} is {frame.dtype} {frame.shape}; give uint8 [H, W, 3]")
            if num_frames == 0:
                stream.height, stream.width = frame.shape[:2]
                if stream.height % 2 or stream.width % 2:
                    raise ValueError(f"frames of {stream.width} x {stream.height}: yuv420p needs even sides")
                start_encoding(container)
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = num_frames, 1 / rate
            container.mux(stream.encode(picture))
            num_frames += 1
        if num_frames == 0:
            raise ValueError(f"no frames to encode for {path}")
        container.mux(stream.encode(None))
    return num_frames


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """What a video file holds, read from its packets without decoding one."""

    path: str
    codec: str
    width: int
    height: int
    pix_fmt: str
    extradata: bytes
    """The codec's own header; packets can share a file only if it is equal."""
    num_bytes: int
    """Size of the packets, which is all but the index of the file."""
    order: tuple[int, ...]
    """For each packet as stored, the number of the frame that it shows."""
    pts: tuple[int, ...]
    """For each frame as shown, its time in the file's own time base."""
    keyframes: tuple[int, ...]
    """The frames at which decoding can begin, ascending."""

    @property
    def num_frames(self) -> int:
        """Number of frames, which is the number of packets."""
        return len(self.order)

    @property
    def delay(self) -> int:
        """Number of frames by which packets must be read ahead of being shown; above zero with B-frames."""
        return max(packet - frame for packet, frame in enumerate(self.order))


def scan_video(path: str | PathLike) -> Video:
    """Read what a video file holds.

    Raises:
        ValueError: no video stream, no packets, a first packet that is no keyframe, or frames that an edit list hides.
        av.error.FFmpegError: the file is not a readable video.
    """
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError(f"{path} has no video stream")
        stream = container.streams.video[0]
        pts, is_keyframe, num_bytes = [], [], 0
        for packet in container.demux(stream):
            if packet.dts is None:
                continue
            if packet.is_discard:
                raise ValueError(f"{path} hides frames behind an edit list; encode it again to drop them")
            pts.append(packet.pts)
            is_keyframe.append(packet.is_keyframe)
            num_bytes += packet.size
        if not pts:
            raise ValueError(f"{path} has no packets")
        shown = sorted(range(len(pts)), key=pts.__getitem__)
        order = [0] * len(pts)
        for frame, packet in enumerate(shown):
            order[packet] = frame
        if order[0] != 0 or not is_keyframe[0]:
            raise ValueError(f"{path} does not begin with a keyframe; encode it again")
        context = stream.codec_context
        return Video(
            path=str(path),
            codec=context.codec.canonical_name,
            width=context.width,
            height=context.height,
            pix_fmt=context.pix_fmt or "",
            extradata=bytes(context.extradata or b""),
            num_bytes=num_bytes,
            order=tuple(order),
            pts=tuple(pts[packet] for packet in shown),
            keyframes=tuple(sorted(frame for frame, key in zip(order, is_keyframe, strict=True) if key)),
        )


class VideoJoiner:
    """An mp4 file to which the packets of whole files are copied, one file after the other.

    Frame ``n`` of the joined file is shown at exactly ``n / fps``, whatever clock its source had: LeRobot finds
    frames by that arithmetic, with a tolerance of 0.1 ms. Closing writes the index; before that nothing can be read.
    """

    def __init__(self, path: str | PathLike, *, fps: float) -> None:
        self.num_frames = 0
        self.num_bytes = 0
        rate = Fraction(fps).limit_denominator(1001)
        self._ticks = TICKS_PER_FRAME * rate.denominator
        self._time_base = Fraction(1, TICKS_PER_FRAME * rate.numerator)
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "faststart"})
        self._begun: tuple[Video, av.VideoStream] | None = None

    def accepts(self, video: Video) -> bool:
        """Tell whether the packets of ``video`` can follow those that are here."""
        if self._begun is None:
            return True
        first, _ = self._begun
        mine, theirs = ((v.codec, v.width, v.height, v.pix_fmt, v.extradata) for v in (first, video))
        return mine == theirs and video.delay <= first.delay

    def append(self, video: Video) -> int:
        """Copy all packets of ``video`` and return the number of its first frame in this file.

        Raises:
            ValueError: the packets cannot follow those that are here.
        """
        if not self.accepts(video):
            raise ValueError(f"{video.path} differs in codec parameters from the videos before it")
        start = self.num_frames
        with av.open(video.path) as source:
            template = source.streams.video[0]
            if self._begun is None:
                stream = self._container.add_stream_from_template(template, opaque=True)
                stream.time_base = self._time_base
                self._begun = video, stream
            first, stream = self._begun
            packets = (packet for packet in source.demux(template) if packet.dts is not None)
            for number, (packet, frame) in enumerate(zip(packets, video.order, strict=True)):
                packet.stream = stream
                packet.time_base = self._time_base
                packet.pts = (start + frame) * self._ticks
                packet.dts = (start + number - first.delay) * self._ticks
                packet.duration = self._ticks
                self._container.mux_one(packet)
        self.num_frames += video.num_frames
        self.num_bytes += video.num_bytes
        return start

    def close(self) -> None:
        """Write the index, so that the file can be read."""
        self._container.close()


def sample_frames(video: Video, wanted: Iterable[int]) -> Iterator[np.ndarray]:
    """Yield some frames, ascending, as uint8 RGB [H, W, 3], decoding no more than they need.

    In place of a frame that cannot be decoded, as at the start of an open group of pictures, comes the next one.
    """
    with av.open(video.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = container.decode(stream)
        last = -1
        for number in wanted:
            keyframe = video.keyframes[bisect_right(video.keyframes, number) - 1]
            if keyframe > last + 1:
                container.seek(video.pts[keyframe], stream=stream)
                frames = container.decode(stream)
            last = number
            for frame in frames:
                if frame.pts is not None and frame.pts >= video.pts[number]:
                    yield frame.to_ndarray(format="rgb24")
                    break
