"""Tests of train/state.py, train/provenance.py and jobs/audit.py."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lakes import add, make_sources
from support import last_json, run_module
from training import SMALL, make_released, small

from lake import Lake, Release
from train.audit import Tally
from train.loader import LoaderConfig, open_loader
from train.provenance import FILE, Checkpoint, audit
from train.state import LoaderState, merge_states
from train.turns import CursorMismatchError


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_released(tmp_path_factory.mktemp("audit"))


def checkpoint_of(release: Release, state: LoaderState, config: LoaderConfig = SMALL) -> Checkpoint:
    return Checkpoint(lake=release.storage.uri, release=release.name, release_id=release.id, config=config, state=state)


def checkpoints(release: Release, steps: int, world: int = 2) -> list[Checkpoint]:
    """Return a checkpoint of every step of a run, and the states of its ranks merged."""
    loaders = [open_loader(release, SMALL, rank, world) for rank in range(world)]
    found = []
    for _ in range(steps):
        for loader in loaders:
            for _ in range(loader.micro_steps):
                next(loader)
        found.append(checkpoint_of(release, merge_states([loader.state() for loader in loaders])))
    for loader in loaders:
        loader.close()
    return found


def write(folder: Path, found: list[Checkpoint]) -> Path:
    for checkpoint in found:
        path = folder / f"checkpoint_{checkpoint.state.cursor.step:06}" / FILE
        path.parent.mkdir(parents=True)
        path.write_text(checkpoint.to_json())
    return folder


def test_a_run_that_saw_what_it_ought_to_is_right(release: Release, tmp_path: Path) -> None:
    found = checkpoints(release, 6)
    assert [audit(checkpoint).is_right for checkpoint in found] == [True] * 6
    done = run_module("jobs.audit", "--run", write(tmp_path / "run", found))
    assert done.returncode == 0, done.stderr
    report = last_json(done.stdout)
    assert (report["checkpoints"], report["mismatches"], report["left_out"]) == (6, 0, 0)
    assert report["samples"] == found[-1].state.tally.count
    assert done.stderr.count("right") == 6


def test_a_run_in_an_object_store_is_audited(release: Release, bucket: str) -> None:
    from lake.storage import open_storage

    checkpoint = checkpoints(release, 2)[-1]
    open_storage(bucket).put_if_absent(f"run/checkpoints/2/{FILE}", checkpoint.to_json().encode())
    done = run_module("jobs.audit", "--run", f"{bucket}/run")
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["checkpoints"] == 1


def test_a_sample_that_was_lost_or_repeated_is_found(release: Release, tmp_path: Path) -> None:
    found = checkpoints(release, 5)
    state = found[3].state
    lost = replace(state, tally=replace(state.tally, count=state.tally.count - 1))
    exchanged = replace(state, tally=replace(state.tally, low=state.tally.low ^ 1))
    for wrong in (lost, exchanged, replace(state, left_out=((0, 0, 0, 0),))):
        assert not audit(checkpoint_of(release, wrong)).is_right
    found[3] = checkpoint_of(release, lost)
    done = run_module("jobs.audit", "--run", write(tmp_path / "run", found))
    assert done.returncode == 1
    assert "AuditError: 1 of 5 checkpoints saw other samples" in done.stderr
    assert "checkpoint_000004" in done.stderr
    assert done.stderr.count("WRONG") == 1


def test_a_release_of_other_contents_is_refused(release: Release, tmp_path: Path) -> None:
    checkpoint = checkpoints(release, 1)[0]
    other = Lake.create(str(tmp_path / "other"))
    add(other, make_sources(tmp_path / "sources") / "toy")
    with pytest.raises(CursorMismatchError, match="belongs to another order"):
        audit(replace(checkpoint, release=other.make_release().name), other)


def test_a_lake_that_moved_is_named_anew(release: Release, tmp_path: Path) -> None:
    moved = replace(checkpoints(release, 1)[0], lake=str(tmp_path / "nothing here"))
    folder = write(tmp_path / "run", [moved])
    assert run_module("jobs.audit", "--run", folder).returncode == 1
    assert run_module("jobs.audit", "--run", folder, "--lake", release.storage.uri).returncode == 0


def test_a_folder_without_checkpoints_is_one_clear_line(tmp_path: Path) -> None:
    done = run_module("jobs.audit", "--run", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ValueError: no {FILE} under")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"lake": 1}', "null"])
def test_what_is_no_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a loader's checkpoint"):
        Checkpoint.from_json(text)


def test_a_setting_of_another_version_is_refused(release: Release) -> None:
    data = json.loads(checkpoints(release, 1)[0].to_json())
    data["config"]["order"]["flavour"] = 3
    with pytest.raises(ValueError, match=r"not a loader's checkpoint .*flavour"):
        Checkpoint.from_json(json.dumps(data))


def test_a_checkpoint_survives_json(release: Release) -> None:
    found = checkpoints(release, 3)[-1]
    left_out = replace(found, state=replace(found.state, left_out=((1, 2, 3, 4),)), config=small(order={"seed": 9}))
    for checkpoint in (found, left_out):
        assert Checkpoint.from_json(checkpoint.to_json()) == checkpoint
    with pytest.raises(ValueError, match="not the state of a loader"):
        LoaderState.from_json({"cursor": {}})


def test_states_of_ranks_add_up(release: Release) -> None:
    first = checkpoints(release, 2)[-1].state
    loaders = [open_loader(release, SMALL, rank, 3, first.cursor) for rank in range(3)]
    for loader in loaders:
        next(loader)
    whole = merge_states([loader.state() for loader in loaders], first)
    for loader in loaders:
        loader.close()
    assert whole.cursor.step == 3
    assert whole == checkpoints(release, 3)[-1].state
    assert merge_states([first]).tally == first.tally
    assert first.tally != Tally()
    assert np.sign(whole.tally.count - first.tally.count) == 1
