"""Ingest on a cluster of several nodes, one of which dies, or joins, on the way."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

TIMEOUT_S = 200


def main(change: str, source: str, lake: str) -> None:
    """Run the job; print what it printed and what was seen of the nodes as one line of JSON.

    Args:
        change: ``kill`` one of three nodes with a CPU, or ``add`` one to one.
    """
    folder = tempfile.mkdtemp(prefix="rl-", dir="/tmp")  # The paths of sockets are limited to 107 bytes.
    os.environ["RAY_TMPDIR"] = folder
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3 if change == "kill" else 1)]
        job = subprocess.Popen(
            [sys.executable, "-m", "jobs.ingest", "--source", source, "--lake", lake],
            env=os.environ | {"RAY_ADDRESS": cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(job, lambda: len(staged(lake)) >= 4)
        before = len(staged(lake))
        if change == "kill":
            at_work = wait_for(job, lambda: [node for node in nodes if works(node)])
            cluster.remove_node(at_work[0], allow_graceful=False)
        else:
            node = cluster.add_node(num_cpus=1)
            at_work = wait_for(job, lambda: works(node))
        out, err = job.communicate(timeout=TIMEOUT_S)
        seen = {"code": job.returncode, "out": out, "err": err, "worked": bool(at_work), "staged_before": before}
        print(json.dumps(seen))
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def staged(lake: str) -> list[Path]:
    """Return what tasks have staged so far."""
    return list(Path(lake).glob("_staging/*/*/task-*.json"))


def works(node: Any) -> bool:
    """Whether a process of a node is decoding."""
    raylet = node.all_processes["raylet"][0].process
    for child in psutil.Process(raylet.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "DecodeEpisodes" in " ".join(child.cmdline()):
                return True
    return False


def wait_for(job: subprocess.Popen[str], condition: Callable[[], Any]) -> Any:
    """Wait until a condition is true, or the job has ended; return what it was last."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()) and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
