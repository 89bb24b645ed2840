"""Running a function over blocks of rows on Ray Data, with our own errors coming back as raised."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayTaskError


def rows_of(blocks: list[pa.Table], function: Callable[[pa.Table], pa.Table], name: str) -> Iterator[dict[str, Any]]:
    """Run a function over blocks on the cluster, one task a block, and yield its rows as they come.

    Args:
        name: what the stage is called in Ray's dashboard.

    Raises:
        Exception: what the function raised, out of Ray's wraps.
    """
    if not blocks:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    function.__name__ = function.__qualname__ = name
    dataset = ray.data.from_arrow(blocks).map_batches(function, batch_size=None, batch_format="pyarrow", num_cpus=1)
    dataset.set_name(name)
    try:
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert not isinstance(block, dict)
            yield from block.to_pylist()
    except RayTaskError as error:
        raise _cause(error) from None


def blocks_of(rows: pa.Table, most: int) -> list[pa.Table]:
    """Cut rows into blocks of at most ``most``, so that all CPUs get several."""
    cpus = int(ray.cluster_resources().get("CPU", 1))
    size = max(1, min(most, rows.num_rows // (4 * cpus)))
    return [rows.slice(start, size) for start in range(0, rows.num_rows, size)]


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error
