"""Training, and packs made by actors, on a cluster whose nodes die and join on the way."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch.distributed
from ray.cluster_utils import Cluster
from training import small

from lake import Lake, Release
from train.batch import Batch
from train.loader import open_loader
from train.overflow import OverflowPool
from train.provenance import FILE, Checkpoint
from train.ray_data import LakeDataConfig
from train.state import LoaderState, merge_states

TIMEOUT_S = 200
LANES, MIN_WORLD, MAX_WORLD = 6, 2, 5
SAVE_EVERY, STEPS_OF_A_WORLD, MOST_STEPS, STEP_S = 5, 8, 5000, 0.25
CONFIG = small(order={"lanes": LANES}, read={"threads": 1})
QUICK = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def train(config: dict[str, Any]) -> None:
    """Take packs step by step, note them down, and save the loader's state every few steps.

    It ends some steps behind the one at which the largest world began, so that all ranks end at the same one.
    """
    shard: Any = ray.train.get_dataset_shard("train")
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    attempt = ray.train.collective.broadcast_from_rank_zero(time.time_ns())
    checkpoint = ray.train.get_checkpoint()
    before = None if checkpoint is None else read_state(checkpoint)
    first = step = 0 if before is None else before.cursor.step
    last = first + 2 * SAVE_EVERY if world == config["max_world"] else config["most_steps"]
    folder = Path(config["folder"]) / "seen" / f"{attempt}-{world}-{first}"
    folder.mkdir(parents=True, exist_ok=True)
    with (
        shard.open(None if before is None else before.cursor) as loader,
        (folder / f"{rank}.jsonl").open("ab", buffering=0) as notes,
    ):
        while step < last:
            packs = [next(loader) for _ in range(loader.micro_steps)]
            assert {pack.step for pack in packs} == {step}
            seen = [[pack.lane, samples(pack)] for pack in packs if pack.lane is not None]
            notes.write(json.dumps([step, seen]).encode() + b"\n")  # At once, so that being killed tears no line.
            step += 1
            if step % SAVE_EVERY == 0:
                save(loader.state(), before, shard.release, step)
            time.sleep(config["step_s"])


def samples(pack: Batch) -> list[list[int]]:
    """Return (source, epoch, episode, frame) of each sample of a pack."""
    columns = (pack.source_B, pack.epoch_B, pack.episode_B, pack.frame_B)
    return [list(each) for each in zip(*(column[: pack.num_samples].tolist() for column in columns), strict=True)]


def save(state: LoaderState, before: LoaderState | None, release: Release, step: int) -> None:
    """Report a checkpoint with the state of all ranks."""
    states: list[Any] = [None] * ray.train.get_context().get_world_size()
    torch.distributed.all_gather_object(states, state.to_json())
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report({"step": step})
        return
    merged = merge_states([LoaderState.from_json(each) for each in states], before)
    saved = Checkpoint(
        lake=release.storage.uri, release=release.name, release_id=release.id, config=CONFIG, state=merged
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_text(saved.to_json())
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def read_state(checkpoint: Any) -> LoaderState:
    """Return the loader's state that a checkpoint of Ray holds."""
    with checkpoint.as_directory() as folder:
        return Checkpoint.from_json((Path(folder) / FILE).read_text()).state


def fit(lake: str, folder: str) -> None:
    """Train on the cluster of RAY_ADDRESS with as many workers as there are nodes for."""
    ray.init()
    data = LakeDataConfig(Lake(lake).release(), {"train": CONFIG})
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={"folder": folder, "max_world": MAX_WORLD, "most_steps": MOST_STEPS, "step_s": STEP_S},
        scaling_config=ray.train.ScalingConfig(num_workers=(MIN_WORLD, MAX_WORLD), elastic_resize_monitor_interval_s=2),
        run_config=ray.train.RunConfig(
            name="run", storage_path=folder, failure_config=ray.train.FailureConfig(max_failures=3)
        ),
        datasets=data.datasets(),
        dataset_config=data,
    )
    trainer.fit()


def elastic(lake: str, folder: str) -> dict[str, Any]:
    """Train on three nodes, of which one dies, and then on the five that there are when three more have joined."""
    with cluster_of({"num_cpus": 0}) as cluster:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        cluster.wait_for_nodes()
        with (Path(folder) / "fit.log").open("wb") as log:
            job = subprocess.Popen(
                [sys.executable, __file__, "fit", lake, folder],
                env=os.environ | QUICK | {"RAY_ADDRESS": str(cluster.address)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        began, times = time.monotonic(), dict[str, float]()

        def wait_for(world: int) -> None:
            deadline = time.monotonic() + TIMEOUT_S
            while steps_of(folder, world) < STEPS_OF_A_WORLD and job.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            times[f"world {world}"] = round(time.monotonic() - began, 1)

        try:
            wait_for(3)
            cluster.remove_node(nodes[0], allow_graceful=False)
            wait_for(2)
            for _ in range(3):
                cluster.add_node(num_cpus=1)
            job.wait(TIMEOUT_S)
        finally:
            job.kill()
            job.wait()
        times["end"] = round(time.monotonic() - began, 1)
        return {"code": job.returncode, "times_s": times}


def steps_of(folder: str, world: int) -> int:
    """Return how many steps every rank of a world has made in its latest attempt."""
    attempts = sorted((Path(folder) / "seen").glob(f"*-{world}-*"))
    notes = list(attempts[-1].glob("*.jsonl")) if attempts else []
    return min(path.read_bytes().count(b"\n") for path in notes) if len(notes) == world else 0


def overflow(lake: str, _: str) -> dict[str, Any]:
    """Load with actors that only one of two nodes has the resource for; it dies, and another joins."""
    with cluster_of({"num_cpus": 2}) as cluster:
        node = cluster.add_node(num_cpus=2, resources={"decoder": 2})
        cluster.wait_for_nodes()
        ray.init(cluster.address, log_to_driver=False)
        config = small(read={"threads": 1, "actors": 2, "actor_resources": {"decoder": 1.0}})
        taken: list[tuple[Any, ...]] = []
        with open_loader(Lake(lake).release(), config) as loader:
            pool = loader._pool
            assert isinstance(pool, OverflowPool)

            def take_until(condition: Callable[[], Any]) -> None:
                deadline = time.monotonic() + TIMEOUT_S
                while not condition():
                    assert time.monotonic() < deadline
                    taken.append(sums(next(loader)))
                    time.sleep(0.01)

            def is_ready() -> bool:
                return all(actor.ready is None for actor in pool._actors)

            def nodes() -> list[str]:
                handles = [actor.handle for actor in pool._actors]
                return ray.get([each.__ray_call__.remote(node_id) for each in handles], timeout=TIMEOUT_S)

            take_until(lambda: is_ready() and pool.num_made > 10)
            seen = {"dead": node.node_id, "first": nodes()}
            cluster.remove_node(node, allow_graceful=False)
            take_until(lambda: pool.num_lost == 2)
            made = pool.num_made
            taken += [sums(next(loader)) for _ in range(60)]
            seen |= {"made_without": pool.num_made - made, "lost": pool.num_lost}
            seen["new"] = cluster.add_node(num_cpus=2, resources={"decoder": 2}).node_id
            take_until(lambda: is_ready() and pool.num_made > made + 10)
            seen["then"] = nodes()
        with open_loader(Lake(lake).release(), small(read={"threads": 1})) as loader:
            seen["is_equal"] = taken == [sums(next(loader)) for _ in taken]
        ray.shutdown()
        return seen


def node_id(_: Any) -> str:
    return ray.get_runtime_context().get_node_id()


def sums(batch: Batch) -> tuple[Any, ...]:
    """Return what tells a pack from another."""
    return batch.step, batch.lane, *(hash(tensor.numpy().tobytes()) for tensor in batch.arrays().values())


@contextlib.contextmanager
def cluster_of(head: dict[str, Any]) -> Iterator[Cluster]:
    """Start a cluster with a head, in a temporary folder of its own."""
    folder = tempfile.mkdtemp(prefix="rl-", dir="/tmp")  # The paths of sockets are limited to 107 bytes.
    os.environ["RAY_TMPDIR"] = folder
    cluster = Cluster(initialize_head=True, head_node_args=head | {"include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def main(what: str, lake: str, folder: str) -> None:
    """Run one of them; print what was seen as one line of JSON."""
    print(json.dumps({"elastic": elastic, "overflow": overflow, "fit": fit}[what](lake, folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
