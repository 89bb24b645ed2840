"""Measure random access to a lake's frames against PyAV on the source's videos."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.bench.datasets import ingested, make_source
from lake import Lake, Release
from lake.images import decode_jpeg, rgb_of_frame

if TYPE_CHECKING:
    from av.container import InputContainer

Frame = tuple[str, int]
"""Episode uid and index of a frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Read random frames, decoded to RGB with the longer side at 224, on one thread, from all sides in turn.

    The lake is read as a loader reads it: so many frames in one request; and one by one. PyAV keeps its files open,
    seeks to the keyframe before, decodes up to the frame and resizes in the same pass.
    """

    source: str = ""
    """A dataset that is ingested; empty makes one."""
    frames: int = 512
    """Random frames of each pass."""
    batch: int = 256
    """Frames of one request to the lake."""
    block: int = 64
    """Frames of a block, for the passes that read blocks."""
    repeats: int = 3
    """Passes; the median counts."""
    bucket: str = "lake"
    """Bucket of the object store."""


def run(config: Config) -> dict[str, Any]:
    """Return {"what", "numbers", "rows"}."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-scan-")))
        source = config.source or str(make_source(folder / "made", num_frames=480))
        lakes = stack.enter_context(ingested(source, folder, config.bucket))
        releases = {where: Lake(uri).release() for where, uri in lakes.items()}
        files = _videos(releases["local"], folder)
        rows: list[dict[str, Any]] = []
        for repeat in range(config.repeats):
            rows += _pass(config, releases, files, seed=repeat)
    numbers = _numbers(rows)
    return {"what": "random frames/s from a lake over PyAV from the source's videos", "numbers": numbers, "rows": rows}


def _pass(config: Config, releases: dict[str, Release], files: dict[str, Path], seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    lengths = dict(
        zip(*releases["local"].episodes(columns=["episode_uid", "num_frames"]).to_pydict().values(), strict=True)
    )
    uids = list(lengths)
    single = [(uid, int(rng.integers(lengths[uid]))) for uid in rng.choice(uids, config.frames).tolist()]
    starts = [(uid, int(rng.integers(max(1, lengths[uid] - config.block)))) for uid in rng.choice(uids, 8).tolist()]
    blocks = [(uid, first + i) for uid, first in starts for i in range(min(config.block, lengths[uid] - first))]
    sides: dict[str, Callable[[], int]] = {}
    for where, release in releases.items():
        reader = _LakeReader(release)
        sides[f"{where} single"] = lambda reader=reader: reader.read(single, config.batch)
        sides[f"{where} one by one"] = lambda reader=reader: reader.read(single[: config.frames // 4], 1)
        sides[f"{where} block"] = lambda reader=reader: reader.read(blocks, config.block)
    sides["pyav single"] = lambda: _read_pyav(single[: config.frames // 2], files)
    sides["pyav block"] = lambda: _read_pyav_blocks(starts, config.block, lengths, files)
    rows: list[dict[str, Any]] = []
    for side, read in sides.items():
        since = time.perf_counter()
        count = read()
        seconds = time.perf_counter() - since
        rows.append({"side": side, "seed": seed, "frames": count, "seconds": seconds, "frames_per_s": count / seconds})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


class _LakeReader:
    """Reads frames of a release by their row ids, as a loader does that knows the index."""

    def __init__(self, release: Release) -> None:
        index = release.episodes(columns=["episode_uid", "frames_first_row"]).to_pydict()
        self._first = dict(zip(index["episode_uid"], index["frames_first_row"], strict=True))
        self._release = release

    def read(self, frames: list[Frame], batch: int) -> int:
        count = 0
        for start in range(0, len(frames), batch):
            rows = [self._first[uid] + index for uid, index in frames[start : start + batch]]
            for views in self._release.take_frames(rows, ["views"]).column("views"):
                for view in views:
                    decode_jpeg(view.as_py())
                count += 1
        return count


def _videos(release: Release, folder: Path) -> dict[str, Path]:
    """Write each episode's first view to a file: the source's packets, one episode a file."""
    files: dict[str, Path] = {}
    for episode in release.episodes(columns=["episode_uid", "views"]).to_pylist():
        path = folder / f"{episode['episode_uid']}.mp4"
        path.write_bytes(release.video(episode["episode_uid"], episode["views"][0]))
        files[episode["episode_uid"]] = path
    return files


def _read_pyav(frames: list[Frame], files: dict[str, Path]) -> int:
    import av

    opened = {uid: av.open(str(path)) for uid, path in files.items()}
    count = 0
    for uid, index in frames:
        count += _decode_from(opened[uid], index, 1)
    for container in opened.values():
        container.close()
    return count


def _read_pyav_blocks(starts: list[Frame], block: int, lengths: dict[str, int], files: dict[str, Path]) -> int:
    import av

    count = 0
    for uid, first in starts:
        with av.open(str(files[uid])) as container:
            count += _decode_from(container, first, min(block, lengths[uid] - first))
    return count


def _decode_from(container: "InputContainer", first: int, wanted: int) -> int:
    """Decode frames from an index on; return how many there were."""
    stream = container.streams.video[0]
    rate, base = stream.average_rate, stream.time_base
    assert rate
    assert base
    target = round(first / rate / base)
    container.seek(target, stream=stream)
    count = 0
    for frame in container.decode(stream):
        if frame.pts is not None and frame.pts >= target:
            rgb_of_frame(frame, 224)
            count += 1
            if count == wanted:
                break
    return count


def _numbers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {}
    for row in rows:
        speeds.setdefault(row["side"], []).append(row["frames_per_s"])
    median = {side: statistics.median(values) for side, values in speeds.items()}
    return {
        "ratio": median["local single"] / median["pyav single"],
        "ratio_s3": median["s3 single"] / median["pyav single"],
        "ratio_one_by_one": median["local one by one"] / median["pyav single"],
        "ratio_block": median["local block"] / median["pyav block"],
        "ratio_block_s3": median["s3 block"] / median["pyav block"],
        "frames_per_s": median,
    }
