"""Running a function over blocks of rows on Ray Data, with our own errors coming back as raised."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from lake.errors import WorkerDiedError

MAX_DEATHS = 5
"""How often a task may lose its worker or its node; Ray Data by itself tries without end."""

_RAYS_WORDS = "Failed to apply UDF transform after "


def rows_of(blocks: list[pa.Table], function: Callable[[pa.Table], pa.Table], name: str) -> Iterator[dict[str, Any]]:
    """Run a function over blocks on the cluster, one task a block, and yield its rows as they come.

    Args:
        name: what the stage is called in Ray's dashboard.

    Raises:
        WorkerDiedError: the workers of one task died again and again.
        Exception: what the function raised, out of Ray's wraps.
    """
    if not blocks:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    function.__name__ = function.__qualname__ = name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")  # No other way yet to say this.
        dataset = ray.data.from_arrow(blocks).map_batches(
            function, batch_size=None, batch_format="pyarrow", num_cpus=1, max_retries=MAX_DEATHS - 1
        )
    dataset.set_name(name)
    try:
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert not isinstance(block, dict)
            yield from block.to_pylist()
    except RayTaskError as error:
        raise _cause(error) from None
    except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
        raise WorkerDiedError(
            f"{name}: the worker of one task died {MAX_DEATHS} times. See in Ray's logs what kills it: too little "
            f"memory, or a file that crashes its decoder ({str(error).strip().splitlines()[0][:300]})"
        ) from error


def blocks_of(rows: pa.Table, most: int) -> list[pa.Table]:
    """Cut rows into blocks of at most ``most``, so that all CPUs get several."""
    cpus = int(ray.cluster_resources().get("CPU", 1))
    size = max(1, min(most, rows.num_rows // (4 * cpus)))
    return [rows.slice(start, size) for start in range(0, rows.num_rows, size)]


def groups_of(count: int, most: int) -> list[tuple[int, int]]:
    """Return runs (first, end) of ``count`` pieces of work, long ones first and single ones at the end.

    Ray Data looks for finished tasks ten times a second, so a CPU idles for a sixth of a second after each: few
    long tasks lose little to that, and short ones at the end keep all CPUs at work until then.

    Source: guided self-scheduling (Polychronopoulos and Kuck, 1987).

    Args:
        most: pieces in one run.
    """
    cpus = int(ray.cluster_resources().get("CPU", 1))
    runs: list[tuple[int, int]] = []
    first = 0
    while first < count:
        end = first + max(1, min(most, (count - first) // (3 * cpus)))
        runs.append((first, end))
        first = end
    return runs


def _cause(error: BaseException) -> BaseException:
    """Return what the function raised, without what Ray adds to its message."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    said = [arg.partition(_RAYS_WORDS)[0].rstrip("\n") if isinstance(arg, str) else arg for arg in error.args]
    error.args = tuple(one for one, arg in zip(said, error.args, strict=True) if one or one == arg)
    return error
