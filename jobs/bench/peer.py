"""LeRobot as the peer of a benchmark: its environment, its dataset of our episodes, its speed."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs import export

BACKENDS = ("torchcodec", "pyav")
_HERE = Path(__file__).resolve().parent
_VENV = _HERE.parents[1] / ".venv-lerobot"
_START_S = 300.0
"""Time to start, to open the dataset and to warm up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How LeRobot reads."""

    horizon: int = 50
    """Actions of a chunk."""
    batch_size: int = 8
    """Samples of a batch; 8 is LeRobot's default."""
    workers: int = 4
    """Processes of its loader; 4 is LeRobot's default, 0 reads in the process that trains."""
    augment: bool = False
    """Apply LeRobot's default image transforms."""
    seconds: float = 20.0
    """Measure at least so long."""
    seed: int = 0
    """Of the shuffle."""
    backend: str | None = None
    """Video back end, torchcodec or pyav; None measures both and keeps the faster."""


def lerobot_python(folder: Path | None = None) -> Path:
    """Return the python of an environment with LeRobot 0.4.4, made on first use.

    Args:
        folder: of the environment; None means .venv-lerobot in the repository.

    Raises:
        RuntimeError: the environment could not be made.
    """
    venv = (folder or _VENV).absolute()
    script = _HERE / "lerobot_venv.sh"
    done = subprocess.run(["/bin/sh", script, venv, sys.executable], check=False)  # All that it says goes to stderr.
    if done.returncode:
        raise RuntimeError(
            f"{script.name} could not make {venv} (exit status {done.returncode}); what it needs is said above: "
            "mostly a way to the package index, or a folder that is free"
        )
    return venv / "bin" / "python"


def as_lerobot_v3(lake_uri: str, out: Path) -> Path:
    """Write the newest release of a lake as a LeRobot v3.0 dataset: the same episodes, frames and video packets.

    Args:
        out: a folder that is not there yet.

    Raises:
        ValueError: the release has no episode, or episodes that one dataset cannot hold.
    """
    export.run(export.Config(lake=lake_uri, out=str(out)))
    return out


def measure(root: Path, reading: Reading, *, python: Path) -> dict[str, Any]:
    """Read a dataset with LeRobot's own loader; return what lerobot_peer.py prints.

    ``backends`` is added: the samples/s of each back end that was tried, or the reason why it cannot be used.

    Args:
        python: of an environment with LeRobot, see lerobot_python.

    Raises:
        RuntimeError: LeRobot could not read the dataset, or did not end.
    """
    results: list[dict[str, Any]] = []
    backends: dict[str, float | str] = {}
    for backend in (reading.backend,) if reading.backend else BACKENDS:
        try:
            result = _run(root, replace(reading, backend=backend), python)
        except RuntimeError as error:
            backends[backend] = str(error)
            continue
        results.append(result)
        backends[backend] = result["samples_per_s"]
    if not results:
        raise RuntimeError(f"LeRobot cannot read {root}: {backends}")
    return max(results, key=lambda result: result["samples_per_s"]) | {"backends": backends}


def _run(root: Path, reading: Reading, python: Path) -> dict[str, Any]:
    command = [
        *(str(python), str(_HERE / "lerobot_peer.py"), str(root)),
        *("--horizon", str(reading.horizon), "--batch-size", str(reading.batch_size)),
        *("--workers", str(reading.workers), "--seconds", str(reading.seconds), "--seed", str(reading.seed)),
        *("--augment" if reading.augment else "--no-augment", "--backend", str(reading.backend)),
    ]
    timeout_s = _START_S + 2 * reading.seconds
    with tempfile.TemporaryDirectory(prefix="lerobot-cache-") as cache:
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": cache}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"LeRobot did not end within {timeout_s:.0f} s on {root}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(f"exit status {done.returncode}: {said[-1] if said else 'it said nothing'}")
    return json.loads(done.stdout.strip().splitlines()[-1])
