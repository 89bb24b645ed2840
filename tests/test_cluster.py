"""Ingestion on a Ray cluster of three nodes, of which one is killed in the middle."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, Made, make_v21

from lake import Lake

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_node_killed_in_the_middle_loses_and_doubles_nothing(tmp_path: Path) -> None:
    source = make_v21(tmp_path / "toy", [Made(seed=i, num_frames=40) for i in range(24)])
    script = ROOT / "tests" / "cluster_ingest.py"
    done = subprocess.run(
        [sys.executable, script, source, tmp_path / "lake"], capture_output=True, text=True, timeout=350, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["killed"]
    assert (result["committed"], result["quarantined"]) == (24, 0)
    lake = Lake(str(tmp_path / "lake"))
    assert list(lake.verify()) == []
    assert lake.release().episodes(columns=["source_index"]).column(0).to_pylist() == list(range(24))
