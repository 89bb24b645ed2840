"""What a checkpoint says of its data: enough to go on from it, or to audit it."""

import json
from dataclasses import asdict, dataclass

import numpy as np

from lake import Lake
from train.audit import Tally, expected, tally
from train.loader import LoaderConfig, plan_of
from train.state import LoaderState

FILE = "loader.json"
"""Its name in a checkpoint's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A state, with what it is a state of: enough to open the loader again, or to audit the run."""

    lake: str
    """URI of the lake."""
    release: str
    release_id: str
    config: LoaderConfig
    state: LoaderState

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(
            {
                "lake": self.lake,
                "release": self.release,
                "release_id": self.release_id,
                "config": asdict(self.config),
                "state": self.state.to_json(),
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> "Checkpoint":
        """Read it back.

        Raises:
            ValueError: that is no such file, or of a version that had other settings.
        """
        try:
            data = json.loads(text)
            return cls(
                lake=str(data["lake"]),
                release=str(data["release"]),
                release_id=str(data["release_id"]),
                config=LoaderConfig.from_json(data["config"]),
                state=LoaderState.from_json(data["state"]),
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a loader's checkpoint ({error}): {text[:200]}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What an audit found."""

    step: int
    found: Tally
    """As the run counted it."""
    expected: Tally
    """As the cursor says, without the samples that were left out."""
    num_left_out: int

    @property
    def is_right(self) -> bool:
        """Whether the run saw exactly the samples that it ought to have seen."""
        return self.found == self.expected


def audit(checkpoint: Checkpoint, lake: Lake | None = None) -> Verdict:
    """Recompute which samples a run must have seen up to a checkpoint, from its cursor and metadata alone.

    Args:
        lake: to read in place of the one that the checkpoint names, as where it was moved.

    Raises:
        CursorMismatchError: the release or the arithmetic of the order is not that of the run.
        ReleaseNotFoundError: the release is gone.
    """
    release = (Lake(checkpoint.lake) if lake is None else lake).release(checkpoint.release)
    stream = plan_of(release, checkpoint.config).stream
    state = checkpoint.state
    left_out = np.array(state.left_out, np.int64).reshape(-1, 4)
    return Verdict(
        step=state.cursor.step,
        found=state.tally,
        expected=expected(stream, state.cursor) - tally(*left_out.T),
        num_left_out=len(left_out),
    )
