"""Checks that tell a good episode from a bad one, each with its reason code."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ingest.source import Episode
from lake.errors import EpisodeError

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "video-missing": "a view's video file is not there",
        "video-empty": "a view's video file has no bytes",
        "video-truncated": "a view's video ends early or has lost its index",
        "video-undecodable": "a view's video has packets that cannot be decoded",
        "video-frame-count": "a view has another number of frames than the columns",
        "video-too-large": "a view's frames are larger than any camera's",
        "unknown-codec": "a view's video has a codec that is not supported",
        "black-video": "every frame of a view is black",
        "frozen-video": "every frame of a view is the same",
        "lfs-pointer": "a file is a Git LFS pointer, its contents were never fetched",
        "data-missing": "the parquet file is not there",
        "data-empty": "the parquet file has no bytes",
        "data-unreadable": "the parquet file is damaged",
        "column-missing": "a column that the metadata names is not in the parquet file",
        "wrong-shape": "a column has another shape than the metadata says",
        "not-finite": "state, action or time holds NaN, infinity or nothing",
        "timestamps-not-monotone": "time stands still or runs backwards",
        "frame-count": "the parquet file has another number of frames than the metadata says",
        "empty-episode": "the episode has no frames",
        "task-unknown": "a frame refers to a task that the metadata does not list",
        "source-changed": "the episode changed while it was read; the next ingest takes it anew",
    }
)
"""Why an episode can be in quarantine."""

ACCEPTABLE = ("black-video", "frozen-video")
"""Reasons that a job may accept: such an episode is suspicious, not broken."""

BLACK_LEVEL = 4.0
FROZEN_LEVEL = 0.5
MIN_FRAMES_TO_FREEZE = 10


def check_columns(episode: Episode) -> None:
    """Raise where the columns of an episode cannot be right.

    Raises:
        EpisodeError: with a reason of REASONS.
    """
    num_frames = episode.num_frames
    if num_frames == 0:
        raise EpisodeError("empty-episode", "the episode has no frames")
    if episode.declared_frames and episode.declared_frames != num_frames:
        message = f"the columns have {num_frames} frames, the metadata says {episode.declared_frames}"
        raise EpisodeError("frame-count", message)
    for name, values in (("state", episode.state), ("action", episode.action), ("time", episode.timestamp_s)):
        finite = np.isfinite(values.reshape(num_frames, -1)).all(axis=1)
        if not finite.all():
            frame = int(np.argmin(finite))
            raise EpisodeError("not-finite", f"{name} is {values[frame]} at frame {frame}")
    steps = np.diff(episode.timestamp_s)
    if (steps <= 0).any():
        frame = int(np.argmax(steps <= 0)) + 1
        before, after = episode.timestamp_s[frame - 1 : frame + 1]
        raise EpisodeError("timestamps-not-monotone", f"time goes from {before:g} s to {after:g} s at frame {frame}")


def check_frame_count(view: str, num_frames: int, expected: int) -> None:
    """Raise unless a view has as many frames as the columns.

    Raises:
        EpisodeError: video-frame-count.
    """
    if num_frames != expected:
        raise EpisodeError("video-frame-count", f"view {view} has {num_frames} frames, the columns have {expected}")


class ViewWatch:
    """Looks at some frames of a view for pictures that show nothing."""

    def __init__(self, view: str, num_frames: int) -> None:
        self.view = view
        self.stride = max(1, num_frames // 16)
        self._num_frames = num_frames
        self._first: npt.NDArray[np.int16] | None = None
        self._lit = False
        self._moved = False

    def look(self, index: int, rgb: npt.NDArray[np.uint8]) -> bool:
        """Take note of a frame; return whether it is one of those that are looked at.

        Args:
            rgb: [height, width, 3]
        """
        if index % self.stride:
            return False
        self._lit = self._lit or float(rgb.mean()) > BLACK_LEVEL
        values = rgb.astype(np.int16)
        if self._first is None:
            self._first = values
        else:
            self._moved = self._moved or float(np.abs(values - self._first).mean()) > FROZEN_LEVEL
        return True

    def check(self, accepted: tuple[str, ...]) -> None:
        """Raise where all the frames showed nothing.

        Raises:
            EpisodeError: black-video or frozen-video, unless accepted.
        """
        if not self._lit and "black-video" not in accepted:
            raise EpisodeError("black-video", f"view {self.view}: no frame is brighter than {BLACK_LEVEL} of 255")
        still = self._lit and not self._moved and self._num_frames >= MIN_FRAMES_TO_FREEZE
        if still and "frozen-video" not in accepted:
            raise EpisodeError(
                "frozen-video", f"view {self.view}: all frames differ by less than {FROZEN_LEVEL} of 255"
            )
