"""Export a release as a LeRobot v3.0 dataset, without encoding anything again."""

import sys
import time
from dataclasses import dataclass
from typing import Any

from ingest.export import export_lerobot
from jobs.command import main_of
from lake import Lake


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Export a release as a LeRobot v3.0 dataset, without encoding anything again."""

    lake: str
    """Path or s3:// URI of the lake."""
    out: str
    """Directory or fsspec URI of the dataset; nothing may be there yet."""
    release: str | None = None
    """Name of the release; by default the newest."""
    where: str | None = None
    """SQL condition on the columns of `episodes`, such as "source = 'so100'"; by default all."""


def run(config: Config) -> dict[str, Any]:
    """Export; return what the job's last line says."""
    began = time.perf_counter()
    release = Lake(config.lake).release(config.release)

    def say(done: int, total: int) -> None:
        if done == total or done % 50 == 0:
            print(f"export: {done:,} of {total:,} episodes", file=sys.stderr, flush=True)

    counts = export_lerobot(release, config.out, where=config.where, say=say)
    seconds = round(time.perf_counter() - began, 3)
    return {"out": config.out, "release": release.name, **counts, "seconds": seconds}


main = main_of(Config, run)

if __name__ == "__main__":
    main()
