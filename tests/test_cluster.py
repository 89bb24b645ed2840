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

COUNT, LENGTH = 24, MIN_TASK_FRAMES + 8
"""Each episode is a task of its own."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "toy"
    return make_v21(folder, [Made(seed=i, num_frames=LENGTH) for i in range(COUNT)])


def ingest_on_a_cluster(change: str, source: Path, lake: Path) -> dict[str, Any]:
    command = [sys.executable, ROOT / "tests" / "cluster_ingest.py", change, source, lake]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("change", ["kill", "add"])
def test_a_job_ends_well_though_the_cluster_changes(source: Path, tmp_path: Path, change: str) -> None:
    lake = tmp_path / "lake"
    seen = ingest_on_a_cluster(change, source, lake)
    assert seen["code"] == 0, seen["err"]
    assert seen["worked"], "the node that died, or joined, had a share in it"
    assert 4 <= seen["staged_before"] < COUNT, "the change came in the middle"
    result = last_json(seen["out"])
    assert (result["committed"], result["frames"], result["quarantined"]) == (COUNT, COUNT * LENGTH, 0)
    opened = Lake(str(lake))
    release = opened.release()
    assert (release.name, release.num_episodes) == (result["release"], COUNT)
    uids = release.episodes(columns=["episode_uid"]).column(0).to_pylist()
    assert Counter(release.frames(columns=["episode_uid"]).column(0).to_pylist()) == dict.fromkeys(uids, LENGTH)
    assert list(opened.verify()) == []
    assert open_table(opened.storage, "frames").count_rows() == COUNT * LENGTH
    decoded = len(list(lake.glob("frames.lance/data/*.lance")))
    assert decoded <= COUNT + (2 if change == "kill" else 0), "only what the dead node was at is done again"
