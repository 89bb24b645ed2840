"""Sketches of parts fold into the sketch of the whole, with quantiles within their bound."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lake.sketch import ABSOLUTE_FLOOR, LARGEST, RELATIVE_ERROR, Sketch, merge, sketch

BUCKETS = ("bucket_offsets", "bucket_keys", "bucket_counts")
DTYPES = {
    "mean": np.float64,
    "m2": np.float64,
    "min": np.float64,
    "max": np.float64,
    "bucket_offsets": np.int32,
    "bucket_keys": np.int32,
    "bucket_counts": np.int64,
}

# Few distinct values beside all kinds: ties matter as much as extremes.
numbers = st.one_of(
    st.floats(-LARGEST, LARGEST, width=64),
    st.floats(-100, 100, width=32),
    st.sampled_from([0.0, -0.0, 5e-324, -5e-324, 2.0**-1022, 1.0, 1.0 + 2.0**-52, LARGEST, -LARGEST, 1e-30]),
)


any_speed = settings(deadline=None)
TINY = 2.0**-1022
"""Below it sums round; a spread below its square root has no square."""


def features(min_dims: int = 0, max_dims: int = 4) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, st.tuples(st.integers(1, 60), st.integers(min_dims, max_dims)), elements=numbers)


@st.composite
def divided(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return frames, and the same frames dealt into parts in any order."""
    values_TD = draw(features())
    parts_T = draw(hnp.arrays(np.int64, len(values_TD), elements=st.integers(0, 5)))
    parts = [values_TD[parts_T == part] for part in draw(st.permutations(range(6)))]
    return values_TD, [part for part in parts if len(part)]


def assert_same(one: Sketch, other: Sketch) -> None:
    assert one.count == other.count
    for name, dtype in DTYPES.items():
        assert getattr(one, name).dtype == dtype
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@any_speed
@given(divided())
def test_any_division_in_any_order_merges_to_the_whole(case: tuple[np.ndarray, list[np.ndarray]]) -> None:
    values_TD, parts = case
    whole, merged = sketch(values_TD), merge(sketch(part) for part in parts)
    for name in ("count", "min", "max", *BUCKETS):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name), err_msg=name)
    scale_D = np.abs(values_TD).max(axis=0)
    assert (np.abs(merged.mean - whole.mean) <= 1e-9 * scale_D + TINY).all()
    # Where the mean is far larger than the spread, no double holds the distances to 1e-9.
    bound_D = 1e-9 * whole.m2 + len(values_TD) * (np.square(1e-12 * scale_D) + TINY)
    assert (np.abs(merged.m2 - whole.m2) <= bound_D).all()


@any_speed
@given(st.lists(features(2, 2), min_size=3, max_size=6))
def test_merging_may_be_nested_in_any_way(parts: list[np.ndarray]) -> None:
    sketches = [sketch(part) for part in parts]
    left = merge([merge(sketches[:2]), *sketches[2:]])
    right = merge([merge(sketches[1:]), sketches[0]])
    for name in ("count", "min", "max", *BUCKETS):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


@any_speed
@given(features(), st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0])))
def test_quantiles_are_within_the_bound_of_the_exact_ones(values_TD: np.ndarray, q: float) -> None:
    exact_D = np.quantile(values_TD, q, axis=0, method="inverted_cdf")
    found_D = sketch(values_TD).quantile(q)
    assert (np.abs(found_D - exact_D) <= RELATIVE_ERROR * np.abs(exact_D) + ABSOLUTE_FLOOR).all()
    assert (found_D >= values_TD.min(axis=0)).all()
    assert (found_D <= values_TD.max(axis=0)).all()


@any_speed
@given(features())
def test_moments_are_those_of_numpy(values_TD: np.ndarray) -> None:
    found = sketch(values_TD)
    scale_D = np.abs(values_TD).max(axis=0)
    assert (np.abs(found.mean - values_TD.mean(axis=0)) <= 1e-12 * scale_D + TINY).all()
    assert (np.abs(found.std() - values_TD.std(axis=0)) <= 1e-7 * scale_D + np.sqrt(TINY)).all()
    np.testing.assert_array_equal(found.min, values_TD.min(axis=0))
    np.testing.assert_array_equal(found.max, values_TD.max(axis=0))


@any_speed
@given(features())
@example(np.zeros((3, 0)))
def test_columns_fit_an_arrow_row_and_come_back(values_TD: np.ndarray) -> None:
    before = sketch(values_TD)
    table = pa.Table.from_pylist([before.to_columns() | {"feature": "action"}])
    floats, keys, counts = pa.list_(pa.float64()), pa.list_(pa.int32()), pa.list_(pa.int64())
    assert table.schema.types == [pa.int64(), *4 * [floats], keys, keys, counts, pa.string()]
    (row,) = table.to_pylist()
    assert_same(Sketch.from_columns(row), before)


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0},
        {"count": 4},
        {"mean": [0.5]},
        {"max": [1.0, float("nan")]},
        {"bucket_offsets": [0, 5]},
        {"bucket_offsets": [0, 3, 2]},
        {"bucket_counts": [1, 1, 2, 1, 1]},
        {"bucket_counts": [3, 0, 1, 1, 1]},
        {"bucket_keys": [0, 0, 0, 0, 0]},
        {"bucket_keys": [0, 1, 2**30, 0, 1]},
    ],
)
def test_damaged_columns_are_refused(change: dict[str, object]) -> None:
    columns = sketch([[0.0, 1.0], [1.0, 2.0], [2.0, 1.0]]).to_columns()
    with pytest.raises(ValueError, match="no sketch"):
        Sketch.from_columns(columns | change)


def test_folding_quantiles_is_not_averaging_them() -> None:
    # A hundred short episodes at rest, then a long one that moves: the common pooling of q99 misses by far.
    rng = np.random.default_rng(0)
    episodes = [0.01 * rng.standard_normal((50, 1)) for _ in range(100)] + [rng.standard_normal((5_000, 1))]
    exact = np.quantile(np.concatenate(episodes), 0.99, axis=0, method="inverted_cdf")
    sketches = [sketch(episode) for episode in episodes]
    folded = merge(sketches).quantile(0.99)
    assert np.abs(folded - exact) <= RELATIVE_ERROR * np.abs(exact)
    q99s = np.stack([one.quantile(0.99) for one in sketches])
    weighted = np.average(q99s, axis=0, weights=[one.count for one in sketches])
    for wrong in (q99s.mean(axis=0), weighted, q99s.max(axis=0)):
        assert np.abs(wrong - exact) > 0.1 * np.abs(exact)


def test_many_sketches_merge_in_one_go() -> None:
    values_TD = np.random.default_rng(1).normal(5, 2, (10_000, 3)).astype(np.float32)
    whole, merged = sketch(values_TD), merge(sketch(values_TD[start : start + 7]) for start in range(0, 10_000, 7))
    for name in ("count", "min", "max", *BUCKETS):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12)


def test_a_constant_keeps_its_exact_value() -> None:
    merged = merge(sketch(np.full((num_frames, 1), 0.1)) for num_frames in range(1, 200))
    for found in (merged.mean, merged.min, merged.max, merged.quantile(0.5)):
        np.testing.assert_array_equal(found, [0.1])
    np.testing.assert_array_equal(merged.std(), [0.0])


def test_one_frame_is_its_own_statistics() -> None:
    found = sketch([[3.0, -0.0, 5e-324]])
    for q in (0.0, 0.5, 1.0):
        np.testing.assert_array_equal(found.quantile(q), [3.0, 0.0, 5e-324])
    np.testing.assert_array_equal(found.std(), np.zeros(3))


def test_no_dimensions_are_no_trouble() -> None:
    merged = merge([sketch(np.zeros((2, 0))), sketch(np.zeros((3, 0)))])
    assert merged.count == 5
    assert merged.quantile(0.5).shape == merged.std().shape == (0,)


def test_buckets_are_the_leading_bits() -> None:
    # Stored sketches are merged with new ones for ever: these keys may not change.
    values = [-1.0, -5e-324, -0.0, 0.0, 5e-324, 1.0, 1.0078124, 1.0078126, 1e100]
    keys = [-130945, -1, 0, 0, 1, 130945, 130945, 130946, 173459]
    for value, key in zip(values, keys, strict=True):
        np.testing.assert_array_equal(sketch([[value]]).bucket_keys, [key], err_msg=str(value))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2 * LARGEST])
def test_a_value_that_cannot_be_summed_is_refused_with_its_place(bad: float) -> None:
    values_TD = np.zeros((5, 3))
    values_TD[4, 1] = bad
    with pytest.raises(ValueError, match="dimension 1 at frame 4"):
        sketch(values_TD)


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros(3), np.zeros((2, 2, 2)), [["a"]], [[1j]]])
def test_what_is_not_frames_of_numbers_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"\[T, D\]"):
        sketch(bad)  # type: ignore[arg-type]


def test_any_type_of_number_is_taken() -> None:
    for dtype in (np.float16, np.float32, np.int64, np.uint8, np.bool_):
        np.testing.assert_array_equal(sketch(np.ones((2, 1), dtype)).mean, [1.0])


def test_unlike_sketches_are_not_merged() -> None:
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        merge([sketch([[1.0]]), sketch([[1.0, 2.0]])])
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([])


@pytest.mark.parametrize("q", [-0.1, 1.1, np.nan])
def test_a_share_outside_of_zero_to_one_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="share"):
        sketch([[1.0]]).quantile(q)
