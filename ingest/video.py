"""Copy one episode's packets out of a video file, without re-encoding."""

import hashlib
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ingest.decoders import DECODERS, Source, backend_for, codec_of, name_of, open_video, read_packets
from lake.errors import EpisodeError

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer, OutputContainer
    from av.video.stream import VideoStream

MAX_HELD_BYTES = 256 << 20
"""A clip whose first frame needs more bytes of packets before it than this is refused."""
MAX_GAP_S = 3600
"""A video with longer gaps is refused: FFmpeg aborts the whole process where an mp4 cannot hold a gap."""

_MP4_OPTIONS = {
    "movflags": "faststart+negative_cts_offsets",  # The index in front, and B-frames without an edit list.
    "use_editlist": "0",
    "fflags": "bitexact",
}
_PARAMETER_SETS = {"h264": (0, 0x1F, range(7, 10)), "hevc": (1, 0x3F, range(32, 36))}
"""Shift and mask that give a NAL unit's kind, and the kinds of parameter sets and delimiters."""
_FOREVER = 1 << 62  # Ticks: later than any time in a file.


@dataclass(frozen=True, slots=True)
class Clip:
    """One episode's stretch of a video, as copied."""

    codec: str
    """What is inside: av1, h264, hevc, mpeg4 or vp9."""
    width: int
    """Of the frames, in pixels."""
    height: int
    """Of the frames, in pixels."""
    num_lead_frames: int
    """Frames shown before the episode's first one, copied because that one is decoded from them."""
    num_frames: int
    """Frames of the episode. The mp4 may show a few more behind them that the last ones are decoded from."""
    num_bytes: int
    """Of all packets copied."""
    packets_sha256: str
    """Digest of the episode's own packets in file order: the same in a file of its own and in a concatenated one."""


def read_clip(
    source: Source,
    *,
    start_s: float = 0.0,
    end_s: float | None = None,
    fps: float | None = None,
    dest: Path | None = None,
) -> Clip:
    """Find the frames of one episode in a video file, hash their packets and copy these to an mp4 of their own.

    The episode's frames are those shown in [start_s - half a frame, end_s - half a frame), counted from the first frame
    that the file shows. The mp4 starts at time 0 with a keyframe, has no edit list, and is the same bytes every time.

    Args:
        end_s: None means to the end of the file.
        fps: frames/s; None takes what the file says.
        dest: where the mp4 goes; None only reads. It is removed again if the video turns out to be bad.

    Raises:
        EpisodeError: video-empty, lfs-pointer, video-truncated, video-undecodable, video-too-large or unknown-codec.
        FileNotFoundError: no file at this path.
        ValueError: an empty or endless stretch of time, or an impossible fps.
    """
    if not 0 <= start_s < (inf if end_s is None else end_s) or end_s == inf:
        raise ValueError(f"no time between start_s={start_s} and end_s={end_s}; give 0 <= start_s < end_s")
    if fps is not None and not 0 < fps < inf:
        raise ValueError(f"fps={fps}; give a positive number, or None to take the file's")
    name = name_of(source)
    with open_video(source) as (container, stream), _mp4(dest, stream) as output:
        length_bytes = _nal_length_bytes(stream)
        digest, num_bytes, num_frames, others = hashlib.sha256(), 0, 0, []
        first, offset = _FOREVER, None
        for timed, is_wanted in _select(container, stream, _window(stream, start_s, end_s, fps, name), name):
            packet, pts, dts = timed
            num_bytes += packet.size
            if is_wanted:
                coded = _coded_bytes(bytes(packet), codec_of(stream), length_bytes)
                digest.update(len(coded).to_bytes(8, "big") + coded)
                num_frames += 1
                first = min(first, pts)
            else:
                others.append(pts)
            if output is not None:
                offset = pts if offset is None else offset
                packet.pts, packet.dts, packet.stream = pts - offset, dts - offset, output.streams[0]
                output.mux(packet)
        if num_frames == 0:
            raise EpisodeError("video-truncated", f"{name} shows no frame from {start_s} to {end_s} s")
        num_lead = sum(pts < first for pts in others)
        codec, width, height = codec_of(stream), stream.width, stream.height
        return Clip(codec, width, height, num_lead, num_frames, num_bytes, digest.hexdigest())


def decode_clip(
    path: Source, *, clip: Clip, longer_side: int, backend: str | None = None
) -> Generator[np.ndarray, None, None]:
    """Decode the episode's frames from the mp4 that ``read_clip`` wrote, in the order in which they are shown.

    Args:
        clip: what ``read_clip`` returned for it.
        longer_side: of the images, in pixels; frames are shrunk to it but never enlarged.
        backend: pyav, torchcodec or decord; None takes the codec's fastest.

    Returns:
        Exactly ``clip.num_frames`` images, uint8 [H, W, 3], decoded as they are asked for.

    Raises:
        EpisodeError: video-truncated or video-undecodable, also while iterating.
        ValueError: an unknown back end, one that is not installed, or one that cannot decode this codec.
    """
    decode = DECODERS[backend_for(clip.codec, backend)]
    size = (clip.width, clip.height)
    return decode(path, size=size, first=clip.num_lead_frames, count=clip.num_frames, longer_side=longer_side)


def packets(path: Source) -> Iterator[bytes]:
    """Yield the payload of each packet of the first video stream, in file order.

    Raises:
        EpisodeError: as for ``read_clip``.
    """
    with open_video(path) as (container, stream):
        for packet in read_packets(container, stream, name_of(path)):
            yield bytes(packet)


class _Timed(NamedTuple):
    """A packet with its times, in ticks of the stream."""

    packet: "Packet"
    pts: int
    dts: int


@dataclass(frozen=True, slots=True)
class _Window:
    """The time in which the wanted frames are shown, in ticks of the stream."""

    low: int
    high: int
    seek_to: int | None
    """None is the start of the file."""

    def shows(self, timed: _Timed) -> bool:
        return self.low <= timed.pts < self.high and not timed.packet.is_discard


def _window(stream: "VideoStream", start_s: float, end_s: float | None, fps: float | None, name: str) -> _Window:
    if start_s == 0 and end_s is None:
        return _Window(-_FOREVER, _FOREVER, None)
    rate = Fraction(fps).limit_denominator(100_000) if fps else stream.average_rate
    if not rate or rate < 0 or not stream.time_base:
        raise EpisodeError("video-undecodable", f"{name} does not say how many frames per second it has; give fps")
    origin, per_s, half_frame_s = stream.start_time or 0, 1 / stream.time_base, 1 / (2 * rate)
    low = origin + ceil((Fraction(start_s) - half_frame_s) * per_s)
    high = _FOREVER if end_s is None else origin + ceil((Fraction(end_s) - half_frame_s) * per_s)
    # A little late, because start_s is rounded and its frame is often a keyframe.
    seek_to = origin + int((Fraction(start_s) + half_frame_s / 2) * per_s)
    return _Window(low, high, min(seek_to, _FOREVER) if start_s else None)


def _timed_packets(container: "InputContainer", stream: "VideoStream", name: str) -> Iterator[_Timed]:
    """Yield the stream's packets from where it stands, with times that an mp4 can hold."""
    limit = min(1 << 30, int(MAX_GAP_S / (stream.time_base or 1)))
    last_dts = None
    for packet in read_packets(container, stream, name):
        pts, dts = packet.pts, packet.dts
        if pts is None or dts is None or pts < dts or (last_dts is not None and dts <= last_dts):
            raise EpisodeError("video-undecodable", f"{name} has times that run backwards at tick {dts}")
        if max(pts - dts, packet.duration or 0, 0 if last_dts is None else dts - last_dts) > limit:
            raise EpisodeError("video-undecodable", f"{name} has gaps of more than {MAX_GAP_S} s at tick {dts}")
        last_dts = dts
        yield _Timed(packet, pts, dts)


def _select(
    container: "InputContainer", stream: "VideoStream", window: _Window, name: str
) -> Iterator[tuple[_Timed, bool]]:
    """Yield the packets to copy, in file order from a keyframe on, and whether each belongs to the episode."""
    lead, more = _lead_in(container, stream, window, name)
    if not lead:
        return
    held, num_held_bytes, last_dts = [], 0, lead[0].dts
    for timed in chain(lead, more):
        if timed.dts >= window.high:
            return
        last_dts = timed.dts
        is_wanted = window.shows(timed)
        held.append(timed)
        num_held_bytes += timed.packet.size
        _check_held(num_held_bytes, name)
        if is_wanted:
            yield from ((other, other is timed) for other in held)
            held, num_held_bytes = [], 0
    index = stream.index_entries
    if len(index) and index[-1].timestamp > last_dts:
        raise EpisodeError("video-truncated", f"{name} ends before its index does; copy or download it again")


def _lead_in(
    container: "InputContainer", stream: "VideoStream", window: _Window, name: str
) -> tuple[list[_Timed], Iterator[_Timed]]:
    """Find the last keyframe from which the first wanted frame can be decoded.

    Returns:
        The packets from that keyframe on, as far as they had to be read, and those that follow. No packets where no
        frame is wanted.
    """
    from av.error import FFmpegError

    seek_to, earliest_dts = window.seek_to, _FOREVER
    try:
        while True:
            if seek_to is not None:
                container.seek(seek_to, stream=stream)
            more = _timed_packets(container, stream, name)
            begin = next(more, None)
            if begin is None:
                return [], more
            lead = _from_keyframe(chain([begin], more), window, name)
            if lead is not None and (seek_to is None or not _may_be_late(begin, stream, window)):
                return lead, more
            if seek_to is None or begin.dts >= earliest_dts:
                raise EpisodeError("video-undecodable", f"{name} has no keyframe before the episode")
            seek_to, earliest_dts = begin.dts - 1, begin.dts
    except FFmpegError as error:
        raise EpisodeError("video-undecodable", f"{name} has no keyframe before the episode") from error


def _may_be_late(begin: _Timed, stream: "VideoStream", window: _Window) -> bool:
    """Whether a wanted frame may come before the keyframe that a seek led to."""
    index = stream.index_entries
    at = index.search_timestamp(begin.dts, any_frame=True)
    return at > 0 and begin.pts - (begin.dts - index[at - 1].timestamp) >= window.low


def _from_keyframe(timed_packets: Iterator[_Timed], window: _Window, name: str) -> list[_Timed] | None:
    """Read until the first frame shown is known, and return the packets from its keyframe on.

    Its keyframe is the last one before it in file order that is not shown after it: an open GOP begins with frames that
    are shown before its keyframe, and these need the GOP before.

    Returns:
        No packets where no frame is wanted, None where there is no such keyframe.
    """
    lead, num_bytes, num_until_wanted, shown = [], 0, 0, _FOREVER
    for timed in timed_packets:
        lead.append(timed)
        num_bytes += timed.packet.size
        _check_held(num_bytes, name)
        if window.shows(timed):
            num_until_wanted = num_until_wanted or len(lead)
            shown = min(shown, timed.pts)
        if timed.dts >= (shown if num_until_wanted else window.high):
            break
    if not num_until_wanted:
        return []
    keys = [i for i in range(num_until_wanted) if lead[i].packet.is_keyframe and lead[i].pts <= shown]
    if not keys:
        return None
    key, *rest = lead[keys[-1] :]
    while rest and rest[0].pts < key.pts:  # It needs packets before the keyframe, and nothing shown later needs it.
        key = key._replace(dts=rest.pop(0).dts)
    return [key, *(timed for timed in rest if timed.pts >= key.pts)]


def _check_held(num_bytes: int, name: str) -> None:
    if num_bytes > MAX_HELD_BYTES:
        raise EpisodeError("video-too-large", f"{name} needs {num_bytes} bytes held to find where the episode begins")


@contextmanager
def _mp4(dest: Path | None, template: "VideoStream") -> Iterator["OutputContainer | None"]:
    """Open an mp4 file for the packets of a stream; remove it if the block raises."""
    import av

    if dest is None:
        yield None
        return
    with ExitStack() as on_error:
        on_error.callback(dest.unlink, missing_ok=True)
        with av.open(f"file:{dest}", "w", format="mp4", options=_MP4_OPTIONS) as output:
            output.add_stream_from_template(template, opaque=True)
            yield output
        on_error.pop_all()


def _nal_length_bytes(stream: "VideoStream") -> int:
    """Return how many bytes the length before each NAL unit has; 0 where packets have no such units.

    Source: ISO/IEC 14496-15, the avcC and hvcC boxes.
    """
    extradata = stream.codec_context.extradata or b""
    at = {"h264": 4, "hevc": 21}.get(codec_of(stream), len(extradata))
    return (extradata[at] & 3) + 1 if extradata[:1] == b"\1" and at < len(extradata) else 0


def _coded_bytes(payload: bytes, codec: str, length_bytes: int) -> bytes:
    """Return a packet without parameter sets and delimiters, each NAL unit behind its length in four bytes.

    Where H.264 files are concatenated, FFmpeg copies the parameter sets from their heads into their packets.
    """
    if not length_bytes:
        return payload
    shift, mask, kinds = _PARAMETER_SETS[codec]
    parts, at = [], 0
    while at < len(payload):
        begin = at + length_bytes
        at = begin + int.from_bytes(payload[at:begin], "big")
        if at == begin or at > len(payload):
            return payload
        if payload[begin] >> shift & mask not in kinds:
            parts += (at - begin).to_bytes(4, "big"), payload[begin:at]
    return b"".join(parts)
