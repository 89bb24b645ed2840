"""Measure the loader against LeRobot's own, and against the JPEG decoder alone."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from jobs.bench.datasets import ingested, make_source
from jobs.bench.peer import Reading, as_lerobot_v3, lerobot_python, measure


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Count the samples that come out ready to train: decoded, normalised, packed, with their action chunks.

    LeRobot 0.4.4 reads the same episodes, exported from the lake with the source's own video packets, through its own
    dataset and loader; its faster video back end and number of processes count. Both sides have the same cores. Ours
    gives pictures at the lake's resolution as bytes, LeRobot gives them at the source's as floats; "floats" is ours
    with the conversion, which a GPU does in passing. "s3" reads every block from the object store every time, "s3
    cached" is how a loader reads by default.
    """

    source: str = ""
    """A dataset that is ingested; empty makes one of two cameras, 640 x 480, AV1."""
    episodes: int = 6
    """Of a made dataset."""
    frames: int = 240
    """Of each episode of a made dataset."""
    horizon: int = 50
    """Actions of a chunk."""
    threads: int = 0
    """Of our loader; 0 takes one for each core."""
    lanes: int = 2
    """That the rank owns."""
    workers: tuple[int, ...] = (0, 2)
    """Processes of LeRobot's loader; each number is tried, and the fastest counts."""
    batch: int = 32
    """Samples of one of LeRobot's batches; ours are packs of 16,384 tokens."""
    seconds: float = 15.0
    """Of each measurement."""
    repeats: int = 3
    """Rounds over all sides; medians count."""
    peer: bool = True
    """Whether LeRobot is measured; its environment takes some minutes to make, once."""
    bucket: str = "lake"
    """Bucket of the object store."""


def run(config: Config) -> dict[str, Any]:
    """Return {"what", "numbers", "rows"}."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-loader-")))
        source = config.source or str(
            make_source(folder / "made", episodes=config.episodes, num_frames=config.frames, views=2)
        )
        lakes = stack.enter_context(ingested(source, folder, config.bucket))
        ray.shutdown()  # Its processes would take part of the cores that are measured.
        peer = (as_lerobot_v3(lakes["local"], folder / "lerobot"), lerobot_python()) if config.peer else None
        rows: list[dict[str, Any]] = []
        backends: dict[tuple[int, bool], str] = {}
        for repeat in range(config.repeats):
            for row in _round(config, lakes, folder, peer, backends):
                rows.append({"repeat": repeat} | row)
                print(rows[-1], file=sys.stderr, flush=True)
    return {"what": "samples/s of the loader over LeRobot's", "numbers": _numbers(rows), "rows": rows}


def _round(
    config: Config,
    lakes: dict[str, str],
    folder: Path,
    peer: tuple[Path, Path] | None,
    backends: dict[tuple[int, bool], str],
) -> Iterator[dict[str, Any]]:
    """Measure every side once; sides that are compared follow each other.

    Args:
        backends: LeRobot's faster video back end, by processes and augmentation; the first round finds it out.
    """
    threads = config.threads or len(os.sched_getaffinity(0))
    common = {"horizon": config.horizon, "threads": threads, "lanes": config.lanes, "seconds": config.seconds}
    for augment in (False, True):
        for workers in config.workers if peer is not None else ():
            reading = Reading(
                horizon=config.horizon,
                batch_size=config.batch,
                workers=workers,
                augment=augment,
                seconds=config.seconds,
                backend=backends.get((workers, augment)),
            )
            assert peer is not None
            found = measure(peer[0], reading, python=peer[1])
            backends[workers, augment] = found["backend"]
            yield {"side": "lerobot", "augment": augment} | found
        for side in ("local", "local floats", "s3", "s3 cached"):
            asked = common | {"what": "load", "augment": augment, "floats": "floats" in side}
            asked |= {"lake": lakes["s3" if side.startswith("s3") else "local"]}
            asked |= {"cache_dir": str(folder / "cache") if "cached" in side else None}
            yield {"side": side, "augment": augment} | _rank(asked)
    decoder = common | {"what": "decoder", "augment": False, "lake": lakes["local"], "cache_dir": None}
    yield {"side": "decoder", "augment": False} | _rank(decoder)


def _rank(asked: dict[str, Any]) -> dict[str, Any]:
    """Measure one side of ours, in a process of its own."""
    command = [sys.executable, "-m", "jobs.bench.loader_rank", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a rank ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _numbers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def median(side: str, name: str, *, augment: bool = False) -> float:
        found = [row[name] for row in rows if (row["side"], row["augment"]) == (side, augment)]
        return statistics.median(found) if found else float("nan")

    numbers: dict[str, Any] = {}
    sides = ("local", "local floats", "s3", "s3 cached")
    for augment, suffix in ((False, ""), (True, "_augmented")):
        peer = _best_peer(rows, augment=augment)
        speeds = {side: median(side, "samples_per_s", augment=augment) for side in sides}
        numbers[f"samples_per_s{suffix}"] = speeds | {"lerobot": peer}
        if peer is not None:
            numbers |= {f"ratio{name}{suffix}": speeds[side] / peer for side, name in _RATIOS.items()}
    decoder = median("decoder", "images_per_s")
    numbers |= {
        "of_decoder": median("local", "images_per_s") / decoder,
        "of_decoder_s3": median("s3", "images_per_s") / decoder,
        "decoder_images_per_s": decoder,
        "first_pack_s": {side: median(side, "first_pack_s") for side in sides},
        "peak_rss_mib": {side: median(side, "peak_rss_mib") for side in sides},
        "fill_tokens": median("local", "fill_tokens"),
    }
    return numbers


_RATIOS = {"local": "", "s3": "_s3", "local floats": "_floats", "s3 cached": "_s3_cached"}


def _best_peer(rows: list[dict[str, Any]], *, augment: bool) -> float | None:
    """Return LeRobot's speed with the number of processes that is best for it."""
    by_workers: dict[int, list[float]] = {}
    for row in rows:
        if row["side"] == "lerobot" and row["augment"] == augment:
            by_workers.setdefault(row["workers"], []).append(row["samples_per_s"])
    return max(map(statistics.median, by_workers.values()), default=None) if by_workers else None
