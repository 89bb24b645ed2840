"""Tests of ingest/lerobot_stats.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.lerobot_stats import QUANTILES, STATS, count_pixels, matrix_stats, pixel_stats, sketch_stats
from lake.sketch import merge, sketch


def test_an_episode_gets_the_statistics_that_numpy_computes() -> None:
    matrix = np.random.default_rng(0).normal(size=(101, 3))
    stats = matrix_stats(matrix)
    assert tuple(stats) == STATS
    assert stats["count"].tolist() == [101]
    for name in ("min", "max", "mean", "std"):
        assert stats[name] == pytest.approx(getattr(matrix, name)(axis=0))
    assert stats["q50"] == pytest.approx(np.median(matrix, axis=0))
    assert stats["q99"] == pytest.approx(np.sort(matrix, axis=0)[99])


def test_a_dataset_gets_the_statistics_of_all_frames_together() -> None:
    # Averaging the quantiles of these episodes would give a q90 of about 0.45 times the right one.
    rng = np.random.default_rng(0)
    episodes = [rng.normal(size=(300, 2)) * scale for scale in (0.01, 1, 0.01, 1)]
    stats = sketch_stats(merge(sketch(episode) for episode in episodes))
    whole = np.concatenate(episodes)
    assert tuple(stats) == STATS
    assert stats["count"].tolist() == [1200]
    for name in ("min", "max", "mean", "std"):
        assert stats[name] == pytest.approx(getattr(whole, name)(axis=0))
    for name, q in QUANTILES.items():
        assert stats[name] == pytest.approx(np.quantile(whole, q, axis=0, method="inverted_cdf"), rel=0.004)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 12), st.integers(1, 12))
def test_counted_pixels_give_the_statistics_of_the_images(seed: int, count: int, height: int, width: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    stats = pixel_stats(sum(count_pixels(image) for image in images), num_images=count)
    channels = images.reshape(-1, 3) / 255
    assert tuple(sorted(stats)) == tuple(sorted(STATS))
    assert stats["count"].tolist() == [count]
    assert all(value.shape == (3, 1, 1) for name, value in stats.items() if name != "count")
    for name in ("min", "max", "mean", "std"):
        assert stats[name].ravel() == pytest.approx(getattr(channels, name)(axis=0), abs=1e-12)
    for name, q in QUANTILES.items():
        assert stats[name].ravel() == pytest.approx(np.quantile(channels, q, axis=0, method="inverted_cdf"))


def test_large_images_are_thinned() -> None:
    image = np.zeros((480, 640, 3), np.uint8)
    assert count_pixels(image).sum() == 3 * 120 * 160
    assert count_pixels(image[:200, :298]).sum() == 3 * 200 * 298
