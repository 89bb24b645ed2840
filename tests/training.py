"""A small released lake to load from, and a configuration that fits it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lakes import make_sources, make_unreleased

from lake import Lake, Release
from train.batch import Batch
from train.loader import LoaderConfig, ReadConfig
from train.plan import OrderConfig, PackConfig
from train.samples import SampleConfig

Sample = tuple[int, int, int, int]

ORDER = OrderConfig(lanes=3, block_frames=5, window_blocks=4)
SMALL = LoaderConfig(
    order=ORDER,
    packs=PackConfig(tokens=2048),
    sample=SampleConfig(horizon=4, image_size=32),
    read=ReadConfig(threads=2, ahead=1),
)


def make_released(folder: Path, root: object = None) -> Release:
    """Make a lake of two sources: toy, of three episodes with two views, and other, of two with one, one validation.

    Row ids of episodes do not begin at 0, and have orphans between them.
    """
    lake = make_unreleased(folder / "lake" if root is None else root, make_sources(folder / "sources"))
    return lake.make_release()


def small(**changes: Any) -> LoaderConfig:
    """Return ``SMALL`` with changes to any of its parts: order, packs, sample, read, or augment as a whole."""
    parts = {name: replace(getattr(SMALL, name), **change) for name, change in changes.items() if name != "augment"}
    return replace(SMALL, **parts, augment=changes.get("augment"))


def reopened(release: Release) -> Release:
    """Return the same release, opened anew."""
    return Lake(release.storage.uri).release(release.name)


def samples(batch: Batch) -> list[Sample]:
    """Return (source, epoch, episode, frame) of each sample of a pack."""
    columns = (batch.source_B, batch.epoch_B, batch.episode_B, batch.frame_B)
    return list(zip(*(each[: batch.num_samples].tolist() for each in columns), strict=True))
