"""Pictures of a release for people to look at."""

from pathlib import Path

import numpy as np

from lake import Release
from lake.images import decode_jpeg

_MOMENTS = 6


def contact_sheet(release: Release, path: Path, *, episodes_per_task: int = 1) -> Path:
    """Draw some frames of each task, one row a view, from the first frame to the last.

    Args:
        path: of the PNG file.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows = _rows(release, episodes_per_task)
    figure, axes = plt.subplots(
        len(rows), _MOMENTS, figsize=(2.1 * _MOMENTS, 2.35 * len(rows)), squeeze=False, layout="constrained"
    )
    for line, (title, moments) in zip(axes, rows, strict=True):
        for axis, (time_s, rgb) in zip(line, moments, strict=True):
            axis.imshow(rgb)
            axis.set_axis_off()
            axis.set_title(f"{time_s:.2f} s", fontsize=8)
        line[0].set_title("")
        line[0].set_title(f"{title}\n{moments[0][0]:.2f} s", fontsize=8, loc="left")
    figure.suptitle(
        f"release {release.name}: {release.num_episodes} episodes, {release.num_frames:,} frames", fontsize=11
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _rows(release: Release, episodes_per_task: int) -> list[tuple[str, list[tuple[float, np.ndarray]]]]:
    """Return (title, [(time in seconds, picture [H, W, 3])]) for each view of the episodes shown."""
    shown: dict[str, int] = {}
    rows: list[tuple[str, list[tuple[float, np.ndarray]]]] = []
    for episode in release.episodes(columns=["episode_uid", "tasks", "views"]).to_pylist():
        task = episode["tasks"][0]
        shown[task] = shown.get(task, 0) + 1
        if shown[task] > episodes_per_task:
            continue
        frames = release.frames(columns=["timestamp_s", "views"], episodes=[episode["episode_uid"]])
        at = np.linspace(0, frames.num_rows - 1, _MOMENTS).round().astype(int).tolist()
        picked = frames.take(at).to_pylist()
        for number, view in enumerate(episode["views"]):
            moments = [(row["timestamp_s"], decode_jpeg(row["views"][number])) for row in picked]
            rows.append((f"{task} ({view})", moments))
    return rows
