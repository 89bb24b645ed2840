"""Ingest a source into a lake: every new episode exactly once, then a release."""

import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

from ingest.features import parse_map
from ingest.files import open_files
from ingest.formats import open_source
from ingest.pipeline import Limits, Progress, ingest
from ingest.task import Profile
from jobs.cluster import connect
from jobs.command import main_of
from lake import Lake


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Ingest a source into a lake: every new episode exactly once, then a release.

    Running it again takes only what is new. A run that died is carried on.
    """

    source: str
    """Path or URI of the source: a local folder, s3://BUCKET/PATH, or whatever fsspec reaches."""
    lake: str
    """Path or s3:// URI of the lake; made where there is none."""
    name: str | None = None
    """Name of the source in the lake; by default the last part of its URI."""
    limit: int | None = None
    """Take only the first so many episodes of the source."""
    max_bad_fraction: float = 0.5
    """Fail where more of the source's episodes than this are bad."""
    resolution: int = 224
    """Longer side of the stored views in pixels; smaller videos are not enlarged."""
    map: tuple[str, ...] = ()
    """What features mean: state=F, action=F, view.NAME=F, ignore=F; join with '+'."""
    accept: tuple[Literal["black-video", "frozen-video"], ...] = ()
    """Suspicious episodes that are taken all the same."""
    retry: bool = False
    """Try the source's episodes in quarantine again."""
    backend: Literal["pyav", "torchcodec", "decord"] | None = None
    """Video back end; by default the fastest for each codec."""
    num_cpus: int | None = None
    """CPUs of a Ray started for this job; by default all."""
    dashboard: bool = False
    """Whether a Ray started for this job has its dashboard."""


def run(config: Config) -> dict[str, Any]:
    """Ingest; return what the job's last line says."""
    if config.resolution < 16:
        raise ValueError(f"resolution={config.resolution} is less than 16 pixels")
    if not 0 <= config.max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction={config.max_bad_fraction} is not between 0 and 1")
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit={config.limit} takes no episode")
    feature_map = parse_map(config.map)
    files = open_files(config.source)
    source = open_source(files, feature_map)
    lake = Lake.create(config.lake, exist_ok=True)
    name = config.name or files.name
    if config.retry:
        lake.retry(name)
    connect(num_cpus=config.num_cpus, dashboard=config.dashboard)
    began = time.perf_counter()
    progress = Progress(say=_Printer(source.num_episodes))
    profile = Profile(
        source_name=name, resolution=config.resolution, backend=config.backend, accept=tuple(config.accept)
    )
    limits = Limits(max_bad_fraction=config.max_bad_fraction, episodes=config.limit)
    release = ingest(lake, source, profile, limits, progress)
    return {
        "source": name,
        "lake": lake.uri,
        "discovered": progress.discovered,
        "committed": progress.committed,
        "skipped": progress.skipped,
        "quarantined": progress.quarantined,
        "quarantined_new": progress.quarantined_new,
        "frames": progress.frames,
        "release": release.name if release else None,
        "release_id": release.id if release else None,
        "seconds": round(time.perf_counter() - began, 3),
        "phases_s": {phase: round(seconds, 3) for phase, seconds in progress.seconds.items()},
    }


class _Printer:
    """Prints a line on stderr when the phase changes, and every few seconds."""

    def __init__(self, num_episodes: int | None) -> None:
        self._num_episodes = num_episodes
        self._said = self._began = time.monotonic()
        self._phase = ""

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase == self._phase and now - self._said < 2.0:
            return
        self._said, self._phase = now, progress.phase
        rate = progress.frames / max(1e-9, now - self._began)
        left = max(0, progress.planned_frames - progress.frames)
        eta = f", {left / rate:,.0f} s left" if progress.frames and left else ""
        total = progress.discovered or self._num_episodes or 0
        print(
            f"[{now - self._began:6.1f} s] {progress.phase}: {progress.committed:,} of {total:,} episodes committed, "
            f"{progress.frames:,} frames ({rate:,.0f}/s{eta}), {progress.skipped:,} skipped, "
            f"{progress.quarantined:,} quarantined",
            file=sys.stderr,
            flush=True,
        )


main = main_of(Config, run)

if __name__ == "__main__":
    main()
