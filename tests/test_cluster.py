"""Ingestion while the cluster loses or gains a node."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Made, last_json, make_v21

from ingest.plan import MIN_TASK_FRAMES
from lake import Lake
from lake.tables import open_table

pytestmark = pytest.mark.slow

LENGTH = MIN_TASK_FRAMES + 8
"""Each episode is a task of its own."""
COUNTS = {"kill": 24, "add": 96}
"""A node takes some seconds to join and to begin, and the one that is there is not to be done by then."""


def ingest_on_a_cluster(change: str, source: Path, lake: Path) -> dict[str, Any]:
    command = [sys.executable, ROOT / "tests" / "cluster_ingest.py", change, source, lake]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("change", COUNTS)
def test_a_job_ends_well_though_the_cluster_changes(tmp_path: Path, change: str) -> None:
    count = COUNTS[change]
    source = make_v21(tmp_path / "toy", [Made(seed=i % 24, num_frames=LENGTH) for i in range(count)])
    lake = tmp_path / "lake"
    seen = ingest_on_a_cluster(change, source, lake)
    assert seen["code"] == 0, seen["err"]
    assert seen["worked"], "the node that died, or joined, had a share in it"
    assert 4 <= seen["staged_before"] < count, "the change came in the middle"
    result = last_json(seen["out"])
    assert (result["committed"], result["frames"], result["quarantined"]) == (count, count * LENGTH, 0)
    opened = Lake(str(lake))
    release = opened.release()
    assert (release.name, release.num_episodes) == (result["release"], count)
    uids = release.episodes(columns=["episode_uid"]).column(0).to_pylist()
    assert Counter(release.frames(columns=["episode_uid"]).column(0).to_pylist()) == dict.fromkeys(uids, LENGTH)
    assert list(opened.verify()) == []
    assert open_table(opened.storage, "frames").count_rows() == count * LENGTH
    decoded = len(list(lake.glob("frames.lance/data/*.lance")))
    assert decoded <= count + (2 if change == "kill" else 0), "only what the dead node was at is done again"
