"""Tests of lake/checksum.py."""

import hashlib
from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lake.checksum import FramesDigest, fold_digests
from lake.schema import FRAMES

Row = dict[str, Any]

floats = st.floats(width=32, allow_nan=False)
rows = st.lists(
    st.fixed_dictionaries(
        {
            "episode_uid": st.just("e" * 32),
            "frame_index": st.integers(0, 2**31 - 1),
            "timestamp_s": st.floats(allow_nan=False),
            "state": st.lists(floats, max_size=3),
            "action": st.lists(floats, max_size=3),
            "task_index": st.integers(0, 5),
            "views": st.lists(st.binary(max_size=4), max_size=3),
        }
    ),
    max_size=8,
)


def batches(frames: list[Row], cuts: list[int]) -> list[pa.RecordBatch]:
    edges = [0, *sorted(min(cut, len(frames)) for cut in cuts), len(frames)]
    return [pa.RecordBatch.from_pylist(frames[first:end], FRAMES) for first, end in pairwise(edges)]


def digest_of(parts: list[pa.RecordBatch]) -> str:
    digest = FramesDigest()
    for part in parts:
        digest.update(part)
    assert digest.num_frames == sum(part.num_rows for part in parts)
    return digest.hexdigest()


def as_key(frames: list[Row]) -> str:
    """Return the frames as a text in which -0.0 is not 0.0."""
    return repr([sorted(frame.items()) for frame in frames])


@given(rows, st.lists(st.integers(0, 8), max_size=4), st.lists(st.integers(0, 8), max_size=4))
def test_it_does_not_depend_on_the_borders_of_batches(frames: list[Row], cuts: list[int], others: list[int]) -> None:
    assert digest_of(batches(frames, cuts)) == digest_of(batches(frames, others))


@given(rows, st.integers(0, 8), st.integers(0, 8))
def test_it_does_not_depend_on_where_a_slice_lies_in_memory(frames: list[Row], before: int, behind: int) -> None:
    whole = pa.RecordBatch.from_pylist([*frames_of(1) * before, *frames, *frames_of(1) * behind], FRAMES)
    part = whole.slice(before, len(frames))
    assert digest_of([part]) == digest_of(batches(frames, []))


@given(rows, rows)
def test_other_frames_have_another_checksum(one: list[Row], other: list[Row]) -> None:
    assume(as_key(one) != as_key(other))
    assert digest_of(batches(one, [])) != digest_of(batches(other, []))


def frames_of(num_frames: int) -> list[Row]:
    return [
        {
            "episode_uid": "e" * 32,
            "frame_index": i,
            "timestamp_s": i / 10,
            "state": [0.5, float(i)],
            "action": [1.0],
            "task_index": 0,
            "views": [b"abc", bytes([i])],
        }
        for i in range(num_frames)
    ]


CHANGES: list[tuple[str, Callable[[list[Row]], object]]] = [
    ("frame left out", lambda frames: frames.pop()),
    ("frame in the middle left out", lambda frames: frames.pop(1)),
    ("frame repeated", lambda frames: frames.append(frames[-1])),
    ("frames swapped", lambda frames: frames.reverse()),
    ("index", lambda frames: frames[1].update(frame_index=7)),
    ("time", lambda frames: frames[1].update(timestamp_s=0.1 + 1e-15)),
    ("task", lambda frames: frames[1].update(task_index=1)),
    ("last bit of the state", lambda frames: frames[1].update(state=[0.5, 1.0 + 2**-23])),
    ("sign of a zero", lambda frames: frames[0].update(state=[0.5, -0.0])),
    ("value moved from state to action", lambda frames: frames[1].update(state=[0.5], action=[1.0, 1.0])),
    ("value moved to the next frame", lambda frames: (
        frames[1].update(state=[0.5]), frames[2].update(state=[1.0, 0.5, 2.0])
    )),
    ("view", lambda frames: frames[1].update(views=[b"abd", b"\1"])),
    ("views swapped", lambda frames: frames[1].update(views=[b"\1", b"abc"])),
    ("byte moved from view to view", lambda frames: frames[1].update(views=[b"ab", b"c\1"])),
    ("view moved to the next frame", lambda frames: (
        frames[1].update(views=[b"abc"]), frames[2].update(views=[b"\1", b"abc", b"\2"])
    )),
    ("views joined", lambda frames: frames[1].update(views=[b"abc\1"])),
    ("no views", lambda frames: frames[1].update(views=[])),
    ("an empty view", lambda frames: frames[1].update(views=[b"abc", b"\1", b""])),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[name for name, _ in CHANGES])
def test_every_change_shows(name: str, change: Callable[[list[Row]], object]) -> None:
    frames = frames_of(4)
    change(frames)
    assert digest_of(batches(frames, [])) != digest_of(batches(frames_of(4), []))


def test_the_uid_is_no_part_of_it() -> None:
    renamed = [frame | {"episode_uid": "f" * 32} for frame in frames_of(4)]
    assert digest_of(batches(renamed, [])) == digest_of(batches(frames_of(4), []))


def test_it_is_the_same_for_ever() -> None:
    assert digest_of(batches(frames_of(4), [2])) == "ed43c145e3921a790246089f30497d487a36277409b0cd5b850d232fa079411e"


@given(st.lists(st.binary(max_size=3), max_size=6), st.randoms(use_true_random=False))
def test_a_fold_does_not_depend_on_order_but_on_how_often(contents: list[bytes], random: Random) -> None:
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    shuffled = list(digests)
    random.shuffle(shuffled)
    assert fold_digests(shuffled) == fold_digests(digests)
    assert len(fold_digests(digests)) == 64
    if digests:
        assert fold_digests([*digests, digests[0]]) != fold_digests(digests)
        assert fold_digests(digests[1:]) != fold_digests(digests)
    assert fold_digests([]) == "0" * 64
