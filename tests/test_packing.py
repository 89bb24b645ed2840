"""Tests of train/packing.py."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.keyed import key_of
from train.packing import Budgets, Ints, Kind, SampleTooLargeError, budgets_for, fill, layout, pack
from train.tokens import FAMILIES, WordTokenizer, sample_costs

RELAXED = settings(deadline=None)
BUDGETS = Budgets(tokens=100, images=6, samples=8)
SAMPLES = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 6)), max_size=150)
WORDS = ["pick", "place", "the", "red", "cup", "bowl", "into", "drawer", "carefully", "towel", "upright", "microwave"]
MIXTURES = [(0.4, 0.4, 0.2), (0.6, 0.3, 0.1)]


def arrays(samples: list[tuple[int, int]]) -> tuple[Ints, Ints]:
    return np.array([t for t, _ in samples], np.int64), np.array([i for _, i in samples], np.int64)


def mixed(shares: tuple[float, ...], budget: int, num_windows: int = 40) -> tuple[Budgets, list[tuple[Ints, Ints]]]:
    """Return the budgets of a mixture of 1, 2 and 3 cameras, and what the samples of some of its windows cost."""
    rng = np.random.default_rng(7)
    costs = []
    for num_views, state_dim in ((1, 7), (2, 14), (3, 26)):
        tasks = [[" ".join(rng.choice(WORDS, rng.integers(3, 16)))] for _ in range(200)]
        costs.append(
            sample_costs(
                FAMILIES["pi05"],
                task_texts=tasks,
                num_views=num_views,
                state_dim=state_dim,
                tokenizer=WordTokenizer(),
            )
        )
    kinds = [
        Kind(share=share, tokens=float(each.tokens.mean()), images=views)
        for share, each, views in zip(shares, costs, (1, 2, 3), strict=True)
    ]
    windows = []
    for _ in range(num_windows):
        source, episode = rng.choice(3, 128, p=shares), rng.integers(0, 200, 128)
        tokens = np.array([costs[s].tokens[e] for s, e in zip(source, episode, strict=True)], np.int64)
        windows.append((np.repeat(tokens, 32), np.repeat(source + 1, 32)))
    return budgets_for(kinds, tokens=budget), windows


@RELAXED
@given(samples=SAMPLES, key=st.integers(0, 2**64 - 1))
def test_every_sample_is_in_one_pack_and_no_pack_holds_too_much(samples: list[tuple[int, int]], key: int) -> None:
    tokens, images = arrays(samples)
    packs = pack(tokens, images, BUDGETS, key=key)
    assert sorted(index for each in packs for index in each.tolist()) == list(range(len(samples)))
    for each in packs:
        assert 0 < len(each) <= BUDGETS.samples
        assert tokens[each].sum() <= BUDGETS.tokens
        assert images[each].sum() <= BUDGETS.images
    lengths = [len(each) for each in packs]
    assert not lengths or max(lengths) - min(lengths) <= 1


@RELAXED
@given(samples=SAMPLES, key=st.integers(0, 2**64 - 1))
def test_packing_again_gives_the_same_packs(samples: list[tuple[int, int]], key: int) -> None:
    tokens, images = arrays(samples)
    first, again = (pack(tokens.copy(), images.copy(), BUDGETS, key=key) for _ in range(2))
    assert [each.tolist() for each in first] == [each.tolist() for each in again]


def test_another_key_gives_other_packs() -> None:
    tokens, images = np.full(200, 10), np.ones(200, np.int64)
    first, other = (pack(tokens, images, BUDGETS, key=key) for key in (0, 1))
    assert {tuple(each.tolist()) for each in first}.isdisjoint(tuple(each.tolist()) for each in other)


def test_the_packs_are_what_they_were_when_they_were_released() -> None:
    """Cursors in checkpoints rely on it: a change of the arithmetic needs a new VERSION, and these numbers with it."""
    tokens = np.array([30, 50, 20, 70, 10, 30, 30, 50, 90, 20, 20, 30, 40, 10])
    images = np.array([1, 2, 1, 3, 0, 1, 1, 2, 3, 1, 1, 1, 2, 0])
    packs = pack(tokens, images, BUDGETS, key=key_of(1, "window", 2))
    assert [each.tolist() for each in packs] == [[2, 1], [13, 8], [4, 3], [10, 7], [11, 6], [9, 12], [0, 5]]


def test_no_samples_make_no_packs() -> None:
    nothing = np.zeros(0, np.int64)
    assert pack(nothing, nothing, BUDGETS, key=0) == []
    assert fill([], nothing, nothing, BUDGETS) == {"tokens": 0.0, "images": 0.0, "samples": 0.0}


def test_samples_that_cost_nothing_are_packed_by_their_number() -> None:
    nothing = np.zeros(20, np.int64)
    packs = pack(nothing, nothing, Budgets(tokens=1, images=0, samples=8), key=0)
    assert sorted(len(each) for each in packs) == [6, 7, 7]


@pytest.mark.parametrize(
    ("tokens", "images", "names", "message"),
    [
        ([10, 101, 102], [1, 1, 1], ["a", "b", "c"], "b has 101 tokens, more than the 100 of a pack, .* 1 others"),
        ([10, 10], [1, 7], None, "sample 1 has 7 images, more than the 6 of a pack"),
    ],
)
def test_a_sample_that_fits_no_pack_is_named(
    tokens: list[int], images: list[int], names: list[str] | None, message: str
) -> None:
    with pytest.raises(SampleTooLargeError, match=message):
        pack(np.array(tokens), np.array(images), BUDGETS, key=0, names=names)


def test_a_negative_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample has -3 tokens"):
        pack(np.array([5, -3]), np.array([1, 1]), BUDGETS, key=0)


def test_samples_of_any_size_are_sorted_apart_or_refused() -> None:
    tokens, images = np.array([0, 5, 2**31 - 1, 1]), np.array([0, 2**28, 2, 1])
    with pytest.raises(ValueError, match="4 samples of such sizes are too many"):
        pack(tokens, images, Budgets(tokens=2**31 - 1, images=2**31 - 1, samples=4), key=0)
    packs = pack(tokens, images, Budgets(tokens=2**31 - 1, images=2**28, samples=4), key=0)
    assert sorted(len(each) for each in packs) == [1, 1, 2]


@pytest.mark.parametrize(
    "changed", [{"tokens": 0}, {"tokens": 2**31}, {"images": -1}, {"images": 2**31}, {"samples": 0}]
)
def test_budgets_that_hold_nothing_are_refused(changed: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="can hold no pack"):
        Budgets(**{"tokens": 100, "images": 4, "samples": 4} | changed)


@pytest.mark.parametrize(
    ("shares", "budget", "tokens", "images"),
    [(shares, *goal) for shares in MIXTURES for goal in ((16_384, 0.98, 0.96), (8192, 0.96, 0.96))],
)
def test_packs_of_mixed_cameras_are_full(shares: tuple[float, ...], budget: int, tokens: float, images: float) -> None:
    budgets, windows = mixed(shares, budget)
    fills = [fill(pack(t, i, budgets, key=at), t, i, budgets) for at, (t, i) in enumerate(windows)]
    assert np.mean([each["tokens"] for each in fills]) >= tokens
    assert np.mean([each["images"] for each in fills]) >= images
    assert np.mean([each["samples"] for each in fills]) >= 0.7


def test_packs_of_a_window_are_alike() -> None:
    budgets, windows = mixed(MIXTURES[0], 16_384, num_windows=4)
    for at, (tokens, images) in enumerate(windows):
        packs = pack(tokens, images, budgets, key=at)
        for kind in (1, 2, 3):
            counts = [int((images[each] == kind).sum()) for each in packs]
            assert max(counts) - min(counts) <= 2
        loads = [int(images[each].sum()) for each in packs]
        assert max(loads) - min(loads) <= 1


def test_neither_order_says_anything_about_size() -> None:
    budgets, windows = mixed(MIXTURES[0], 8192)
    within: list[tuple[float, float]] = []
    between: list[tuple[float, float]] = []
    neighbours: list[tuple[float, float]] = []
    neighbouring: list[float] = []
    for at, (tokens, images) in enumerate(windows):
        packs = pack(tokens, images, budgets, key=at)
        neighbouring += [float(a // 32 == b // 32) for each in packs for a, b in pairwise(each)]
        within += [(place / len(each), float(images[index])) for each in packs for place, index in enumerate(each)]
        loads = np.array([float(tokens[each].sum()) for each in packs])
        loads = (loads - loads.mean()).tolist()
        between += [(place / len(packs), load) for place, load in enumerate(loads)]
        neighbours += pairwise(loads)
    for pairs in (within, between, neighbours):
        # Of so many independent pairs the correlation has a standard deviation of 1 / sqrt(n).
        assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 4 / np.sqrt(len(pairs))
    assert np.mean(neighbouring) < 1.2 / 128, "frames of one block are next to each other as rarely as by chance"


def test_frames_of_one_block_go_to_packs_apart() -> None:
    budgets, windows = mixed(MIXTURES[0], 16_384, num_windows=3)
    for at, (tokens, images) in enumerate(windows):
        block = np.arange(len(tokens)) // 32
        packs = pack(tokens, images, budgets, key=at)
        most = max(int(np.bincount(block[each]).max()) for each in packs)
        assert most <= 6, "of 32 frames in about 128 packs"
        # Where a frame is in its block does not decide its pack.
        spread = [np.std(np.arange(len(tokens))[each] % 32) for each in packs]
        assert np.mean(spread) == pytest.approx(np.sqrt((32**2 - 1) / 12), rel=0.05)


def test_budgets_follow_the_mixture() -> None:
    kinds = [Kind(share=3.0, tokens=300.0, images=1), Kind(share=1.0, tokens=900.0, images=3)]
    # 450 tokens and 1.5 images a sample; 16,384 tokens hold 36.4 samples with 54.6 images
    assert budgets_for(kinds) == Budgets(tokens=16_384, images=54, samples=44)
    assert budgets_for(kinds, tokens=1000) == Budgets(tokens=1000, images=3, samples=4)
    assert budgets_for([Kind(share=1.0, tokens=40.0, images=0)], tokens=400) == Budgets(
        tokens=400, images=0, samples=10
    )
    for nothing in ([], [Kind(share=0.0, tokens=300.0, images=1)]):
        with pytest.raises(ValueError, match="at least one kind of sample with a share"):
            budgets_for(nothing)


@RELAXED
@given(tokens=st.lists(st.integers(0, 14), max_size=7))
def test_a_layout_has_static_sizes_and_a_tail_of_its_own(tokens: list[int]) -> None:
    made = layout(np.array(tokens, np.int64), BUDGETS)
    assert [each.dtype for each in (made.cu_seqlens, made.positions, made.segment_ids)] == [np.int32] * 3
    assert made.cu_seqlens.shape == (BUDGETS.samples + 2,)
    assert made.positions.shape == made.segment_ids.shape == (BUDGETS.tokens,)
    used, tail = sum(tokens), BUDGETS.tokens - sum(tokens)
    starts = [sum(tokens[:at]) for at in range(len(tokens) + 1)]
    assert made.cu_seqlens.tolist() == starts + [BUDGETS.tokens] * (BUDGETS.samples + 1 - len(tokens))
    positions = [at for length in tokens for at in range(length)]
    assert made.positions.tolist() == positions + list(range(tail))
    segments = [at for at, length in enumerate(tokens) for _ in range(length)]
    assert made.segment_ids.tolist() == segments + [BUDGETS.samples] * (BUDGETS.tokens - used)


def test_a_full_layout_has_an_empty_tail() -> None:
    made = layout(np.array([16, 12, 12, 12, 12, 12, 12, 12]), BUDGETS)
    assert made.cu_seqlens[-2:].tolist() == [100, 100]
    assert made.segment_ids[-1] == 7


@pytest.mark.parametrize("tokens", [[60, 41], [1] * 9])
def test_a_layout_of_too_much_is_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{len(tokens)} samples of {sum(tokens)} tokens exceed Budgets"):
        layout(np.array(tokens), BUDGETS)
