"""Tests of train/audit.py."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import Rank

from train.audit import Tally, expected, tally, tally_packs
from train.lanes import Costs, Pack, Stream
from train.order import SourceFrames, mixture, one_pass
from train.packing import Budgets
from train.turns import Cursor, CursorMismatchError, merge, start

RELAXED = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])

Sample = tuple[int, int, int, int]
SAMPLES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 99), st.integers(0, 999)), max_size=40, unique=True
)
WORD = st.integers(0, 2**64 - 1)
TALLIES = st.builds(Tally, count=st.integers(0, 10**12), low=WORD, high=WORD)


def of(samples: list[Sample]) -> Tally:
    columns = np.array(samples, np.int64).reshape(-1, 4).T
    return tally(*columns)


def make_stream(*, finite: bool = False, seed: int = 0) -> Stream:
    sources = [
        SourceFrames(name="a", lengths=np.array([23, 4, 17]), weight=2.0),
        SourceFrames(name="b", lengths=np.array([9, 30])),
    ]
    order = (one_pass if finite else mixture)(sources, seed=seed, block_frames=6, window_blocks=4)
    costs = tuple(Costs(tokens=np.full(n, 11), images=np.ones(n, np.int64)) for n in (3, 2))
    return Stream(order=order, costs=costs, budgets=Budgets(tokens=60, images=5, samples=5), num_lanes=3)


def run(stream: Stream, num_steps: int, world_size: int) -> tuple[Cursor, list[Pack]]:
    ranks = [Rank(stream, rank, world_size) for rank in range(world_size)]
    packs = [pack for _ in range(num_steps) for rank in ranks for pack in rank.next_step() if pack is not None]
    return merge([rank.cursor() for rank in ranks]), packs


@RELAXED
@given(samples=SAMPLES, data=st.data())
def test_neither_order_nor_parts_change_a_tally(samples: list[Sample], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(samples))
    cut = data.draw(st.integers(0, len(samples)))
    assert of(shuffled) == of(samples)
    assert of(samples[:cut]) + of(samples[cut:]) == of(samples)
    assert of(samples) - of(samples[:cut]) == of(samples[cut:])
    assert of(samples).count == len(samples)


@RELAXED
@given(samples=SAMPLES.filter(bool), data=st.data())
def test_a_sample_that_is_lost_doubled_or_exchanged_changes_a_tally(samples: list[Sample], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(samples) - 1))
    column, by = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([1, 2, 1000, 2**32]))
    exchanged = list(samples[at])
    exchanged[column] += by
    whole, rest = of(samples), samples[:at] + samples[at + 1 :]
    for other in (rest, [*samples, samples[at]], [*rest, (exchanged[0], exchanged[1], exchanged[2], exchanged[3])]):
        found = of(other)
        assert (found.low, found.high) != (whole.low, whole.high), "and not in its count alone"
        assert found != whole


def test_a_sample_is_told_apart_by_which_number_is_which() -> None:
    tallies = [of([each]) for each in [(1, 2, 3, 4), (2, 1, 3, 4), (1, 3, 2, 4), (1, 2, 4, 3), (4, 3, 2, 1)]]
    assert len(set(tallies)) == len(tallies)
    assert all(each.low != each.high for each in tallies)
    pairs = [of([(0, 0, 0, 1), (0, 0, 1, 0)]), of([(0, 0, 0, 0), (0, 0, 1, 1)])]
    assert pairs[0] != pairs[1]


@RELAXED
@given(num_steps=st.integers(0, 25), world_size=st.integers(1, 3), finite=st.booleans(), seed=st.integers(0, 100))
def test_what_is_expected_at_a_cursor_is_what_was_consumed(
    num_steps: int, world_size: int, finite: bool, seed: int
) -> None:
    stream = make_stream(finite=finite, seed=seed)
    cursor, packs = run(stream, num_steps, world_size)
    assert expected(stream, cursor) == tally_packs(packs)
    assert expected(stream, cursor).count == sum(pack.num_samples for pack in packs)
    if packs:
        assert expected(stream, cursor) != tally_packs(packs[:-1])
        assert expected(stream, cursor) != tally_packs([*packs, packs[0]])


def test_a_whole_pass_is_every_frame_once() -> None:
    stream = make_stream(finite=True)
    cursor, _ = run(stream, stream.num_steps(), 2)
    everything = [
        (at, 0, episode, frame)
        for at, source in enumerate(stream.order.sources)
        for episode, length in enumerate(source.lengths.tolist())
        for frame in range(length)
    ]
    assert expected(stream, cursor) == of(everything)


def test_skipped_samples_are_subtracted() -> None:
    stream = make_stream()
    cursor, packs = run(stream, 9, 1)
    skipped = packs[4]
    consumed = tally_packs(pack for pack in packs if pack is not skipped)
    assert consumed != expected(stream, cursor)
    assert consumed == expected(stream, cursor) - tally_packs([skipped])


def test_no_packs_sum_to_nothing() -> None:
    assert tally_packs([None, None]) == Tally() == of([])
    assert expected(make_stream(), start(make_stream())) == Tally()


def test_a_cursor_of_another_stream_is_refused() -> None:
    with pytest.raises(CursorMismatchError, match="belongs to another order"):
        expected(make_stream(seed=1), start(make_stream(seed=2)))


@RELAXED
@given(one=TALLIES)
def test_a_tally_survives_json(one: Tally) -> None:
    data = json.loads(json.dumps(one.to_json()))
    assert Tally.from_json(data) == one
    assert len(data["sum"]) == 32
    assert data["sum"] in str(one)


@pytest.mark.parametrize(
    "data",
    [{}, {"count": 1}, {"count": None, "sum": "0" * 32}, {"count": 1, "sum": "0" * 31}, {"count": 1, "sum": "g" * 32}],
)
def test_what_is_no_tally_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a tally"):
        Tally.from_json(data)


def test_tallies_are_what_they_were_when_they_were_released() -> None:
    """Checkpoints hold them."""
    assert of([(1, 2, 3, 4), (0, 0, 5, 6)]).to_json() == {"count": 2, "sum": "b9e245463d52a282ad630e3ffc0e8e44"}
