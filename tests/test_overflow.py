"""Tests of train/overflow.py."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT
from training import make_released, small

from lake import Release
from lake.errors import BadSampleError, LakeDamagedError
from train.batch import Batch
from train.blocks import Block, BlockKey, BlockReader
from train.loader import Loader, LoaderConfig, open_loader, open_parts
from train.overflow import OverflowPool, PackMaker, actor_of
from train.samples import Assembler
from train.turns import Turn, Turns

WAIT_S = 120
CONFIG = small(read={"threads": 1, "actors": 2})
LANES = CONFIG.order.lanes


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_released(tmp_path_factory.mktemp("overflow"))


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def take_until(loader: Loader, condition: Callable[[OverflowPool], Any]) -> list[Batch]:
    """Take packs until their pool fulfils a condition."""
    taken, pool, deadline = [], pool_of(loader), time.monotonic() + WAIT_S
    while not condition(pool):
        assert time.monotonic() < deadline
        taken.append(next(loader))
        time.sleep(0.03)
    return taken


def pool_of(loader: Loader) -> OverflowPool:
    assert isinstance(loader._pool, OverflowPool)
    return loader._pool


def pids(ray: Any, pool: OverflowPool) -> list[int]:
    """Return the processes of the actors that have come up."""
    handles = [actor.handle for actor in pool._actors if actor.ready is None]
    return ray.get([handle.__ray_call__.remote(lambda _: os.getpid()) for handle in handles], timeout=WAIT_S)


def assert_as_without(release: Release, batches: Sequence[Batch], config: LoaderConfig = CONFIG) -> None:
    """Check that batches are bit for bit those of a loader without actors, from the first on."""
    assert batches
    with open_loader(release, small(read={"threads": 1})) as loader:
        for batch, expected in zip(batches, itertools.islice(loader, len(batches)), strict=True):
            assert (batch.step, batch.lane) == (expected.step, expected.lane)
            assert (batch.num_samples, batch.num_tokens) == (expected.num_samples, expected.num_tokens)
            for name, tensor in batch.arrays().items():
                assert tensor.dtype == expected.arrays()[name].dtype
                assert torch.equal(tensor, expected.arrays()[name]), name


def open_with(release: Release, opened: Callable[[], Any], timeout_s: float = 60.0) -> Loader:
    """Open a loader whose two actors open their parts by another function."""
    parts = open_parts(release, CONFIG)
    turns = Turns(parts[0].plan.stream)
    pool = OverflowPool(opened, range(LANES), actors=2, threads=1, resources={}, timeout_s=timeout_s)
    return Loader(parts, CONFIG.read, turns, pool)


def test_packs_of_actors_are_those_of_the_rank(ray: Any, release: Release) -> None:
    with open_loader(release, CONFIG) as loader:
        batches = take_until(loader, lambda pool: pool.num_made >= 30)
        state, pool = loader.state(), pool_of(loader)
        assert pool.num_lost == 0
    assert_as_without(release, batches)
    with open_loader(release, small()) as loader:
        for _ in batches:
            next(loader)
        assert loader.state() == state


def test_all_actors_are_at_work_and_so_is_the_rank(ray: Any, release: Release) -> None:
    with open_loader(release, CONFIG) as loader:
        take_until(loader, lambda pool: all(actor.ready is None for actor in pool._actors))
        actors, before = pool_of(loader)._actors, pool_of(loader).num_made
        heard = [actor.heard for actor in actors]
        for _ in range(60):
            next(loader)
        assert all(actor.heard > then for actor, then in zip(actors, heard, strict=True))
        assert 20 < pool_of(loader).num_made - before < 58, "about two packs in three"


@pytest.mark.parametrize("how", ["its process", "the actor"])
def test_an_actor_that_dies_changes_nothing_and_is_replaced(ray: Any, release: Release, how: str) -> None:
    with open_loader(release, CONFIG) as loader:
        batches = take_until(loader, lambda pool: pool.num_made >= 5)
        pool = pool_of(loader)
        if how == "its process":
            os.kill(pids(ray, pool)[0], signal.SIGKILL)
        else:
            ray.kill(pool._actors[0].handle)
        batches += take_until(loader, lambda pool: pool.num_lost)
        made = pool.num_made
        batches += take_until(
            loader, lambda pool: pool.num_made > made + 5 and all(actor.ready is None for actor in pool._actors)
        )
        assert (pool.num_lost, len(pool._actors)) == (1, 2)
    assert_as_without(release, batches)


def test_actors_that_all_die_leave_the_packs_to_the_rank(ray: Any, release: Release) -> None:
    with open_loader(release, CONFIG) as loader:
        batches = take_until(loader, lambda pool: all(actor.ready is None for actor in pool._actors))
        for pid in pids(ray, pool_of(loader)):
            os.kill(pid, signal.SIGKILL)
        batches += [next(loader) for _ in range(30)]
        assert pool_of(loader).num_lost == 2
    assert_as_without(release, batches)


def test_an_actor_that_hangs_is_given_up(ray: Any, release: Release) -> None:
    stopped: list[int] = []
    with open_with(release, partial(open_parts, release, CONFIG), timeout_s=10.0) as loader:
        try:
            batches = take_until(loader, lambda pool: all(actor.ready is None for actor in pool._actors))
            stopped += pids(ray, pool_of(loader))
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            batches += take_until(loader, lambda pool: pool.num_lost >= 2)
            wait_until(lambda: not any(map(psutil.pid_exists, stopped)))
        finally:
            for pid in filter(psutil.pid_exists, stopped):
                os.kill(pid, signal.SIGKILL)
    assert_as_without(release, batches)


def test_actors_that_never_come_up_are_given_up_for_good(
    ray: Any, release: Release, caplog: pytest.LogCaptureFixture
) -> None:
    def never_opens() -> None:
        os._exit(1)

    with open_with(release, never_opens) as loader:
        batches = take_until(loader, lambda pool: not pool._actors)
        assert (pool_of(loader).num_lost, pool_of(loader).num_made) == (6, 0)
    assert caplog.text.count("was lost and is replaced") == 4
    assert caplog.text.count("is not replaced, as those before it were of no use either") == 2
    assert_as_without(release, batches)


def test_resources_that_no_node_has_keep_nobody_waiting(ray: Any, release: Release) -> None:
    config = small(read={"threads": 1, "actors": 2, "actor_resources": {"nowhere": 1.0}})
    with open_loader(release, config) as loader:
        batches = [next(loader) for _ in range(60)]
        assert (pool_of(loader).num_made, pool_of(loader).num_lost) == (0, 0)
        assert len(pool_of(loader)._actors) == 2, "a node that has them may come"
    assert_as_without(release, batches)


def test_what_only_actors_cannot_make_the_rank_makes(
    ray: Any, release: Release, caplog: pytest.LogCaptureFixture
) -> None:
    class Unreadable(BlockReader):
        def read(self, keys: Sequence[BlockKey]) -> list[Block]:
            raise LakeDamagedError(f"{len(keys)} blocks cannot be read from this node")

    def opened() -> tuple[Assembler, BlockReader]:
        return open_parts(release, CONFIG)[0], Unreadable(release)

    with open_with(release, opened) as loader:
        batches = take_until(loader, lambda pool: not pool._actors)
        assert (pool_of(loader).num_lost, pool_of(loader).num_made) == (6, 0)
    assert caplog.text.count("blocks cannot be read from this node") >= 6
    assert_as_without(release, batches)


def test_a_bad_sample_is_the_same_error_from_an_actor(ray: Any, release: Release) -> None:
    class Blackened(BlockReader):
        def read(self, keys: Sequence[BlockKey]) -> list[Block]:
            blocks = super().read(keys)
            return [Block(**{**vars(block), "jpegs": memoryview(bytes(len(block.jpegs)))}) for block in blocks]

    def opened() -> tuple[Assembler, BlockReader]:
        return open_parts(release, CONFIG)[0], Blackened(release)

    maker, pool = PackMaker(opened), OverflowPool(opened, range(LANES), actors=1, threads=1, resources={})
    turns = Turns(maker._assembler.plan.stream)

    def asked() -> Future[Batch] | None:
        turn = turns.take(1)
        assert turn.window is not None
        return pool.submit(turn, partial(maker.pack, turn.window, turn.index))

    try:
        error = wait_until(asked).exception(WAIT_S)
        assert pool.num_lost == 1
    finally:
        pool.close()
    assert type(error) is BadSampleError
    assert "cannot be decoded" in str(error)


def test_closing_ends_the_actors(ray: Any, release: Release) -> None:
    loader = open_loader(release, CONFIG)
    take_until(loader, lambda pool: all(actor.ready is None for actor in pool._actors))
    ours = pids(ray, pool_of(loader))
    assert len(ours) == 2
    assert all(map(psutil.pid_exists, ours))
    loader.close()
    wait_until(lambda: not any(map(psutil.pid_exists, ours)))


def test_a_loader_closes_while_its_actors_are_at_work(ray: Any, release: Release) -> None:
    """None of them may be left waited for, neither one that is coming up nor one that hangs."""
    open_loader(release, CONFIG).close()
    stopped: list[int] = []
    loader = open_loader(release, CONFIG)
    try:
        take_until(loader, lambda pool: all(actor.ready is None for actor in pool._actors))
        stopped += pids(ray, pool_of(loader))
        os.kill(stopped[0], signal.SIGSTOP)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and not loader._queue.empty() and loader._queue.queue[0][1].done():
            next(loader)
    finally:
        loader.close()
        for pid in filter(psutil.pid_exists, stopped):
            os.kill(pid, signal.SIGKILL)


class Counting(BlockReader):
    """A reader that knows what it has read."""

    def __init__(self, release: Release) -> None:
        super().__init__(release)
        self.requests = Counter[tuple[BlockKey, ...]]()

    def read(self, keys: Sequence[BlockKey]) -> list[Block]:
        self.requests[tuple(keys)] += 1
        return super().read(keys)


def test_an_actor_reads_each_window_once_and_keeps_those_its_lanes_are_at(release: Release) -> None:
    assembler, reader = open_parts(release, CONFIG)[0], Counting(release)
    maker, turns, windows = PackMaker(lambda: (assembler, reader)), Turns(assembler.plan.stream), set[int]()
    for _ in range(90):
        turn: Turn | None = turns.peek()
        assert turn is not None
        assert turn.window is not None
        turns.take(len(assembler.plan.stream.window(turn.window)))
        maker.pack(turn.window, turn.index)
        windows.add(turn.window)
        assert len(maker._windows) <= 2 * LANES
    wait_until(lambda: all(reading.done() for reading in maker._windows.values()))
    assert len(windows) > 4 * LANES
    assert set(reader.requests.values()) == {1}
    assert len(windows) <= len(reader.requests) <= len(windows) + LANES


def test_an_actor_ends_with_the_last_window_of_a_pass(release: Release) -> None:
    config = small(order={"one_pass": True})
    maker = PackMaker(partial(open_parts, release, config))
    stream = maker._assembler.plan.stream
    assert stream.order.num_windows is not None
    for number in range(stream.order.num_windows):
        for index in range(len(stream.window(number))):
            maker.pack(number, index)
    assert max(maker._windows) < stream.order.num_windows


@settings(deadline=None)
@given(num_lanes=st.integers(1, 40), num_actors=st.integers(1, 40))
def test_all_actors_are_asked_and_each_for_few_lanes(num_lanes: int, num_actors: int) -> None:
    pairs = {
        (place, actor_of(place, index, num_lanes=num_lanes, num_actors=num_actors))
        for place in range(num_lanes)
        for index in range(2 * num_actors)
    }
    of_actor = Counter(actor for _, actor in pairs)
    of_lane = Counter(place for place, _ in pairs)
    assert set(of_actor) == set(range(num_actors))
    assert max(of_lane.values()) <= -(-num_actors // num_lanes)
    assert max(of_actor.values()) <= -(-num_lanes // num_actors) + 1


@pytest.mark.slow
def test_actors_are_where_their_resource_is_and_follow_it(release: Release, tmp_path: Path) -> None:
    """The only node that has it dies; until another has it, the rank makes all packs."""
    command = [sys.executable, ROOT / "tests" / "cluster_train.py", "overflow", release.storage.uri, tmp_path]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert seen["first"] == [seen["dead"]] * 2
    assert (seen["lost"], seen["made_without"]) == (2, 0)
    assert seen["then"] == [seen["new"]] * 2
    assert seen["is_equal"]
