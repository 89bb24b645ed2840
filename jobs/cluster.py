"""Connecting a job to Ray: the cluster it was submitted to, or one of its own."""

import logging
import os
import warnings

import ray

_WORKERS = {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
"""One arena for all threads of a worker: with one each, freed memory piles up in all of them, task after task."""


def connect(*, num_cpus: int | None = None, dashboard: bool = False) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine.

    Args:
        num_cpus: of a cluster started here; None means all.
        dashboard: whether a cluster started here has one, on loopback.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name in ("exceptions", "_internal.execution.streaming_executor_state"):
        # They print the traceback of an error that is raised all the same.
        logging.getLogger(f"ray.data.{name}").setLevel(logging.CRITICAL)
    logging.getLogger("ray.data").addFilter(lambda record: "Progress bars disabled" not in record.getMessage())
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
        return
    for name, value in _WORKERS.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        # Ray forks to start its own processes, which use no Lance.
        warnings.filterwarnings("ignore", message="lance is not fork-safe")
        ray.init("local", num_cpus=num_cpus, include_dashboard=dashboard, log_to_driver=False)
