"""Tests of train/segments.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import segments
from train.segments import IMAGE_ID, SegmentWriter
from train.tokens import FAMILIES, WordTokenizer, pieces, sample_costs, state_bins

WORDS = WordTokenizer()
STATES = st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.floats(-1.2, 1.2), max_size=20)


class Letters:
    """A tokenizer of another kind, as a published one is: its tokens may span anything."""

    vocab_size = 1 << 16

    def encode(self, text: str) -> list[int]:
        return [hash(text[at : at + 3]) % self.vocab_size for at in range(0, len(text), 3)]


def segment(writer: SegmentWriter, task: str, num_views: int, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the segment of one sample, made between two others, and its state padded."""
    padded = np.zeros((3, len(bins) + 3), np.int64)
    padded[1, : len(bins)] = bins
    parts, starts = writer.parts(["other", task, ""], [1, num_views, 0], padded, [2, len(bins), len(bins) + 3])
    return np.concatenate(parts[1]), starts[1]


@settings(deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    task=st.text(max_size=30) | st.sampled_from(["push the_button", "a {state} {task}"]),
    num_views=st.integers(0, 4),
    state=STATES,
    tokenizer=st.sampled_from([WORDS, Letters()]),
)
def test_a_segment_is_the_encoded_text_with_its_views(
    family: str, task: str, num_views: int, state: list[float], tokenizer: WordTokenizer
) -> None:
    of = FAMILIES[family]
    bins = state_bins(state)
    writer = SegmentWriter(of, tokenizer)
    ids, starts = segment(writer, task, num_views, bins)
    heads, before, after = pieces(of, task=task, num_views=num_views)
    text = before + (" ".join(str(each) for each in bins.tolist()) if of.has_state_text else "") + after
    expected, expected_starts = [], []
    for head in heads:
        expected += tokenizer.encode(head)
        expected_starts.append(len(expected))
        expected += [IMAGE_ID] * 256
    assert ids.tolist() == expected + tokenizer.encode(text)
    assert starts.tolist() == expected_starts
    assert ids.dtype == starts.dtype == np.int32
    again = segment(writer, task, num_views, bins)
    assert np.array_equal(again[0], ids)


@settings(deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), task=st.text(max_size=40), views=st.integers(0, 3), state=STATES)
def test_no_segment_takes_more_tokens_than_are_kept_for_it(
    family: str, task: str, views: int, state: list[float]
) -> None:
    of = FAMILIES[family]
    costs = sample_costs(of, task_texts=[[task]], num_views=views, state_dim=len(state), tokenizer=WORDS)
    ids, _ = segment(SegmentWriter(of, WORDS), task, views, state_bins(state))
    longest, _ = segment(SegmentWriter(of, WORDS), task, views, state_bins([1.0] * len(state)))
    assert len(ids) <= costs.tokens[0]
    assert costs.tokens[0] - len(longest) <= 1, "hardly more is kept than the longest state takes"


def test_a_special_token_is_one() -> None:
    ids, starts = segment(SegmentWriter(FAMILIES["pi05"], WORDS), "push", 1, np.array([5]))
    assert ids[256] == 2, "<bos>"
    assert starts.tolist() == [0]


@pytest.mark.parametrize("task", ["push", "push the button", ""])
def test_the_second_segment_of_a_task_is_like_the_first(task: str) -> None:
    writer = SegmentWriter(FAMILIES["groot_n15"], WORDS)
    first, second = (segment(writer, task, 2, np.array([], np.int64)) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert first[0].tolist().count(IMAGE_ID) == 512


def test_tasks_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_MOST_FRAMES", 4)
    writer = SegmentWriter(FAMILIES["pi05"], WORDS)
    first = segment(writer, "task 0", 1, np.array([5]))[0]
    for at in range(20):
        segment(writer, f"task {at}", 1, np.array([5]))
        assert len(writer._frames) <= 4
    assert np.array_equal(segment(writer, "task 0", 1, np.array([5]))[0], first)
