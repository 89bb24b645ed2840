"""Tests of train/ray_data.py."""

import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray.train
import ray.train.torch
from support import ROOT, last_json
from training import SMALL, Sample, make_released, samples, small

from lake import Release
from train.batch import Batch
from train.loader import LoaderConfig, open_loader
from train.provenance import FILE, Checkpoint
from train.ray_data import LakeDataConfig, Shard
from train.state import LoaderState, merge_states

Step = dict[int, list[Sample]]
"""Samples by lane."""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_released(tmp_path_factory.mktemp("ray_data"))


@pytest.fixture
def quick(ray: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ray Train look after its workers often."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("RAY_TRAIN_METRICS_ENABLED", "0")


def steps(release: Release, config: LoaderConfig, count: int) -> list[Step]:
    """Return the first steps as a single process sees them."""
    with open_loader(release, config) as loader:
        packs = itertools.islice(loader, count * loader.micro_steps)
        return by_step((pack.step, pack.lane, samples(pack)) for pack in packs)


def by_step(packs: Iterable[tuple[int, Any, Iterable[Any]]]) -> list[Step]:
    """Return what each step's lanes gave; no lane gives two packs a step."""
    found: dict[int, Step] = {}
    for step, lane, seen in packs:
        assert lane not in found.setdefault(step, {})
        found[step][lane] = [(int(s), int(k), int(e), int(f)) for s, k, e, f in seen]
    assert sorted(found) == list(range(len(found)))
    return [found[step] for step in sorted(found)]


def trainer_of(
    train: Callable[..., Any], data: LakeDataConfig, folder: Path, *, num_workers: int = 2, **options: Any
) -> Any:
    return ray.train.torch.TorchTrainer(
        train,
        train_loop_config={"folder": str(folder)},
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers),
        run_config=ray.train.RunConfig(
            name="run", storage_path=str(folder), failure_config=ray.train.FailureConfig(**options)
        ),
        datasets=data.datasets(),
        dataset_config=data,
    )


@pytest.mark.usefixtures("quick")
def test_a_trainer_gives_each_worker_its_share_and_goes_on_where_it_stood(release: Release, tmp_path: Path) -> None:
    """A worker dies behind the checkpoint at step 4, so that steps 4 and 5 are done twice."""

    def samples_of(pack: Batch) -> list[list[int]]:  # Workers cannot import this file.
        columns = (pack.source_B, pack.epoch_B, pack.episode_B, pack.frame_B)
        return [list(each) for each in zip(*(column[: pack.num_samples].tolist() for column in columns), strict=True)]

    def train(config: dict[str, str]) -> None:
        folder, context = Path(config["folder"]), ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
        checkpoint, state, attempt = ray.train.get_checkpoint(), None, 0
        if checkpoint is not None:
            attempt = 1
            with checkpoint.as_directory() as saved:
                parts = [LoaderState.from_json(json.loads(path.read_text())) for path in Path(saved).iterdir()]
            assert len(parts) == world
            state = merge_states(parts)
        shard: Any = ray.train.get_dataset_shard("train")
        assert (shard.rank, shard.world_size) == (rank, world)
        with shard.open(None if state is None else state.cursor) as loader:
            for step in range(0 if state is None else state.cursor.step, 8):
                for _ in range(loader.micro_steps):
                    pack = next(loader)
                    if pack.lane is not None:
                        (folder / f"{attempt}-{step}-{pack.lane}").write_text(json.dumps(samples_of(pack)))
                if attempt == 0 and step == 3:
                    with tempfile.TemporaryDirectory() as saved:
                        (Path(saved) / f"{rank}.json").write_text(json.dumps(loader.state().to_json()))
                        ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(saved))
                if attempt == 0 and step == 5:
                    ray.train.get_all_reported_checkpoints()  # It was only handed over so far.
                    os._exit(1)
        validation: Any = ray.train.get_dataset_shard("validation")
        with validation.open() as loader:
            seen = [sample for pack in loader for sample in samples_of(pack)]
        (folder / f"validation-{rank}").write_text(json.dumps(seen))

    validation = small(order={"one_pass": True, "split": "validation"})
    data = LakeDataConfig(release, {"train": SMALL, "validation": validation})
    trainer_of(train, data, tmp_path, max_failures=1).fit()
    notes = [(tuple(map(int, path.name.split("-"))), path) for path in tmp_path.glob("[01]-*")]
    first = [(step, lane, json.loads(path.read_text())) for (n, step, lane), path in notes if n == 0 and step < 4]
    second = [(step, lane, json.loads(path.read_text())) for (n, step, lane), path in notes if n == 1]
    assert {step for step, _, _ in second} == {4, 5, 6, 7}
    assert by_step(first + second) == steps(release, SMALL, 8)
    seen = [tuple(each) for rank in range(2) for each in json.loads((tmp_path / f"validation-{rank}").read_text())]
    with open_loader(release, validation) as loader:
        expected = [sample for pack in loader for sample in samples(pack)]
    assert sorted(seen) == sorted(expected)
    assert len(set(seen)) == len(seen) > 0


@pytest.mark.usefixtures("quick")
def test_more_workers_than_lanes_end_the_run_with_an_error_that_says_so(release: Release, tmp_path: Path) -> None:
    def train(config: dict[str, str]) -> None:
        shard: Any = ray.train.get_dataset_shard("train")
        shard.open().close()

    data = LakeDataConfig(release, {"train": small(order={"lanes": 1})})
    with pytest.raises(ray.train.TrainingFailedError, match="world_size=2 is more than the 1 lanes"):
        trainer_of(train, data, tmp_path).fit()


@pytest.mark.usefixtures("quick")
def test_actors_work_for_a_trainers_worker(release: Release, tmp_path: Path) -> None:
    """They are no part of its placement group, which has room for workers only."""

    def train(config: dict[str, str]) -> None:
        shard: Any = ray.train.get_dataset_shard("train")
        with shard.open() as loader:
            deadline = time.monotonic() + 60
            while loader._pool.num_made < 5 and time.monotonic() < deadline:
                next(loader)
                time.sleep(0.01)
            (Path(config["folder"]) / "made").write_text(str(loader._pool.num_made))

    data = LakeDataConfig(release, {"train": small(read={"threads": 1, "actors": 1})})
    trainer_of(train, data, tmp_path, num_workers=1).fit()
    assert int((tmp_path / "made").read_text()) >= 5


def test_every_worker_gets_every_stream(release: Release) -> None:
    data = pickle.loads(pickle.dumps(LakeDataConfig(release, {"a": SMALL, "b": small(order={"seed": 4})})))
    assert set(data.datasets()) == {"a", "b"}
    assert data.datasets()["a"]() is None
    given = data.configure({"a": None}, 3, None, None)
    assert [(shards["a"].rank, shards["b"].rank, shards["b"].world_size) for shards in given] == [
        (0, 0, 3),
        (1, 1, 3),
        (2, 2, 3),
    ]
    shard = given[1]["b"]
    assert isinstance(shard, Shard)
    assert shard.config.order.seed == 4
    with shard.open() as loader, open_loader(release, small(order={"seed": 4}), 1, 3) as other:
        assert samples(next(loader)) == samples(next(other))


def test_a_dataset_that_is_no_stream_is_named(release: Release) -> None:
    data = LakeDataConfig(release, {"train": SMALL})
    with pytest.raises(ValueError, match=r"no stream is called valid; there are train\. Give a trainer datasets="):
        data.configure({"valid": None}, 2, None, None)


class Attempt(NamedTuple):
    """What one start of the workers saw."""

    world: int
    first: int
    ranks: dict[int, dict[int, list[Any]]]
    """By rank and step."""


def attempts_of(folder: Path) -> list[Attempt]:
    found = []
    for path in sorted((folder / "seen").iterdir()):
        _, world, first = map(int, path.name.split("-"))
        ranks = {
            int(notes.stem): dict(map(json.loads, notes.read_bytes().splitlines())) for notes in path.glob("*.jsonl")
        }
        found.append(Attempt(world, first, ranks))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_over_3_2_and_5_nodes_sees_what_one_process_sees(release: Release, tmp_path: Path) -> None:
    """A node dies, and later three join: one call of ``fit``, which Ray Train starts anew at each change.

    What was done behind the last checkpoint is done again, so a step counts as its last attempt did it.
    """
    from cluster_train import CONFIG, SAVE_EVERY

    done = run_on_a_cluster("elastic", release, tmp_path)
    assert done["code"] == 0, (tmp_path / "fit.log").read_text()[-5000:]
    attempts = attempts_of(tmp_path)
    worlds = [world for world, _ in itertools.groupby(attempt.world for attempt in attempts)]
    assert (worlds[:2], worlds[-1]) == ([3, 2], 5)
    assert set(worlds[2:-1]) <= {3, 4}, "nodes that join may be used as they come"
    ends = [attempt.first for attempt in attempts[1:]] + [attempts[-1].first + 2 * SAVE_EVERY]
    line: list[tuple[int, int, list[Any]]] = []
    for attempt, end in zip(attempts, ends, strict=True):
        for step in range(attempt.first, end):
            assert set(attempt.ranks) == set(range(attempt.world))
            line += [(step, lane, seen) for rank in attempt.ranks.values() for lane, seen in rank[step]]
    found = by_step(line)
    assert len(found) == ends[-1] > 20
    assert found == steps(release, CONFIG, len(found))
    counts = Counter(sample for step in found for seen in step.values() for sample in seen)
    assert set(counts.values()) == {1}
    saved = sorted((tmp_path / "run").rglob(FILE))
    assert Checkpoint.from_json(saved[-1].read_text()).state.cursor.step == len(found)
    result = audited(tmp_path / "run")
    assert (result["checkpoints"], result["mismatches"], result["samples"]) == (len(saved), 0, counts.total())


def run_on_a_cluster(what: str, release: Release, folder: Path) -> dict[str, Any]:
    command = [sys.executable, ROOT / "tests" / "cluster_train.py", what, release.storage.uri, folder]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def audited(run: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.audit", "--run", run]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return last_json(done.stdout)
