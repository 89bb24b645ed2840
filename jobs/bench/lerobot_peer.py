"""Count the samples that LeRobot's own dataset and loader give, in LeRobot's own environment.

    .venv-lerobot/bin/python jobs/bench/lerobot_peer.py ROOT --horizon 50 --workers 2

Imports nothing of robolake. Prints one line of JSON.
"""

# pyright: reportMissingImports=false

import argparse
import itertools
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("lerobot", "torch", "torchvision", "torchcodec", "av", "datasets")
_PREFETCH = 2
"""Batches ahead of each worker, as in LeRobot's training."""
_WITHOUT_END = 1 << 40
"""Samples of a pass: more than are ever read."""
_PERIOD_S = 0.5


def main() -> None:
    """Read the dataset that the arguments name for as long as they say."""
    options = _options()
    # Beside this file lies robolake's datasets.py; LeRobot means another.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    _admit_torchvision()
    with _peak_memory() as peak:
        result = _read(options)
    print(json.dumps(result | {"peak_mib": round(peak[0], 1), "versions": _versions()}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("root", type=Path, help="folder of a LeRobot v3.0 dataset")
    parser.add_argument("--horizon", type=int, default=50, help="actions of a chunk")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="measure at least so long, after a warm-up")
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("torchcodec", "pyav"), help="by default what LeRobot takes by itself")
    return parser.parse_args()


def _admit_torchvision() -> None:
    """Let torchvision in without its compiled part, which fits another torch; LeRobot needs none of its operators."""
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _read(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
    from lerobot.datasets.transforms import ImageTransforms, ImageTransformsConfig
    from lerobot.datasets.video_utils import get_safe_default_codec
    from torch.utils.data import DataLoader, RandomSampler

    torch.manual_seed(options.seed)
    root = options.root.resolve()
    backend = options.backend or get_safe_default_codec()
    began = time.perf_counter()
    fps = LeRobotDatasetMetadata("local/dataset", root=root).fps
    dataset = LeRobotDataset(
        "local/dataset",
        root=root,
        image_transforms=ImageTransforms(ImageTransformsConfig(enable=True)) if options.augment else None,
        delta_timestamps={"action": [step / fps for step in range(options.horizon)]},
        video_backend=backend,
    )
    # LeRobot's training starts its workers again after each pass. A large dataset hardly notices, a small one would:
    # so here one pass goes on without end, with a fresh shuffle each time that all samples have been seen.
    loader = DataLoader(
        dataset,
        num_workers=options.workers,
        batch_size=options.batch_size,
        sampler=RandomSampler(dataset, num_samples=_WITHOUT_END),
        pin_memory=False,
        drop_last=False,
        prefetch_factor=_PREFETCH if options.workers else None,
    )
    normalise = _normaliser(dataset.meta)
    batches = iter(loader)
    _check(normalise(next(batches)), options.horizon)
    first_batch_s = time.perf_counter() - began
    # What the workers prepared while others were starting came too fast or too slowly.
    for batch in itertools.islice(batches, 1 + _PREFETCH * options.workers):
        normalise(batch)
    samples, cpu_s, began, seconds = 0, _cpu_s(), time.perf_counter(), 0.0
    while seconds < options.seconds:
        samples += len(normalise(next(batches))["action"])
        seconds = time.perf_counter() - began
    return {
        "samples": samples,
        "seconds": round(seconds, 3),
        "samples_per_s": round(samples / seconds, 2),
        "cpu_s": round(_cpu_s() - cpu_s, 2),
        "first_batch_s": round(first_batch_s, 3),
        "horizon": options.horizon,
        "batch_size": options.batch_size,
        "workers": options.workers,
        "augment": dataset.image_transforms is not None,
        "backend": backend,
        "episodes": dataset.num_episodes,
        "frames": dataset.num_frames,
        "views": dataset.meta.camera_keys,
    }


def _normaliser(meta: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what LeRobot's training does with a batch: state and action to mean 0 and deviation 1."""
    from lerobot.configs.types import FeatureType, NormalizationMode
    from lerobot.datasets.utils import dataset_to_policy_features
    from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline

    step = NormalizerProcessorStep(
        features=dataset_to_policy_features(meta.features),
        norm_map={FeatureType.STATE: NormalizationMode.MEAN_STD, FeatureType.ACTION: NormalizationMode.MEAN_STD},
        stats=meta.stats,
    )
    return PolicyProcessorPipeline(steps=[step], name="normalise")


def _check(batch: dict[str, Any], horizon: int) -> None:
    shapes = {name: tuple(batch[name].shape[:2]) for name in ("action", "action_is_pad")}
    expected = (len(batch["action"]), horizon)
    if any(shape != expected for shape in shapes.values()):
        sys.exit(f"LeRobot's batch has {shapes}, expected {expected} of each")


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Watch this process and its workers while the block runs; the item of the list is MiB in all, at most."""
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(_PERIOD_S):
            peak[0] = max(peak[0], _memory_mib())

    thread = threading.Thread(target=watch, name="peak-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _memory_mib() -> float:
    """Return the proportional memory (PSS) of this process and its workers: what they share counts once."""
    kib = 0
    for process, _ in _family():
        try:
            lines = (process / "smaps_rollup").read_text(encoding="utf-8").splitlines()
        except OSError:  # It has ended.
            continue
        kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib / 1024


def _cpu_s() -> float:
    """Return the processor time that this process and its workers have used."""
    return sum(int(fields[11]) + int(fields[12]) for _, fields in _family()) / os.sysconf("SC_CLK_TCK")


def _family() -> Iterator[tuple[Path, list[str]]]:
    """Yield this process and its children: the folder in /proc, the fields of its status behind the name."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:  # It has ended.
                continue
            if os.getpid() in (int(entry.name), int(fields[1])):
                yield entry, fields


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {package: metadata.version(package) for package in PACKAGES}


if __name__ == "__main__":
    main()
