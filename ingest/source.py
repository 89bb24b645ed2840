"""The contract between a format and ingestion.

A format is one file in ``ingest/formats`` with four functions:

    detect(files) -> bool                        is this source of my format?
    open_source(files, feature_map) -> Source    read the metadata, once
    discover(source) -> iterator of EpisodeRefs  what is there, without opening it
    read_episode(source, ref) -> Episode         columns, and where the video packets are
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ingest.files import SourceFiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A source as its metadata describes it; small, and pickles."""

    files: SourceFiles
    format: str
    """Name and version of the format, such as ``lerobot-v2.1``."""
    fps: float
    embodiment: str
    meta: Mapping[str, Any]
    """What the format itself needs to find and read episodes."""
    num_episodes: int | None = None
    """How many the metadata promises; None where it does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeRef:
    """One episode that a source lists, before any of it is opened."""

    source_index: int
    num_frames: int
    """What the metadata says; 0 where it does not."""
    fingerprint: str
    """Hash of the metadata and of the files' paths, sizes and etags: equal means unchanged."""
    locator: str
    """JSON that lets the format read the episode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSource:
    """Where the packets of one view are."""

    name: str
    path: str
    """Relative to the source's root."""
    start_s: float = 0.0
    end_s: float | None = None
    """None means to the end of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One episode's columns, and where its video packets are."""

    state: npt.NDArray[np.float32]
    """[num_frames, state_dim]"""
    action: npt.NDArray[np.float32]
    """[num_frames, action_dim]"""
    timestamp_s: npt.NDArray[np.float64]
    """[num_frames], strictly increasing"""
    task_index: npt.NDArray[np.int32]
    """[num_frames], into ``tasks``"""
    tasks: tuple[str, ...]
    views: tuple[ViewSource, ...]
    fps: float
    embodiment: str
    declared_frames: int
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    success: bool | None = None
    split: str = "train"
    unmapped: tuple[str, ...] = field(default=())
    """Features of the source that the lake does not take over."""

    @property
    def num_frames(self) -> int:
        """Number of rows of the columns."""
        return len(self.timestamp_s)


class Format(Protocol):
    """What every module in ``ingest/formats`` provides."""

    detect: Callable[[SourceFiles], bool]
    open_source: Callable[[SourceFiles, Mapping[str, str]], Source]
    discover: Callable[[Source], Iterator[list[EpisodeRef]]]
    read_episode: Callable[[Source, EpisodeRef], Episode]


def fingerprint(*parts: Any) -> str:
    """Return a hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def content_digest(episode: Episode, packets: Mapping[str, str]) -> str:
    """Return the hash of what an episode is: its columns, its words and its video packets.

    Where it lies, what it is called and how its files are cut are not part of it.

    Args:
        packets: hash of the packets, by view.
    """
    total = hashlib.sha256()
    head = {
        "tasks": episode.tasks,
        "fps": episode.fps,
        "embodiment": episode.embodiment,
        "success": episode.success,
        "shapes": [episode.state.shape, episode.action.shape],
        "views": [[view.name, packets[view.name]] for view in episode.views],
    }
    total.update(json.dumps(head, sort_keys=True).encode())
    for column, dtype in (
        (episode.state, "<f4"),
        (episode.action, "<f4"),
        (episode.timestamp_s, "<f8"),
        (episode.task_index, "<i4"),
    ):
        total.update(np.ascontiguousarray(column).astype(dtype, copy=False).tobytes())
    return total.hexdigest()[:32]
