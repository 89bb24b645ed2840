"""Derive frames at another resolution from the lake's own videos."""

import sys
import time
from dataclasses import dataclass
from typing import Any

from ingest.derive import derive
from jobs.cluster import connect
from jobs.command import main_of
from lake import Lake


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Derive frames at another resolution from the lake's own videos, and release them.

    Running it again takes only the episodes that are new.
    """

    lake: str
    """Path or s3:// URI of the lake."""
    resolution: int
    """Longer side in pixels; smaller videos are not enlarged."""
    num_cpus: int | None = None
    """CPUs of a Ray started for this job; by default all."""


def run(config: Config) -> dict[str, Any]:
    """Derive; return what the job's last line says."""
    if config.resolution < 16:
        raise ValueError(f"resolution={config.resolution} is less than 16 pixels")
    lake = Lake(config.lake)
    connect(num_cpus=config.num_cpus)
    began = time.perf_counter()
    total = 0

    def say(done: int, episodes: int) -> None:
        nonlocal total
        total = episodes
        print(f"derive: {done:,} of {episodes:,} episodes", file=sys.stderr, flush=True)

    release = derive(lake, config.resolution, say)
    return {
        "lake": lake.uri,
        "table": f"frames_{config.resolution}",
        "episodes": total,
        "release": release.name,
        "seconds": round(time.perf_counter() - began, 3),
    }


main = main_of(Config, run)

if __name__ == "__main__":
    main()
