"""Named points at which a test can kill a process.

``ROBOLAKE_FAILPOINT=commit.after_frames`` kills the process with SIGKILL when it
gets there. With ``ROBOLAKE_FAILPOINT_ONCE=FILE`` only the first process to get
there dies: it creates FILE, and whoever finds FILE lives.
"""

import os
import signal

FAILPOINTS = (
    "create.before_marker",
    "plan.before_put",
    "plan.after_put",
    "task.after_frames",
    "task.before_stage",
    "task.after_stage",
    "commit.before_frames",
    "commit.after_frames",
    "commit.after_videos",
    "commit.after_stats",
    "commit.after_episodes",
    "commit.after_quarantine",
    "plan.before_close",
    "release.before_tags",
    "release.after_first_tag",
    "release.after_tags",
    "release.after_row",
)


def failpoint(name: str) -> None:
    """Die here if the environment says so."""
    assert name in FAILPOINTS, name
    if os.environ.get("ROBOLAKE_FAILPOINT") != name:
        return
    once = os.environ.get("ROBOLAKE_FAILPOINT_ONCE")
    if once:
        try:
            os.close(os.open(once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
