"""Tests of train/lanes.py."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from streams import BUDGETS, RELAXED, samples, small, streams, three_cameras

from train.lanes import Costs, Stream
from train.order import mixture
from train.packing import SampleTooLargeError


@RELAXED
@given(stream=streams())
def test_the_packs_of_a_window_are_its_samples_with_what_they_cost(stream: Stream) -> None:
    packs = stream.window(0)
    assert [(pack.window, pack.index) for pack in packs] == [(0, index) for index in range(len(packs))]
    for pack in packs:
        assert pack.num_samples == len(pack.frame)
        assert pack.tokens.sum() <= BUDGETS.tokens
        assert pack.images.sum() <= BUDGETS.images
        for at, (source, _, episode, _) in enumerate(samples([pack])):
            assert pack.tokens[at] == stream.costs[source].tokens[episode]
            assert pack.images[at] == stream.costs[source].images[episode]
    blocks = stream.order.window(0)
    assert sum(pack.num_samples for pack in packs) == blocks.num_samples
    for pack in packs:
        for name in ("source", "epoch", "episode"):
            assert np.array_equal(getattr(pack, name), getattr(blocks, name)[pack.slot])
        assert np.all((blocks.start[pack.slot] <= pack.frame) & (pack.frame < blocks.end[pack.slot]))


def test_weights_in_the_same_proportion_are_the_same_stream() -> None:
    sources = small().order.sources
    doubled = [replace(source, weight=2 * source.weight) for source in sources]
    assert replace(small(), order=mixture(doubled, seed=1, window_blocks=4)).fingerprint == small().fingerprint


def test_the_stream_is_what_it_was_when_it_was_released() -> None:
    """Cursors in checkpoints rely on it: a change of the arithmetic needs a new VERSION, and these numbers with it."""
    pack = small().window(5)[1]
    assert pack.rows.tolist() == [
        [1, 0, 1, 1],
        [1, 4, 2, 1],
        [1, 1, 0, 1],
        [38, 15, 37, 37],
        [20, 10, 10, 20],
        [2, 1, 1, 2],
        [2, 0, 3, 2],
    ]


def test_all_lanes_at_the_same_place_of_their_windows_are_like_any_others() -> None:
    stream = three_cameras(1)
    by_place: list[list[float]] = [[], [], [], []]
    for number in range(300):
        packs = stream.window(number)
        means = np.array([pack.images.mean() for pack in packs])
        for place, mean in enumerate(means - means.mean()):
            by_place[4 * place // len(packs)].append(float(mean))
    for quarter in by_place:
        assert abs(np.mean(quarter)) < 4 * np.std(quarter) / np.sqrt(len(quarter))


def test_a_sample_that_fits_no_pack_is_named_by_where_it_comes_from() -> None:
    stream = replace(small(tokens=500), num_lanes=1)
    with pytest.raises(SampleTooLargeError, match=r"frame \d+ of episode 1 of source b has 500 tokens, more than"):
        [stream.window(number) for number in range(50)]


def test_parts_that_do_not_fit_together_are_refused() -> None:
    stream = small()
    with pytest.raises(ValueError, match="num_lanes=0"):
        replace(stream, num_lanes=0)
    with pytest.raises(ValueError, match="costs of 1 sources for an order of 2"):
        replace(stream, costs=stream.costs[:1])
    with pytest.raises(ValueError, match="source b has 2 episodes, and costs of another number"):
        replace(stream, costs=(stream.costs[0], Costs(tokens=np.ones(3, np.int64), images=np.ones(3, np.int64))))


def test_an_endless_stream_has_no_number_of_steps() -> None:
    with pytest.raises(ValueError, match="an endless mixture has no number of steps"):
        small().num_steps()
