"""The main job end to end on this machine: real demonstrations, into a lake on an object store."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import s3fs

from jobs import ingest, record
from jobs.command import main_of
from jobs.pictures import contact_sheet
from jobs.store import Store, store_from_environment_or_local
from lake import Lake


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Record demonstrations, put them into an object store, ingest them into a lake, release, summarise.

    The store is the one of AWS_ENDPOINT_URL, or else one that is started here, on loopback.
    """

    out: str = "out/demo"
    """Folder of everything that the demo makes; what an earlier demo left there is replaced."""
    bucket: str = "lake"
    """Bucket of the store."""
    episodes: int = 6
    """Episodes of each task."""
    size: int = 128
    """Width and height of the cameras' pictures in pixels."""


@dataclass(kw_only=True)
class Work:
    """What the stages hand on to each other."""

    config: Config
    folder: Path
    store: Store
    results: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    @property
    def source(self) -> str:
        """The demonstrations in the object store."""
        return f"{self._prefix}/sources/metaworld"

    @property
    def lake(self) -> str:
        """The lake in the object store."""
        return f"{self._prefix}/lake"

    @property
    def _prefix(self) -> str:
        return f"s3://{self.store.bucket}/{self.folder.name}"


def run(config: Config) -> dict[str, Any]:
    """Run all stages; return what each of them says."""
    folder = _fresh(Path(config.out))
    began = time.perf_counter()
    with ExitStack() as stack:
        store = stack.enter_context(store_from_environment_or_local(folder / "store", bucket=config.bucket))
        os.environ.update(store.environment())
        os.environ.setdefault("RAY_TMPDIR", stack.enter_context(tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp")))
        work = Work(config=config, folder=folder, store=store)
        seconds: dict[str, float] = {}
        for number, (name, stage) in enumerate(STAGES.items(), 1):
            print(
                f"\n[{number}/{len(STAGES)}] {name}: {(stage.__doc__ or '').splitlines()[0]}",
                file=sys.stderr,
                flush=True,
            )
            since = time.perf_counter()
            work.results[name] = stage(work)
            seconds[name] = round(time.perf_counter() - since, 1)
        _stop_ray()
    total = round(time.perf_counter() - began, 1)
    print("\nseconds: " + ", ".join(f"{name} {value}" for name, value in seconds.items()) + f"; {total} in all")
    print(f"contact sheet: {work.results['summarise']['contact_sheet']}")
    return {"seconds": total, "phases_s": seconds, "stages": work.results}


def _record(work: Work) -> dict[str, Any]:
    """Let MetaWorld's scripted experts act before two cameras; write a LeRobot v3.0 dataset."""
    out = work.folder / "metaworld"
    config = record.Config(out=str(out), episodes=work.config.episodes, size=work.config.size)
    return record.run(config)


def _upload(work: Work) -> dict[str, Any]:
    """Put the dataset into the object store."""
    files = s3fs.S3FileSystem(use_listings_cache=False)
    if files.exists(work.source):
        files.rm(work.source, recursive=True)
    local = work.folder / "metaworld"
    files.put(str(local), work.source, recursive=True)
    sizes = [path.stat().st_size for path in local.rglob("*") if path.is_file()]
    return {"source": work.source, "files": len(sizes), "bytes": sum(sizes)}


def _ingest(work: Work) -> dict[str, Any]:
    """Decode every episode into the lake's tables with Ray Data, commit each once, release."""
    return ingest.run(ingest.Config(source=work.source, lake=work.lake))


def _summarise(work: Work) -> dict[str, Any]:
    """Show what the release holds, and how it looks."""
    release = Lake(work.lake).release()
    rows: dict[str, dict[str, Any]] = {}
    for episode in release.episodes(columns=["tasks", "num_frames", "fps", "success"]).to_pylist():
        row = rows.setdefault(episode["tasks"][0], {"episodes": 0, "frames": 0, "seconds": 0.0, "successes": 0})
        row["episodes"] += 1
        row["frames"] += episode["num_frames"]
        row["seconds"] += episode["num_frames"] / episode["fps"]
        row["successes"] += bool(episode["success"])
    width = max(len(task) for task in rows)
    print(f"\nrelease {release.name} ({release.id}) of {work.lake}")
    print(f"{'task':<{width}}  episodes  frames  seconds  successes")
    for task, row in sorted(rows.items()):
        print(
            f"{task:<{width}}  {row['episodes']:>8}  {row['frames']:>6}  {row['seconds']:>7.1f}  {row['successes']:>9}"
        )
    print(f"{'all':<{width}}  {release.num_episodes:>8}  {release.num_frames:>6}")
    sheet = contact_sheet(release, work.folder / "contact_sheet.png")
    return {"release": release.name, "tasks": rows, "contact_sheet": str(sheet)}


STAGES: dict[str, Callable[[Work], dict[str, Any]]] = {
    "record": _record,
    "upload": _upload,
    "ingest": _ingest,
    "summarise": _summarise,
}
"""The stages, in their order; each gets what those before it left in ``Work.results``."""


def _fresh(folder: Path) -> Path:
    """Return an empty folder; one that the demo did not make is left alone."""
    mark = folder / ".robolake-demo"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise ValueError(f"{folder} holds something that the demo did not make; name another folder with --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()
    return folder.resolve()


def _stop_ray() -> None:
    import ray

    ray.shutdown()


main = main_of(Config, run)

if __name__ == "__main__":
    main()
