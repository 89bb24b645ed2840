"""Tests of train/order.py."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.order import PERIOD_SLOTS, Blocks, Order, SourceFrames, is_validation, mixture, one_pass, weights_by_size

RELAXED = settings(deadline=None)
LENGTHS = st.lists(st.integers(0, 90), min_size=1, max_size=8).filter(any)


@st.composite
def sources(draw: st.DrawFn, *, weighted: bool = True) -> list[SourceFrames]:
    found = []
    for at in range(draw(st.integers(1, 4))):
        weight = draw(st.sampled_from([0.5, 1.0, 2.0, 7.0])) if weighted else 1.0
        found.append(SourceFrames(name=f"s{at}", lengths=np.array(draw(LENGTHS), np.int64), weight=weight))
    return found


def samples(blocks: Blocks) -> list[tuple[int, int, int, int]]:
    slot, frame = blocks.samples()
    parts = (blocks.source[slot], blocks.epoch[slot], blocks.episode[slot], frame)
    return list(zip(*(part.tolist() for part in parts), strict=True))


def rows(blocks: Blocks) -> list[tuple[int, ...]]:
    parts = (getattr(blocks, name).tolist() for name in ("source", "epoch", "episode", "start", "end"))
    return list(zip(*parts, strict=True))


@RELAXED
@given(of=sources(), seed=st.integers(0, 2**40), block=st.integers(1, 40), slots=st.integers(1, 900))
def test_every_frame_comes_once_in_each_epoch_of_its_source(
    of: list[SourceFrames], seed: int, block: int, slots: int
) -> None:
    order = mixture(of, seed=seed, block_frames=block)
    seen = samples(order.slots(0, slots))
    assert len(set(seen)) == len(seen)
    found: dict[tuple[int, int], int] = Counter((source, epoch) for source, epoch, _, _ in seen)
    for at, source in enumerate(of):
        epochs = sorted(epoch for s, epoch in found if s == at)
        assert epochs == list(range(len(epochs))), "epochs begin one after the other"
        assert all(found[at, epoch] == source.lengths.sum() for epoch in epochs[:-1]), "all but the last are whole"
    assert all(0 <= frame < of[source].lengths[episode] for source, _, episode, frame in seen)


@RELAXED
@given(of=sources(), cuts=st.lists(st.integers(0, 2 * PERIOD_SLOTS), min_size=1, max_size=4))
def test_any_slots_can_be_asked_for_alone(of: list[SourceFrames], cuts: list[int]) -> None:
    order = mixture(of, seed=3)
    borders = sorted({0, *cuts, 2 * PERIOD_SLOTS + 5})
    whole = order.slots(0, borders[-1])
    pieces = [order.slots(first, end) for first, end in itertools.pairwise(borders)]
    for name in ("source", "epoch", "episode", "start", "end"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(piece, name) for piece in pieces]))


@RELAXED
@given(of=sources(), block=st.integers(1, 40))
def test_blocks_are_contiguous_even_and_never_longer_than_asked(of: list[SourceFrames], block: int) -> None:
    blocks = one_pass(of, block_frames=block).slots(0, one_pass(of, block_frames=block).num_slots or 0)
    lengths = blocks.end - blocks.start
    assert lengths.min() >= 1
    assert lengths.max() <= block
    for key in set(zip(blocks.source.tolist(), blocks.episode.tolist(), strict=True)):
        mine = lengths[(blocks.source == key[0]) & (blocks.episode == key[1])]
        assert mine.max() - mine.min() <= 1


@RELAXED
@given(of=sources(), seed=st.integers(0, 100), block=st.integers(1, 40), window=st.integers(1, 50))
def test_one_pass_holds_every_frame_exactly_once(of: list[SourceFrames], seed: int, block: int, window: int) -> None:
    order = one_pass(of, seed=seed, block_frames=block, window_blocks=window)
    assert order.num_windows is not None
    seen = [sample for number in range(order.num_windows) for sample in samples(order.window(number))]
    expected = [(s, 0, e, f) for s, each in enumerate(of) for e, n in enumerate(each.lengths) for f in range(n)]
    assert sorted(seen) == expected
    for number in (-1, order.num_windows):
        with pytest.raises(IndexError):
            order.window(number)


@RELAXED
@given(of=sources(), periods=st.integers(1, 3), seed=st.integers(0, 50))
def test_weights_hold_in_samples(of: list[SourceFrames], periods: int, seed: int) -> None:
    order = mixture(of, seed=seed)
    weights = np.array([source.weight for source in of])
    assert np.allclose(list(order.shares().values()), weights / weights.sum(), atol=1e-8)
    # Blocks of a source differ in length, so over a stretch shares hold to what one epoch of it may be off.
    blocks = order.slots(0, periods * PERIOD_SLOTS)
    counts = np.bincount(blocks.source, minlength=len(of))
    mean = np.array([source.lengths.sum() / -(-source.lengths // 32).sum() for source in of])
    assert np.allclose(counts, periods * PERIOD_SLOTS * (weights / mean) / (weights / mean).sum(), atol=1.001)
    drawn = np.bincount(blocks.source, weights=blocks.end - blocks.start, minlength=len(of))
    assert np.all(np.abs(drawn - counts * mean) <= [source.lengths.sum() for source in of])


def test_a_small_weight_is_exact_in_the_long_run() -> None:
    of = [SourceFrames(name="big", lengths=np.full(10, 320), weight=0.9993), *[]]
    of.append(SourceFrames(name="small", lengths=np.full(10, 320), weight=0.0007))
    order = mixture(of)
    counts = [int((order.slots(p * PERIOD_SLOTS, (p + 1) * PERIOD_SLOTS).source == 1).sum()) for p in range(40)]
    assert set(counts) == {2, 3}
    assert abs(sum(counts) - 0.0007 * PERIOD_SLOTS * 40) < 1.001


def test_a_source_without_weight_is_left_out() -> None:
    of = [
        SourceFrames(name="a", lengths=np.array([50])),
        SourceFrames(name="off", lengths=np.array([50]), weight=0.0),
        SourceFrames(name="b", lengths=np.array([50])),
        SourceFrames(name="empty", lengths=np.zeros(0, np.int64), weight=0.0),
    ]
    order = mixture(of)
    assert set(order.slots(0, 5000).source.tolist()) == {0, 2}
    assert order.shares() == {"a": 0.5, "off": 0.0, "b": 0.5, "empty": 0.0}


def big_order() -> Order:
    rng = np.random.default_rng(0)
    of = [
        SourceFrames(name="a", lengths=rng.integers(20, 400, 3000), weight=0.7),
        SourceFrames(name="b", lengths=rng.integers(20, 400, 500), weight=0.3),
    ]
    return mixture(of, seed=11)


def test_the_composition_of_windows_is_stationary() -> None:
    order = big_order()
    share = np.array([(order.window(number).source == 1).mean() for number in range(640)])
    expected = order.slots(0, 100 * PERIOD_SLOTS).source.mean()
    spread = np.sqrt(expected * (1 - expected) / 128)
    assert abs(share.mean() - expected) < 1e-9 + 0.02 * expected
    assert np.abs(share - expected).max() < 5 * spread
    halves = share[:320].mean(), share[320:].mean()
    assert abs(halves[0] - halves[1]) < 5 * spread / np.sqrt(320)
    assert abs(np.corrcoef(share[:-1], share[1:])[0, 1]) < 0.2


def test_blocks_are_as_well_shuffled_as_by_a_true_permutation() -> None:
    blocks = big_order().slots(0, 20_000)
    episode = blocks.episode[blocks.source == 0].astype(np.float64)
    assert abs(np.corrcoef(episode[:-1], episode[1:])[0, 1]) < 0.03
    shuffled = np.random.default_rng(1).permutation(episode)
    same = (np.diff(episode) == 0).mean(), (np.diff(shuffled) == 0).mean()
    assert abs(same[0] - same[1]) < 0.002


def test_other_seeds_and_epochs_have_other_orders() -> None:
    of = [SourceFrames(name="a", lengths=np.full(40, 64))]
    first, other = (mixture(of, seed=seed).slots(0, 160) for seed in (0, 1))
    assert not np.array_equal(first.episode[:80], other.episode[:80])
    assert first.epoch.tolist() == [0] * 80 + [1] * 80
    assert not np.array_equal(first.episode[:80], first.episode[80:])


def test_a_source_s_own_order_does_not_depend_on_the_others() -> None:
    of = [SourceFrames(name="a", lengths=np.full(40, 64)), SourceFrames(name="b", lengths=np.full(9, 64), weight=3.0)]
    alone = mixture(of[:1], seed=5).slots(0, 200)
    mixed = mixture([of[1], of[0]], seed=5).slots(0, 1000)
    mine = mixed.source == 1
    assert np.array_equal(mixed.episode[mine][:200], alone.episode)
    assert np.array_equal(mixed.start[mine][:200], alone.start)


def test_a_billion_frames_are_no_more_than_their_episodes_lengths() -> None:
    lengths = np.full(1_000_000, 1000)
    tracemalloc.start()
    order = mixture([SourceFrames(name="a", lengths=lengths)], seed=1)
    blocks = order.window(200_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert blocks.num_samples > 3900
    assert peak < 100 << 20


@pytest.mark.parametrize(
    ("change", "value"),
    [("seed", 2), ("block_frames", 16), ("window_blocks", 64), ("weight", 2.0), ("lengths", [41, 64]), ("name", "c")],
)
def test_a_fingerprint_names_everything_that_the_order_depends_on(change: str, value: object) -> None:
    def fingerprint(**changed: object) -> str:
        source = {"name": "b", "lengths": [40, 64], "weight": 1.0} | changed
        options = {key: source.pop(key) for key in ("seed", "block_frames", "window_blocks") if key in source}
        second = SourceFrames(
            name=str(source["name"]), lengths=np.array(source["lengths"]), weight=float(str(source["weight"]))
        )
        first = SourceFrames(name="a", lengths=np.array([30, 50]))
        return mixture([first, second], **{"seed": 1} | options).fingerprint  # type: ignore[arg-type]

    assert fingerprint() == fingerprint()
    assert fingerprint(**{change: value}) != fingerprint()


def test_the_order_is_what_it_was_when_it_was_released() -> None:
    """Cursors in checkpoints rely on it: a change of the arithmetic needs a new VERSION, and these numbers with it."""
    of = [
        SourceFrames(name="a", lengths=np.array([100, 7, 0, 64]), weight=2.0),
        SourceFrames(name="b", lengths=np.array([33, 200])),
    ]
    assert rows(mixture(of, seed=1).slots(5000, 5006)) == [
        (0, 481, 0, 25, 50),
        (0, 481, 0, 75, 100),
        (0, 481, 3, 0, 32),
        (0, 481, 3, 32, 64),
        (0, 481, 1, 0, 7),
        (0, 481, 0, 50, 75),
    ]
    assert rows(one_pass(of, seed=1).slots(2, 8)) == [
        (0, 0, 3, 0, 32),
        (0, 0, 3, 32, 64),
        (0, 0, 1, 0, 7),
        (1, 0, 1, 57, 85),
        (0, 0, 0, 25, 50),
        (1, 0, 1, 171, 200),
    ]


def test_slots_that_are_not_there_are_refused() -> None:
    of = [SourceFrames(name="a", lengths=np.array([100]))]
    for order, first, end in [(mixture(of), 3, 3), (mixture(of), -1, 3), (one_pass(of), 2, 5)]:
        with pytest.raises(IndexError, match=f"slots {first} to {end} of {order.num_slots}"):
            order.slots(first, end)


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ([], "at least one source"),
        ([SourceFrames(name="a", lengths=np.array([5]), weight=0.0)], "sum to zero"),
        ([SourceFrames(name="a", lengths=np.array([5]), weight=-1.0)], "source a has a weight of -1"),
        ([SourceFrames(name="a", lengths=np.array([5]), weight=float("nan"))], "source a has a weight of nan"),
        ([SourceFrames(name="a", lengths=np.array([0, 0]))], "source a has a weight of 1 and no frames"),
        ([SourceFrames(name="a", lengths=np.array([3, -2]))], "an episode of -2 frames"),
        ([SourceFrames(name="a", lengths=np.array([5]))] * 2, "two sources of one name"),
        (
            [
                SourceFrames(name="a", lengths=np.array([50])),
                SourceFrames(name="tiny", lengths=np.array([50]), weight=1e-4),
            ],
            r"source tiny would get 0.0001 of the blocks; .* Raise its weight",
        ),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(of: list[SourceFrames], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(of)


def test_nothing_to_pass_over_is_refused() -> None:
    with pytest.raises(ValueError, match="none of a has a frame"):
        one_pass([SourceFrames(name="a", lengths=np.array([0]))])
    with pytest.raises(ValueError, match="block_frames=0"):
        one_pass([SourceFrames(name="a", lengths=np.array([1]))], block_frames=0)


def test_weights_by_size() -> None:
    assert weights_by_size([100, 300, 0]) == [0.25, 0.75, 0.0]
    assert weights_by_size([100, 400], temperature=2.0) == pytest.approx([1 / 3, 2 / 3])
    assert weights_by_size([100, 300], temperature=1e6) == pytest.approx([0.5, 0.5], abs=1e-5)
    with pytest.raises(ValueError, match="temperature=0"):
        weights_by_size([1], temperature=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100), fraction=st.sampled_from([0.0, 0.05, 0.5]))
def test_the_split_is_by_uid_alone(seed: int, fraction: float) -> None:
    uids = np.arange(4000, dtype=np.uint64) * np.uint64(2654435761)
    chosen = is_validation(uids, fraction, seed=seed)
    assert abs(chosen.mean() - fraction) < 0.04
    assert np.array_equal(is_validation(uids[::-1], fraction, seed=seed), chosen[::-1])
    assert np.array_equal(is_validation(uids[:100], fraction, seed=seed), chosen[:100])
    with pytest.raises(ValueError, match="fraction=1"):
        is_validation(uids, 1.0)
