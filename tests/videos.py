"""Small videos that tests make, and short ways to look at them."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ingest.video_writer import start_encoding
from lake.errors import EpisodeError
from lake.images import rgb_of_frame

FPS = 30
ENCODERS = {"av1": "libsvtav1", "h264": "libx264", "hevc": "libx265", "mpeg4": "mpeg4", "vp9": "libvpx-vp9"}


def make_video(path: Path, codec: str, *, num_frames: int = 20, gop: int = 10, b_frames: int = 0, **kw) -> Path:
    """Encode moving blocks of 64 x 48 pixels, with open GOPs where there are B-frames.

    Other arguments: seed, size, rate, time_base, times (of each frame, in ticks), audio, options, container_options.
    """
    width, height = kw.get("size", (64, 48))
    rate, times = kw.get("rate", Fraction(FPS)), kw.get("times") or range(num_frames)
    time_base = kw.get("time_base", 1 / Fraction(rate))
    options = {"g": str(gop)} | {
        "av1": {"preset": "12", "svtav1-params": "lp=1"},
        "h264": {"x264-params": f"bframes={b_frames}:open-gop=1:b-adapt=0"},
        "hevc": {"x265-params": f"bframes={b_frames}:open-gop=1:keyint={gop}:pools=none:log-level=none"},
    }.get(codec, {})
    still = np.random.default_rng(kw.get("seed", 0)).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    with av.open(str(path), "w", container_options=kw.get("container_options") or {}) as container:
        stream = container.add_stream(ENCODERS.get(codec, codec), rate=rate, options=options | kw.get("options", {}))
        stream.width, stream.height, stream.pix_fmt = width, height, kw.get("pix_fmt", "yuv420p")
        stream.codec_context.gop_size, stream.codec_context.time_base = gop, time_base
        stream.codec_context.thread_count = 1
        if codec in ("h264", "mpeg4"):
            stream.codec_context.max_b_frames = b_frames
        sound = container.add_stream("aac", rate=16_000, layout="mono") if kw.get("audio") else None
        start_encoding(container)
        for at, time in zip(range(num_frames), times, strict=True):
            cells = np.roll(still, (at, 2 * at), (0, 1))
            image = np.kron(cells, np.ones((height // 12 + 1, width // 16 + 1, 1), np.uint8))[:height, :width]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))
            if sound is not None:
                noise = av.AudioFrame.from_ndarray(np.full((1, 1024), at, np.float32), format="fltp", layout="mono")
                noise.sample_rate, noise.pts = 16_000, 1024 * at
                container.mux(sound.encode(noise))
        container.mux(stream.encode(None))
        if sound is not None:
            container.mux(sound.encode(None))
    return path


def concatenate(paths: list[Path], dest: Path) -> Path:
    """Join video files as LeRobot v3 datasets are made: FFmpeg's concat demuxer, packets copied."""
    listing = dest.with_suffix(".txt")
    listing.write_text("".join(f"file '{path}'\n" for path in paths))
    with av.open(str(listing), format="concat", options={"safe": "0"}) as source, av.open(str(dest), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    return dest


def decode_all(path: Path, longer_side: int = 224) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [rgb_of_frame(frame, longer_side) for frame in container.decode(video=0)]


def same(images, others) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(images, others, strict=True))


def reason_of(call, *args, **kwargs) -> str:
    with pytest.raises(EpisodeError) as caught:
        call(*args, **kwargs)
    assert caught.value.message
    return caught.value.reason
