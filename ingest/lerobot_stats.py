"""Compute the statistics that LeRobot keeps of an episode, or of a whole dataset."""

import math

import numpy as np

from lake.sketch import Sketch

# Legend of shape suffixes: T frames, D numeric dimensions of a frame, C color channels; 256 are the values of a pixel.

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
STATS = ("min", "max", "mean", "std", "count", *QUANTILES)
IMAGE_SIDE = 150
"""Images of at least twice this size are thinned before their pixels are counted, as LeRobot does."""


def matrix_stats(matrix_TD: np.ndarray) -> dict[str, np.ndarray]:
    """Compute every statistic of each column, exactly; ``std`` is the population's, as in LeRobot."""
    return {
        "min": matrix_TD.min(axis=0),
        "max": matrix_TD.max(axis=0),
        "mean": matrix_TD.mean(axis=0),
        "std": matrix_TD.std(axis=0),
        "count": np.array([len(matrix_TD)]),
        **dict(zip(QUANTILES, np.quantile(matrix_TD, list(QUANTILES.values()), axis=0), strict=True)),
    }


def sketch_stats(one: Sketch) -> dict[str, np.ndarray]:
    """Compute every statistic of the frames that a sketch has seen; LeRobot averages quantiles of episodes instead."""
    return {
        "min": one.min,
        "max": one.max,
        "mean": one.mean,
        "std": one.std(),
        "count": np.array([one.count]),
        **{name: one.quantile(q) for name, q in QUANTILES.items()},
    }


def count_pixels(image: np.ndarray) -> np.ndarray:
    """Count how often each value occurs in each channel of a thinned uint8 image [H, W, 3]; return [3, 256]."""
    step = max(1, math.floor(max(image.shape[:2]) / IMAGE_SIDE))
    thinned = image[::step, ::step] if max(image.shape[:2]) >= 2 * IMAGE_SIDE else image
    return np.stack([np.bincount(thinned[..., channel].ravel(), minlength=256) for channel in range(3)])


def pixel_stats(counts_C256: np.ndarray, *, num_images: int) -> dict[str, np.ndarray]:
    """Compute exact statistics from counts of pixels: values in [0, 1], each of shape (3, 1, 1)."""
    values = np.arange(256) / 255.0
    below = counts_C256.cumsum(axis=1)
    num_pixels = below[:, -1:]
    mean = (counts_C256 * values).sum(axis=1, keepdims=True) / num_pixels
    variance = (counts_C256 * (values - mean) ** 2).sum(axis=1, keepdims=True) / num_pixels
    stats = {
        "min": values[(below > 0).argmax(axis=1)],
        "max": values[(below == num_pixels).argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(variance),
        **{name: values[(below >= q * num_pixels).argmax(axis=1)] for name, q in QUANTILES.items()},
    }
    return {name: stat.reshape(3, 1, 1) for name, stat in stats.items()} | {"count": np.array([num_images])}
