"""Tests of ingest/validate.py."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from ingest.source import Episode
from ingest.validate import (
    ACCEPTABLE,
    BLACK_LEVEL,
    FROZEN_LEVEL,
    MIN_FRAMES_TO_FREEZE,
    REASONS,
    ViewWatch,
    check_columns,
    check_frame_count,
)
from lake.errors import EpisodeError


def episode(num_frames: int = 5, *, declared: int | None = None) -> Episode:
    return Episode(
        state=np.ones((num_frames, 3), np.float32),
        action=np.ones((num_frames, 2), np.float32),
        timestamp_s=np.arange(num_frames) / 10,
        task_index=np.zeros(num_frames, np.int32),
        tasks=("push",),
        views=(),
        fps=10.0,
        embodiment="toy",
        declared_frames=num_frames if declared is None else declared,
    )


def reason_of(bad: Episode) -> tuple[str, str]:
    with pytest.raises(EpisodeError) as caught:
        check_columns(bad)
    return caught.value.reason, caught.value.message


@pytest.mark.parametrize("good", [episode(), episode(1), episode(5, declared=0)], ids=["some", "one", "undeclared"])
def test_a_good_episode_passes(good: Episode) -> None:
    check_columns(good)
    check_columns(replace(good, state=np.zeros((good.num_frames, 0), np.float32)))


def test_an_episode_without_frames_is_empty() -> None:
    assert reason_of(episode(0)) == ("empty-episode", "the episode has no frames")
    assert reason_of(episode(0, declared=5))[0] == "empty-episode"


def test_a_count_unlike_the_metadata_is_said_with_both_counts() -> None:
    assert reason_of(episode(5, declared=6)) == ("frame-count", "the columns have 5 frames, the metadata says 6")


@given(
    st.sampled_from(["state", "action", "timestamp_s"]),
    st.integers(0, 4),
    st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_what_is_not_finite_is_found_and_its_frame_named(column: str, frame: int, value: float) -> None:
    bad = episode()
    getattr(bad, column)[frame, ...] = value
    reason, message = reason_of(bad)
    assert reason == "not-finite"
    assert message.startswith("time" if column == "timestamp_s" else column)
    assert message.endswith(f"at frame {frame}")


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=8))
def test_time_must_grow_at_every_step(times: list[float]) -> None:
    some = replace(episode(len(times)), timestamp_s=np.array(times))
    steps = [later > earlier for earlier, later in pairwise(times)]
    if all(steps):
        check_columns(some)
    else:
        reason, message = reason_of(some)
        assert reason == "timestamps-not-monotone"
        assert message.endswith(f"at frame {steps.index(False) + 1}")


def test_a_view_has_as_many_frames_as_the_columns() -> None:
    check_frame_count("top", 12, 12)
    for num_frames in (11, 13):
        with pytest.raises(EpisodeError, match=f"view top has {num_frames} frames, the columns have 12") as caught:
            check_frame_count("top", num_frames, 12)
        assert caught.value.reason == "video-frame-count"


def watch(pictures: list[np.ndarray], accepted: tuple[str, ...] = ()) -> str | None:
    """Look at pictures; return the reason against them."""
    one = ViewWatch("top", len(pictures))
    looked = [one.look(index, picture) for index, picture in enumerate(pictures)]
    assert looked[0]
    assert sum(looked) <= max(16, len(pictures) // max(1, len(pictures) // 16) + 1)
    try:
        one.check(accepted)
    except EpisodeError as error:
        return error.reason
    return None


def grey(level: float, num_pixels: int = 100) -> np.ndarray:
    """Return a picture whose pixels are of a mean level."""
    picture = np.full((1, num_pixels, 3), int(level), np.uint8)
    picture[0, : round((level - int(level)) * num_pixels)] += 1
    return picture


def test_a_view_is_black_if_no_frame_that_is_looked_at_is_lit() -> None:
    assert watch([grey(BLACK_LEVEL)] * 20) == "black-video"
    assert watch([grey(BLACK_LEVEL)]) == "black-video"
    assert watch([grey(BLACK_LEVEL)] * 19 + [grey(200)]) is None
    assert watch([grey(BLACK_LEVEL + 0.1)]) is None


def test_a_view_is_frozen_if_no_frame_that_is_looked_at_differs_from_the_first() -> None:
    assert watch([grey(100)] * 20) == "frozen-video"
    assert watch([grey(100)] * 10 + [grey(100 + FROZEN_LEVEL)] * 10) == "frozen-video"
    assert watch([grey(100)] * 10 + [grey(100 + FROZEN_LEVEL + 0.1)] * 10) is None
    assert watch([grey(level) for level in range(100, 120)]) is None


def test_a_darker_frame_counts_as_movement() -> None:
    assert watch([grey(100)] * 10 + [grey(90)] * 10) is None


def test_few_frames_may_be_alike() -> None:
    assert watch([grey(100)] * (MIN_FRAMES_TO_FREEZE - 1)) is None
    assert watch([grey(100)] * MIN_FRAMES_TO_FREEZE) == "frozen-video"


def test_what_is_accepted_does_not_count() -> None:
    assert watch([grey(0)] * 20, ("black-video",)) is None
    assert watch([grey(0)] * 20, ("frozen-video",)) == "black-video"
    assert watch([grey(100)] * 20, ("frozen-video",)) is None
    assert watch([grey(100)] * 20, ("black-video",)) == "frozen-video"


@given(st.integers(1, 5000))
def test_some_frames_of_a_view_are_looked_at_however_long_it_is(num_frames: int) -> None:
    one = ViewWatch("top", num_frames)
    looked = sum(one.look(index, np.zeros((1, 1, 3), np.uint8)) for index in range(num_frames))
    assert min(num_frames, 16) <= looked <= 31


def raised_in(path: Path) -> set[str]:
    """Return the reason codes that a file raises."""
    text = path.read_text()
    codes = set(re.findall(r"EpisodeError\(\s*\"([a-z-]+)\"", text))
    kinds = ("video", "data") if "{kind}-" in text else ()
    return codes | {f"{kind}-{what}" for kind in kinds for what in re.findall(r"\{kind\}-(\w+)\"", text)}


def test_every_reason_is_listed_and_raised_somewhere() -> None:
    raised = set[str]().union(*(raised_in(path) for path in (ROOT / "ingest").rglob("*.py")))
    assert raised == set(REASONS)
    assert set(ACCEPTABLE) < set(REASONS)
