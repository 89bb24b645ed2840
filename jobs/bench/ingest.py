"""Measure a whole ingestion against a bare loop of decode, resize and JPEG."""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import ingest
from jobs.bench.datasets import make_source, repeat_source
from jobs.bench.memory import peak_memory
from jobs.cluster import connect
from lake.images import encode_jpeg, rgb_of_frame


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Ingest a dataset, and between two passes of a bare loop over the same videos; compare frames/s.

    The bare loop decodes with PyAV, resizes and encodes JPEGs, with the same functions, on as many processes, and
    writes nothing. The whole job also reads columns, checks, hashes, copies packets, computes statistics, writes three
    tables, commits, reads everything back and releases. Ray's own start is not counted.
    """

    source: str = ""
    """A local LeRobot v2.x dataset, which is repeated; empty makes one."""
    frames: int = 100_000
    """Repeat the dataset up to about so many frames."""
    bare_frames: int = 20_000
    """Frames of each pass of the bare loop."""
    processes: int = len(os.sched_getaffinity(0))
    """Processes of the bare loop, and CPUs of Ray."""
    small: int = 10
    """Also ingest only so many episodes, for the memory's sake; 0 leaves it out."""


def run(config: Config) -> dict[str, Any]:
    """Return {"what", "numbers", "rows"}.

    Raises:
        ValueError: the source is not a local LeRobot v2.x dataset.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-ingest-")))
        source = Path(config.source) if config.source else make_source(folder / "made")
        per_episode = _mean_frames(source)
        episodes = max(1, round(config.frames / per_episode))
        repeated = repeat_source(source, folder / "repeated", episodes)
        videos = sorted(str(path.resolve()) for path in (repeated / "videos").rglob("*.mp4"))
        os.environ.setdefault("RAY_TMPDIR", stack.enter_context(tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp")))
        connect(num_cpus=config.processes)
        rows: list[dict[str, Any]] = []
        if config.small:
            few = repeat_source(source, folder / "few", config.small)
            rows.append(_job(few, folder / "small-lake", name="small"))
        rows.append(_bare(videos, config))
        rows.append(_job(repeated, folder / "lake", name="whole"))
        rows.append(_bare(videos, config))
    whole = next(row for row in rows if row["side"] == "whole")
    bare = statistics.mean(row["frames_per_s"] for row in rows if row["side"] == "bare")
    numbers = {
        "ratio": whole["frames_per_s"] / bare,
        "frames_per_s": whole["frames_per_s"],
        "bare_frames_per_s": bare,
        "frames": whole["frames"],
        "episodes": episodes,
        "peak_mib": whole["peak_mib"],
    }
    if config.small:
        numbers["peak_mib_of_few_episodes"] = rows[0]["peak_mib"]
    return {"what": "frames/s of a whole ingestion over a bare loop", "numbers": numbers, "rows": rows}


def _job(source: Path, lake: Path, *, name: str) -> dict[str, Any]:
    with peak_memory() as peaks:
        result = ingest.run(ingest.Config(source=str(source), lake=str(lake), name="bench"))
    row = {
        "side": name,
        "frames": result["frames"],
        "seconds": result["seconds"],
        "frames_per_s": result["frames"] / result["seconds"],
        "phases_s": result["phases_s"],
        "peak_mib": peaks.largest_mib,
        "peaks_mib": peaks.mib,
    }
    print(row, file=sys.stderr, flush=True)
    return row


def _bare(videos: list[str], config: Config) -> dict[str, Any]:
    """Decode, resize and encode videos until there are enough frames, on several processes."""
    with multiprocessing.get_context("spawn").Pool(config.processes) as pool:
        pool.map(_loop, videos[: config.processes], chunksize=1)  # Loads the libraries.
        since, frames = time.perf_counter(), 0
        for done in pool.imap_unordered(_loop, _enough(videos, config.bare_frames)):
            frames += done
        seconds = time.perf_counter() - since
    row = {"side": "bare", "frames": frames, "seconds": seconds, "frames_per_s": frames / seconds}
    print(row, file=sys.stderr, flush=True)
    return row


def _enough(videos: list[str], frames: int) -> list[str]:
    import av

    chosen: list[str] = []
    while frames > 0:
        for path in videos:
            with av.open(path) as container:
                frames -= container.streams.video[0].frames or 1
            chosen.append(path)
            if frames <= 0:
                break
    return chosen


def _loop(path: str) -> int:
    import av
    from av.video.reformatter import VideoReformatter

    count = 0
    reformatter = VideoReformatter()
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for frame in container.decode(video=0):
            encode_jpeg(rgb_of_frame(frame, 224, reformatter))
            count += 1
    return count


def _mean_frames(source: Path) -> float:
    from ingest.files import open_files
    from ingest.formats import format_of, open_source

    opened = open_source(open_files(str(source)), {})
    lengths = [ref.num_frames for refs in format_of(opened).discover(opened) for ref in refs]
    return statistics.mean(lengths)
