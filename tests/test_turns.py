"""Tests of train/turns.py."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import CHANGES, RELAXED, Rank, samples, small, streams, three_cameras

import train.order
import train.packing
from train.lanes import Pack, Stream
from train.order import mixture, one_pass
from train.turns import Cursor, CursorMismatchError, Position, Turn, Turns, lanes_of_rank, merge, share_lost, start


@dataclass(frozen=True, kw_only=True)
class Life:
    """What one start of a run does before it dies."""

    world_size: int
    kept: int
    """Steps until its last checkpoint."""
    lost: int
    """Steps after it."""


def lives(stream: Stream, *, most: int = 4) -> st.SearchStrategy[list[Life]]:
    life = st.builds(Life, world_size=st.integers(1, stream.num_lanes), kept=st.integers(0, 6), lost=st.integers(0, 3))
    return st.lists(life, min_size=1, max_size=most)


def names(packs: list[Pack | None]) -> list[tuple[int, int, bytes]]:
    """Name the packs of a step by all that is in them, whichever rank had which."""
    return sorted((pack.window, pack.index, pack.rows.tobytes()) for pack in packs if pack is not None)


def steps(stream: Stream, num_steps: int, *, world_size: int = 1, cursor: Cursor | None = None) -> list[list[Pack]]:
    ranks = [Rank(stream, rank, world_size, cursor) for rank in range(world_size)]
    return [[pack for rank in ranks for pack in rank.next_step() if pack is not None] for _ in range(num_steps)]


def live(stream: Stream, cursor: Cursor, life: Life) -> tuple[Cursor, list[list[Pack]], list[list[Pack]]]:
    """Run until death; return the last checkpoint, the packs of the steps before it, and those of the steps after."""
    ranks = [Rank(stream, rank, life.world_size, cursor) for rank in range(life.world_size)]
    kept = [[pack for rank in ranks for pack in rank.next_step() if pack] for _ in range(life.kept)]
    saved = merge([rank.cursor() for rank in ranks]).to_json()
    lost = [[pack for rank in ranks for pack in rank.next_step() if pack] for _ in range(life.lost)]
    return Cursor.from_json(json.loads(json.dumps(saved))), kept, lost


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_kills_and_resizes_change_no_step(data: st.DataObject) -> None:
    stream = data.draw(streams())
    schedule = data.draw(lives(stream))
    num_steps = sum(life.kept for life in schedule) + 3
    most = num_steps if stream.order.num_windows is None else stream.num_steps()
    unbroken = [names([*packs]) for packs in steps(stream, num_steps)]
    cursor = start(stream)
    for life in schedule:
        since = cursor.step
        cursor, kept, lost = live(stream, cursor, life)
        found = [names([*packs]) for packs in kept + lost]
        assert found == unbroken[since : since + len(found)]
        assert cursor.step == min(since + life.kept, most)


@RELAXED
@given(data=st.data())
def test_windows_that_are_done_gave_each_sample_once(data: st.DataObject) -> None:
    stream = data.draw(streams(make=mixture))
    cursor, consumed = start(stream), []
    for life in data.draw(lives(stream, most=3)):
        cursor, kept, _ = live(stream, cursor, life)
        consumed += [pack for packs in kept for pack in packs]
    assert max(Counter(samples(consumed)).values(), default=1) == 1, "of a source's epoch, each sample at most once"
    for lane in range(stream.num_lanes):
        for number in range(lane, lane + cursor.lanes[lane].window * stream.num_lanes, stream.num_lanes):
            blocks = stream.order.window(number)
            slot, frame = blocks.samples()
            whole = [blocks.source[slot], blocks.epoch[slot], blocks.episode[slot], frame]
            of_window = samples([pack for pack in consumed if pack.window == number])
            assert sorted(of_window) == sorted(zip(*(each.tolist() for each in whole), strict=True))


@RELAXED
@given(data=st.data())
def test_one_pass_is_exact_at_any_world_size(data: st.DataObject) -> None:
    stream = data.draw(streams(make=one_pass))
    num_steps = stream.num_steps()
    cursor, consumed = start(stream), []
    for life in data.draw(lives(stream)):
        cursor, kept, _ = live(stream, cursor, life)
        consumed += [pack for packs in kept for pack in packs]
    rest = steps(stream, max(0, num_steps - cursor.step) + 1, world_size=stream.num_lanes, cursor=cursor)
    assert rest[-1] == [], "nothing comes after the last step"
    assert cursor.step >= num_steps or rest[-2], "and no step is for nothing"
    consumed += [pack for packs in rest for pack in packs]
    everything = [
        (at, 0, episode, frame)
        for at, source in enumerate(stream.order.sources)
        for episode, length in enumerate(source.lengths)
        for frame in range(length)
    ]
    assert sorted(samples(consumed)) == everything


@RELAXED
@given(stream=streams(), done=st.integers(0, 12), world_size=st.integers(1, 4))
def test_a_resumed_run_is_the_rest_of_the_run(stream: Stream, done: int, world_size: int) -> None:
    life = Life(world_size=min(world_size, stream.num_lanes), kept=done, lost=0)
    cursor, _, _ = live(stream, start(stream), life)
    resumed = [names([*packs]) for packs in steps(stream, 6, cursor=cursor)]
    assert resumed == [names([*packs]) for packs in steps(stream, done + 6)[done:]]


@pytest.mark.parametrize("change", CHANGES)
def test_a_cursor_of_another_stream_is_refused(change: str) -> None:
    cursor = Cursor(fingerprint=small().fingerprint, lanes=(Position(7, 1, 0),) * 3)
    Turns(small(), cursor=cursor)
    with pytest.raises(CursorMismatchError, match=r"the cursor at step 7 belongs to another order .* seed changed"):
        Turns(CHANGES[change], cursor=cursor)


@pytest.mark.parametrize("module", [train.order, train.packing])
def test_a_cursor_of_another_version_is_refused(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cursor = start(small())
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    with pytest.raises(CursorMismatchError):
        Turns(small(), cursor=cursor)


def test_the_composition_of_a_step_does_not_drift() -> None:
    stream = three_cameras(8)
    batches = steps(stream, 400)
    views = np.array([np.concatenate([pack.images for pack in packs]).mean() for packs in batches])
    num_samples = np.array([sum(pack.num_samples for pack in packs) for packs in batches])
    # The packs of a window are alike, so about as many steps as a window has packs are one observation.
    num_windows = 400 / len(stream.window(0))
    for each in (views, num_samples):
        assert abs(np.corrcoef(each, np.arange(400))[0, 1]) < 3 / np.sqrt(num_windows)
        assert abs(each[:200].mean() - each[200:].mean()) < 3 * each.std() * np.sqrt(4 / num_windows)
        assert each.std() < 0.1 * each.mean()


@RELAXED
@given(at=st.lists(st.none() | st.tuples(*[st.integers(0, 10**9)] * 3), max_size=9))
def test_a_cursor_survives_json(at: list[tuple[int, int, int] | None]) -> None:
    cursor = Cursor(fingerprint="f00d", lanes=tuple(each and Position(*each) for each in at))
    assert Cursor.from_json(json.loads(json.dumps(cursor.to_json()))) == cursor


@pytest.mark.parametrize(
    "data",
    [
        {},
        None,
        {"lanes": [[0, 0, 0]]},
        {"fingerprint": "", "lanes": 3},
        {"fingerprint": "", "lanes": [3]},
        {"fingerprint": "", "lanes": [[0, 0]]},
        {"fingerprint": "", "lanes": [[0, 0, 0, 0]]},
        {"fingerprint": "", "lanes": [["x", 0, 0]]},
    ],
)
def test_what_is_no_cursor_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="not a cursor of a stream of packs"):
        Cursor.from_json(data)


A, B = Position(3, 1, 2), Position(3, 0, 9)


@pytest.mark.parametrize(
    ("lanes", "message"),
    [
        ([(A, None, None), (None, B, None)], "no rank knows lane 2"),
        ([(A, B, None), (None, A, B)], r"ranks say \[Position.*\] of lane 1"),
        ([], "these 0 cursors are not of one stream"),
        ([(A, B), (None, B, A)], "these 2 cursors are not of one stream"),
    ],
)
def test_cursors_that_do_not_make_up_the_lanes_are_refused(lanes: list[tuple], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge([Cursor(fingerprint="f00d", lanes=each) for each in lanes])


def test_cursors_of_two_streams_are_refused() -> None:
    with pytest.raises(CursorMismatchError, match="not of one stream"):
        merge([Cursor(fingerprint=name, lanes=(A,)) for name in "ab"])


def test_a_cursor_of_some_lanes_is_refused() -> None:
    part = Rank(small(), 1, 2).cursor()
    with pytest.raises(ValueError, match="the cursor knows 1 of 3 lanes; merge those of all ranks first"):
        Turns(small(), cursor=part)


@RELAXED
@given(num_lanes=st.integers(1, 70), data=st.data())
def test_ranks_share_the_lanes(num_lanes: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, num_lanes))
    dealt = [lanes_of_rank(rank, world_size, num_lanes) for rank in range(world_size)]
    assert sorted(lane for lanes in dealt for lane in lanes) == list(range(num_lanes))
    micro_steps = max(map(len, dealt))
    idle = sum(micro_steps - len(lanes) for lanes in dealt)
    assert share_lost(world_size, num_lanes) == pytest.approx(idle / (world_size * micro_steps), abs=1e-12)
    assert all(dealt), "no rank is idle throughout"


def content(found: tuple[Turn, Pack | None] | None) -> object:
    return found and (found[0].step, found[0].lane, found[1] and names([found[1]]))


@RELAXED
@given(stream=streams(), done=st.integers(0, 30))
def test_resuming_in_the_middle_of_a_step_goes_on_with_its_next_pack(stream: Stream, done: int) -> None:
    rank = Rank(stream)
    for _ in range(done):
        rank.next_turn()
    resumed = Rank(stream, cursor=rank.cursor())
    assert [content(resumed.next_turn()) for _ in range(12)] == [content(rank.next_turn()) for _ in range(12)]


@RELAXED
@given(data=st.data())
def test_ranks_that_stop_in_the_middle_of_a_step_are_resumed_at_any_size(data: st.DataObject) -> None:
    stream = data.draw(streams(make=mixture))
    before, after = (data.draw(st.integers(1, stream.num_lanes)) for _ in range(2))
    unbroken = [names([*packs]) for packs in steps(stream, 4)]
    ranks = [Rank(stream, rank, before) for rank in range(before)]
    found = [[pack for rank in ranks for pack in rank.next_step()]]
    part = [rank.next_turn() for rank in ranks for _ in range(data.draw(st.integers(0, rank.micro_steps)))]
    ranks = [Rank(stream, rank, after, merge([rank.cursor() for rank in ranks])) for rank in range(after)]
    rest: list[list[Turn]] = []
    packs = [each[1] for each in part if each]
    for rank in ranks:
        turns, at_step = [], True
        while at_step:
            turn = rank._turns.peek()
            at_step = turn is not None and turn.step == 1
            if at_step:
                made = rank.next_turn()
                assert made
                turns.append(made[0])
                packs.append(made[1])
        rest.append(turns)
    assert len({len(turns) for turns in rest}) == 1, "collective operations match, in what is left of a step, too"
    found.append(packs)
    found += [[pack for rank in ranks for pack in rank.next_step()] for _ in range(2)]
    assert [names(each) for each in found] == unbroken


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (0, 4, "world_size=4 is more than the 3 lanes: 1 ranks would never get a pack"),
        (2, 2, "rank 2 of 2"),
        (-1, 2, "rank -1 of 2"),
    ],
)
def test_ranks_that_cannot_be_served_are_refused(rank: int, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Turns(small(), rank, world_size)


def test_a_rank_without_a_lane_takes_part_with_nothing() -> None:
    rank = Rank(small(), 1, 2)
    first, second = rank.next_step()
    assert first is not None
    assert second is None
    assert [lane is None for lane in rank.cursor().lanes] == [True, False, True]


def test_the_next_windows_of_a_step_are_known_ahead() -> None:
    assert Turns(small(make=one_pass)).ahead(9) == [0, 1], "it has two windows only"
    turns = Turns(small())
    assert turns.ahead(2) == [0, 1]
    assert turns.ahead(9) == [0, 1, 2]
    turns.take(1)
    assert turns.ahead(9) == [1, 2]
    assert turns.share_lost == 0
    assert Turns(small(), 0, 2).share_lost == pytest.approx(1 / 4)
