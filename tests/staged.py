"""What tasks stage of made sources, without Ray; deaths at failpoints within this process."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from support import VIDEO

import lake.failpoints
from ingest.features import parse_map
from ingest.files import open_files
from ingest.formats import format_of, open_source
from ingest.plan import Discovered, Ordinals, identify, known_episodes
from ingest.source import Source
from ingest.task import PlannedEpisode, Profile, digest_episode, write_task
from ingest.video_writer import encode_video
from lake import Lake
from lake.staging import TaskResult


class Death(BaseException):
    """What a failpoint raises here in place of SIGKILL: nothing catches it."""


def stage(
    lake: Lake, folder: Path, *, name: str = "toy", attempt_id: str = "a" * 24, per_task: int = 2
) -> list[TaskResult]:
    """Write every episode of a source as the tasks of one attempt would, and stage the results."""
    source = open_source(open_files(str(folder)), parse_map(()))
    profile = Profile(source_name=name, resolution=32)
    episodes = identified(lake, source, name)
    parts = [episodes[start : start + per_task] for start in range(0, len(episodes), per_task)]
    return [write_task(lake.storage, source, profile, attempt_id, task, part) for task, part in enumerate(parts)]


def identified(lake: Lake, source: Source, name: str) -> list[PlannedEpisode]:
    """Return the episodes of a source that a lake lacks."""
    known = known_episodes(lake.storage, name)
    refs = [ref for batch in format_of(source).discover(source) for ref in batch]
    digested = [(ref, digest_episode(source, ref)) for ref in refs]
    return identify(digested, known, Ordinals(known, Discovered().still_there()), name).new


def darken(folder: Path, index: int, *, num_frames: int = 12, view: str = "top") -> None:
    """Make an episode bad in a way that only decoding shows: every frame of a view is black."""
    black = np.zeros((48, 64, 3), np.uint8)
    encode_video([black] * num_frames, folder / VIDEO.format(view, index), fps=10)


@contextmanager
def dying_at(name: str) -> Iterator[None]:
    """Die at a failpoint as its process would, but by raising Death, so that the test lives on."""

    def die(pid: int, number: int) -> None:
        assert (pid, number) == (os.getpid(), signal.SIGKILL)
        raise Death(name)

    real = lake.failpoints.os.kill
    os.environ["ROBOLAKE_FAILPOINT"] = name
    lake.failpoints.os.kill = die
    try:
        yield
    finally:
        lake.failpoints.os.kill = real
        del os.environ["ROBOLAKE_FAILPOINT"]
