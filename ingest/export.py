"""A release as a LeRobot v3.0 dataset, with the packets of its videos as they are."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ingest.lerobot_writer import TOLERANCE_S, Column, DatasetSpec, LeRobotWriter, ViewFile
from lake import Release

ALIKE = ("embodiment", "fps", "views", "state_dim", "action_dim", "state_names", "action_names")
"""What all episodes of one LeRobot dataset have in common."""

_PREFIX = "observation.images."
_COPY_BYTES = 1 << 20


def export_lerobot(release: Release, out: str, *, where: str | None, say: Callable[[int, int], None]) -> dict[str, int]:
    """Write the episodes of a release as one LeRobot v3.0 dataset.

    Args:
        out: a directory or fsspec URI with nothing there yet.
        where: SQL condition on the columns of ``episodes``; None means all.
        say: called with (episodes written, episodes in all).

    Raises:
        ValueError: no episode, or episodes that one dataset cannot hold.
    """
    episodes = release.episodes(where).to_pylist()
    if not episodes:
        raise ValueError(f"release {release.name} has no episode{f' where {where}' if where else ''}")
    _check_alike(episodes)
    with LeRobotWriter(out, spec=_spec(release, episodes)) as writer:
        for number, episode in enumerate(episodes, 1):
            _add(writer, release, episode)
            say(number, len(episodes))
    return {"episodes": writer.num_episodes, "frames": writer.num_frames}


def _check_alike(episodes: list[dict[str, Any]]) -> None:
    for name in ALIKE:
        values = {str(episode[name]) for episode in episodes}
        if len(values) > 1:
            shown = ", ".join(sorted(values)[:4])
            raise ValueError(
                f"the episodes differ in {name} ({shown}), one LeRobot dataset cannot hold them; "
                f'export one kind at a time with --where, such as --where "{name} = ..." or "source = \'...\'"'
            )


def _spec(release: Release, episodes: list[dict[str, Any]]) -> DatasetSpec:
    first = episodes[0]
    columns = {"action": _column(first["action_dim"], first["action_names"])}
    if first["state_dim"]:
        columns["observation.state"] = _column(first["state_dim"], first["state_names"])
    if any(episode["success"] is not None for episode in episodes):
        columns["next.success"] = Column(dtype="bool")
    return DatasetSpec(
        fps=first["fps"],
        robot_type=first["embodiment"],
        columns=columns,
        views=tuple(_PREFIX + view for view in first["views"]),
        provenance={"release": release.name, "release_id": release.id, "lake": release.storage.uri},
    )


def _column(size: int, names: list[str]) -> Column:
    return Column(size=size, names=tuple(names) if names else None)


def _add(writer: LeRobotWriter, release: Release, episode: dict[str, Any]) -> None:
    frames = release.frames(columns=["state", "action", "timestamp_s", "task_index"], episodes=[episode["episode_uid"]])
    columns: dict[str, np.ndarray] = {"action": _matrix(frames, "action", episode["action_dim"])}
    if episode["state_dim"]:
        columns["observation.state"] = _matrix(frames, "state", episode["state_dim"])
    if "next.success" in writer.spec.columns:
        success = np.zeros(frames.num_rows, bool)
        success[-1] = bool(episode["success"])
        columns["next.success"] = success
    tasks = [episode["tasks"][index] for index in frames.column("task_index").to_pylist()]
    with tempfile.TemporaryDirectory(prefix="robolake-") as folder:
        views = {_PREFIX + view: file for view, file in _videos(release, episode, Path(folder))}
        times = frames.column("timestamp_s").to_numpy()
        writer.add_episode(columns, tasks=tasks, views=views, timestamp=_regular(times, episode["fps"]))


def _matrix(frames: pa.Table, name: str, size: int) -> np.ndarray:
    values = frames.column(name).combine_chunks().flatten().to_numpy().astype(np.float32)
    return values.reshape(frames.num_rows, size) if size > 1 else values


def _regular(timestamp_s: np.ndarray, fps: float) -> np.ndarray | None:
    """Return an episode's times where LeRobot can use them: from 0, one frame apart; else None."""
    expected = np.arange(len(timestamp_s)) / fps
    return timestamp_s.astype(np.float32) if np.abs(timestamp_s - expected).max() < TOLERANCE_S else None


def _videos(release: Release, episode: dict[str, Any], folder: Path) -> Iterator[tuple[str, ViewFile]]:
    for at, (row, blob) in enumerate(release.open_videos(episode["episode_uid"])):
        path = folder / f"{at}.mp4"
        with blob, path.open("wb") as file:
            while chunk := blob.read(_COPY_BYTES):
                file.write(chunk)
        yield row["view"], ViewFile(path, num_lead_frames=row["num_lead_frames"])
