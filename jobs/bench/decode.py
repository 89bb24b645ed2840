"""Measure how fast each back end turns a video into small RGB images and JPEGs on one core."""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ingest.decoders import DECODERS, backend_for
from ingest.video import Clip, decode_clip, open_video, read_clip, read_packets
from ingest.video_writer import start_encoding
from lake.images import encode_jpeg

GOPS = (2, 250)
ENCODERS = {
    "av1": ("libsvtav1", {"crf": "30", "preset": "8", "svtav1-params": "lp=1"}),
    "h264": ("libx264", {"crf": "23", "preset": "veryfast"}),
    "hevc": ("libx265", {"crf": "28", "preset": "ultrafast", "x265-params": "log-level=none:pools=1"}),
    "mpeg4": ("mpeg4", {"b": "6M"}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Decode videos with every back end that is installed."""

    source: str = ""
    """A video file, or a folder of them; empty makes moving textures of 640 x 480 in every codec, at GOP 2 and 250."""
    max_files: int = 4
    """From a folder, at most so many files."""
    num_frames: int = 250
    """At most so many frames of each video."""
    longer_side: int = 224
    """Of the images, in pixels."""
    repeats: int = 3
    """Passes over everything; the median counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One pass over one video by one back end."""

    video: str
    codec: str
    gop: int
    width: int
    height: int
    backend: str
    num_frames: int
    decode_cpu_s: float
    jpeg_cpu_s: float
    wall_s: float


def run(config: Config) -> dict:
    """Return {"what", "numbers", "rows"}; the numbers are by codec, GOP and back end.

    Speeds are frames per second of processor time, all threads together, so that what else runs on the machine hardly
    counts. ``ratio`` is to PyAV on the same videos.

    Raises:
        ValueError: no video in the source.
    """
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        with tempfile.TemporaryDirectory(prefix="bench-decode-") as folder:
            rows = list(_measure(config, Path(folder)))
    finally:
        os.sched_setaffinity(0, cpus)
    return {
        "what": f"frames per second of one core, from mp4 to RGB of at most {config.longer_side} pixels a side",
        "numbers": _summary(rows),
        "rows": [asdict(row) for row in rows],
    }


def _measure(config: Config, folder: Path) -> Iterator[Row]:
    clips = []
    for number, path in enumerate(_sources(config, folder)):
        clip_path = folder / f"clip-{number}.mp4"
        gop, fps = _gop_fps(path)
        end_s = config.num_frames / fps
        clips.append((path.stem, gop, clip_path, read_clip(path, end_s=end_s, fps=fps, dest=clip_path)))
    # The repeats are outermost: a slow minute of the machine then hits every back end alike.
    for repeat, (video, gop, path, clip), backend in product(range(config.repeats), clips, DECODERS):
        try:
            backend_for(clip.codec, backend)
        except ValueError as error:
            if repeat == 0:
                print(f"left out {backend} on {video}: {error}", file=sys.stderr)
            continue
        row = _time(path, clip, backend, config.longer_side, video=video, gop=gop)
        print(f"{repeat + 1}/{config.repeats} {row}", file=sys.stderr, flush=True)
        yield row


def _time(path: Path, clip: Clip, backend: str, longer_side: int, **about: Any) -> Row:
    next(decode_clip(path, clip=clip, longer_side=longer_side, backend=backend))  # Loads the library.
    began_wall, began = time.perf_counter(), time.process_time()
    jpeg_cpu_s = 0.0
    for rgb in decode_clip(path, clip=clip, longer_side=longer_side, backend=backend):
        began_jpeg = time.process_time()
        encode_jpeg(rgb)
        jpeg_cpu_s += time.process_time() - began_jpeg
    decode_cpu_s, wall_s = time.process_time() - began - jpeg_cpu_s, time.perf_counter() - began_wall
    return Row(
        codec=clip.codec,
        width=clip.width,
        height=clip.height,
        backend=backend,
        num_frames=clip.num_frames,
        decode_cpu_s=decode_cpu_s,
        jpeg_cpu_s=jpeg_cpu_s,
        wall_s=wall_s,
        **about,
    )


def _summary(rows: list[Row]) -> dict:
    grouped: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.codec, row.gop, row.backend), []).append(row)
    numbers: dict[str, dict] = {}
    for (codec, gop, backend), same in grouped.items():
        numbers.setdefault(f"{codec} gop {gop}", {})[backend] = {
            "frames_per_s": statistics.median(row.num_frames / row.decode_cpu_s for row in same),
            "with_jpeg_frames_per_s": statistics.median(
                row.num_frames / (row.decode_cpu_s + row.jpeg_cpu_s) for row in same
            ),
        }
    for by_backend in numbers.values():
        for speeds in by_backend.values():
            speeds["ratio"] = speeds["frames_per_s"] / by_backend["pyav"]["frames_per_s"]
    return numbers


def _sources(config: Config, folder: Path) -> Iterator[Path]:
    if not config.source:
        for codec, gop in product(ENCODERS, GOPS):
            print(f"making {codec} at GOP {gop}", file=sys.stderr, flush=True)
            yield _moving_texture(folder / f"{codec}-{gop}.mp4", codec, gop, config.num_frames)
        return
    source = Path(config.source)
    paths = [source] if source.is_file() else sorted(source.rglob("*.mp4"))[: config.max_files]
    if not paths:
        raise ValueError(f"no video in {config.source!r}; give an mp4 file, or a folder with some")
    yield from paths


def _moving_texture(path: Path, codec: str, gop: int, num_frames: int) -> Path:
    """Encode a texture that drifts behind a still one, with camera noise, at 640 x 480 and 30 frames/s."""
    import av
    from av.video.stream import VideoStream

    rng = np.random.default_rng(0)
    far, near = (np.kron(rng.integers(0, 256, (60, 80, 3)), np.ones((8, 8, 1))) for _ in range(2))
    near_mask = np.kron(rng.random((6, 8, 1)) < 0.3, np.ones((80, 80, 1), bool))
    name, options = ENCODERS[codec]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(name, rate=30, options=options | {"g": str(gop)})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, 0
        start_encoding(container)
        for at in range(num_frames):
            image = np.where(near_mask, near, np.roll(far, (at, 2 * at), (0, 1))) + rng.normal(0, 2, far.shape)
            frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _gop_fps(path: Path) -> tuple[int, float]:
    """Return frames per keyframe, rounded, and frames per second."""
    with open_video(path) as (container, stream):
        keyframes = [packet.is_keyframe for packet in read_packets(container, stream, str(path))]
        return round(len(keyframes) / max(1, sum(keyframes))), float(stream.average_rate or 30)
