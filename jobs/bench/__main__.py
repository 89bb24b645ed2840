"""``python -m jobs.bench NAME``: measure, keep the raw rows, end in one line of JSON."""

import dataclasses
import importlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from jobs import plain
from jobs.command import expand
from lake.errors import RobolakeError

BENCHES = {
    "decode": "frames/s of each video back end, by codec and GOP, on one core",
    "discover": "discovery and anti-join of a million episodes: seconds, memory, the committer's rate",
    "ingest": "frames/s of a whole ingestion over a bare loop of decode, resize, JPEG",
    "loader": "samples/s of the loader over LeRobot's own, and the share of the JPEG decoder's rate",
    "model": "a training step of pi-0.5 or GR00T N1.5: packed over padded, compiled, by precision",
    "order": "planning of training over a billion frames: start, memory, samples/s on one core, shuffle",
    "packing": "fill of packs for mixtures of cameras, beside padding and first-fit",
    "scan": "random frames from a lake over PyAV from the source's videos",
}
PACKAGES = (
    "robolake",
    "ray",
    "pylance",
    "pyarrow",
    "numpy",
    "av",
    "opencv-python-headless",
    "simplejpeg",
    "torch",
    "torchao",
    "transformer-engine",
    "flash-attn",
    "torchcodec",
    "decord",
    "s3fs",
)
_ROWS = Path("out/bench")


def main() -> None:
    """Run a benchmark; rows go to a file, the numbers to the last line of output."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHES:
        print("usage: python -m jobs.bench NAME [file.toml] [--flags]; NAME is one of\n")
        print("\n".join(f"  {name:<10} {what}" for name, what in BENCHES.items()))
        sys.exit(0 if name in ("-h", "--help") else 2)
    module = importlib.import_module(f"jobs.bench.{name}")
    config = _parsed(module.Config, expand(sys.argv[2:]), f"python -m jobs.bench {name}")
    try:
        result = module.run(config)
    except (RobolakeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    report = {
        "what": result["what"],
        "config": dataclasses.asdict(config),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "numbers": result["numbers"],
    }
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    _ROWS.mkdir(parents=True, exist_ok=True)
    path = _ROWS / f"{name}-{stamp}.json"
    path.write_text(json.dumps(report | {"rows": result["rows"]}, indent=1, default=str), encoding="utf-8")
    print(f"rows: {path}", file=sys.stderr)
    print(json.dumps(report | {"rows": str(path)}, default=str))


def _parsed(config: type[Any], arguments: list[str], prog: str) -> Any:
    """Read flags by tyro, or more plainly on a machine that has only what a model needs."""
    try:
        tyro = importlib.import_module("tyro")
    except ImportError:
        return plain.parse(config, arguments, prog=prog)
    return tyro.cli(config, args=arguments, prog=prog)


def hardware() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _gpu() | {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory / 2**30, 1)}


def _gpu() -> dict[str, str]:
    """Return the GPU's name and driver, where there is one."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"gpu": done.stdout.strip()}


def versions() -> dict[str, str]:
    """Return the versions of what was measured; only of what is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the revision that was measured, with a plus where files were changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


if __name__ == "__main__":
    main()
