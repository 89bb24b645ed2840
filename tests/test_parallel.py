"""Tests of ingest/parallel.py."""

from typing import Any

import pyarrow as pa
import pytest

from ingest.parallel import blocks_of, groups_of, rows_of
from lake.errors import EpisodeError, StoreFullError

pytestmark = pytest.mark.usefixtures("ray")


def test_rows_of_all_blocks_come_back() -> None:
    def square(block: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([{"y": row["x"] ** 2} for row in block.to_pylist() for _ in range(row["x"])])

    table = pa.table({"x": [1, 2, 3]})
    rows = list(rows_of([table.slice(at, 1) for at in range(3)], square, "Square"))
    assert sorted(row["y"] for row in rows) == [1, 4, 4, 9, 9, 9]
    assert list(rows_of([], square, "Square")) == []


def test_blocks_hold_all_rows_in_order_and_every_cpu_gets_several() -> None:
    table = pa.table({"x": list(range(50))})
    blocks = blocks_of(table, 1000)
    assert pa.concat_tables(blocks).equals(table)
    assert len(blocks) >= 4 * 2
    assert max(block.num_rows for block in blocks_of(table, 3)) == 3
    assert blocks_of(table.slice(0, 0), 3) == []
    assert [block.num_rows for block in blocks_of(table.slice(0, 2), 64)] == [1, 1]


@pytest.mark.parametrize(("count", "most"), [(0, 4), (1, 4), (7, 1), (64, 5), (1000, 1000)])
def test_groups_hold_every_piece_once_and_shrink_to_one(count: int, most: int) -> None:
    groups = groups_of(count, most)
    assert [at for first, end in groups for at in range(first, end)] == list(range(count))
    sizes = [end - first for first, end in groups]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes, default=0) <= most
    assert sizes[-4:] == [1] * min(4, count), "every CPU has a short one at the end"


@pytest.mark.parametrize(
    "error",
    [
        StoreFullError("no space left"),
        EpisodeError("video-empty", "x.mp4 has no bytes"),
        ValueError("share=2 is more than 1"),
        KeyError(7),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_back_as_it_was_raised(error: Any) -> None:
    def fail(block: pa.Table) -> pa.Table:
        raise error

    with pytest.raises(type(error)) as caught:
        list(rows_of([pa.table({"x": [1]})], fail, "Fail"))
    assert type(caught.value) is type(error)
    assert caught.value.args == error.args
    assert str(caught.value) == str(error)
