"""Open a LeRobot v3.0 dataset with LeRobot itself, in its own environment, and print what it reads as one JSON line.

    .venv-lerobot/bin/python tests/lerobot_open.py ROOT [INDEX ...]

Without indices: the first, middle and last frame of every episode.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

_KEPT: list[object] = []
"""What has to live as long as this process."""


def prepare() -> None:
    """Keep LeRobot off the network and out of the home directory, and let torchvision in without its compiled part."""
    cache = tempfile.TemporaryDirectory(prefix="lerobot-cache-")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": cache.name}
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.extend((cache, library))


def main() -> None:
    """Read some frames of the dataset at the first argument."""
    prepare()
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/dataset", root=Path(sys.argv[1]).resolve())
    if dataset.num_frames != len(dataset.hf_dataset):
        sys.exit(f"info.json says {dataset.num_frames} frames, the data files have {len(dataset.hf_dataset)}")
    indices = [int(argument) for argument in sys.argv[2:]]
    for episode in [] if indices else dataset.meta.episodes:
        begin, end = episode["dataset_from_index"], episode["dataset_to_index"]
        indices += [begin, (begin + end) // 2, end - 1]
    result = {
        "num_episodes": dataset.num_episodes,
        "num_frames": dataset.num_frames,
        "fps": dataset.fps,
        "robot_type": dataset.meta.robot_type,
        "views": dataset.meta.camera_keys,
        "tasks": list(dataset.meta.tasks.index),
        "lengths": list(dataset.meta.episodes["length"]),
        "stats": {key: {name: value.tolist() for name, value in s.items()} for key, s in dataset.meta.stats.items()},
        "samples": [_sample(dataset, index) for index in dict.fromkeys(indices)],
    }
    print(json.dumps(result))


def _sample(dataset: Any, index: int) -> dict[str, Any]:
    item = dataset[index]
    views = dataset.meta.camera_keys
    values = {key: value for key, value in item.items() if key not in views}
    read = {key: value if isinstance(value, str) else value.tolist() for key, value in values.items()}
    return {
        "index": index,
        "episode_index": read["episode_index"],
        "state": read.get("observation.state"),
        "action": read["action"],
        "timestamp": read["timestamp"],
        "task": read["task"],
        "columns": read,
        "view_mean": {view: float(item[view].mean()) for view in views},
        "view_shape": {view: list(item[view].shape) for view in views},
    }


if __name__ == "__main__":
    main()
