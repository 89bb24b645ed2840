"""Tests of train/loader.py."""

import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from training import SMALL, Sample, make_released, reopened, samples, small

from lake import Release
from lake.errors import BadSampleError, LakeDamagedError, LoaderClosedError
from train.augment import Augmentation
from train.batch import Batch
from train.loader import LoaderConfig, open_loader, plan_of
from train.provenance import Checkpoint, audit
from train.state import LoaderState, merge_states
from train.statistics import Statistics, StatisticsMissingError
from train.turns import Cursor, CursorMismatchError, merge


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_released(tmp_path_factory.mktemp("loader"))


def equal(one: Batch, other: Batch) -> bool:
    pairs = zip(one.arrays().values(), other.arrays().values(), strict=True)
    return (one.step, one.lane) == (other.step, other.lane) and all(torch.equal(a, b) for a, b in pairs)


def test_packs_are_tensors_of_static_shapes(release: Release) -> None:
    with open_loader(release, SMALL) as loader:
        batches = list(itertools.islice(loader, 12))
    shapes = {name: tensor.shape for name, tensor in batches[0].arrays().items()}
    for batch in batches:
        assert all(isinstance(tensor, torch.Tensor) for tensor in batch.arrays().values())
        assert {name: tensor.shape for name, tensor in batch.arrays().items()} == shapes
        assert not batch.images_ISSC.is_pinned()
    assert [(batch.step, batch.lane) for batch in batches] == [(s, g) for s in range(4) for g in range(3)]
    assert loader.sizes.budgets.tokens == 2048


def test_packs_that_are_held_stay_as_they_are(release: Release) -> None:
    with open_loader(release, SMALL) as loader:
        batches = list(itertools.islice(loader, 40))
    with open_loader(release, SMALL) as loader:
        assert all(equal(batch, again) for batch, again in zip(batches, loader, strict=False))


def test_memory_of_packs_is_used_again(release: Release) -> None:
    with open_loader(release, SMALL) as loader:
        seen = {next(loader).images_ISSC.data_ptr() for _ in range(60)}
    assert len(seen) < 12


@pytest.mark.parametrize("k", [0, 1, 5, 6, 31])
def test_resuming_behind_any_pack_goes_on_as_if_nothing_had_been(release: Release, k: int) -> None:
    with open_loader(release, SMALL) as loader:
        for _ in range(k):
            next(loader)
        cursor = Cursor.from_json(json.loads(json.dumps(loader.cursor().to_json())))
        rest = [next(loader) for _ in range(14)]
    with open_loader(reopened(release), SMALL, cursor=cursor) as loader:
        again = [next(loader) for _ in range(14)]
    assert all(equal(one, other) for one, other in zip(rest, again, strict=True))


def test_any_world_sees_the_same_packs_of_each_step(release: Release) -> None:
    with open_loader(release, SMALL) as loader:
        expected = [sorted(samples(next(loader))[0] for _ in range(3)) for _ in range(9)]
    cursor, before, found = None, None, []
    for world, steps in ((3, 2), (1, 1), (2, 4), (3, 2)):
        states: list[LoaderState] = []
        by_step = [[] for _ in range(steps)]
        for rank in range(world):
            with open_loader(release, SMALL, rank, world, cursor) as loader:
                for step in range(steps):
                    for _ in range(loader.micro_steps):
                        batch = next(loader)
                        by_step[step] += samples(batch)[:1]
                        assert (batch.lane is None) == (batch.num_samples == 0)
                states.append(loader.state())
        found += [sorted(each) for each in by_step]
        before = merge_states(states, before)
        cursor = before.cursor
        assert cursor.step == len(found)
        checkpoint = Checkpoint(
            lake=release.storage.uri, release=release.name, release_id=release.id, config=SMALL, state=before
        )
        verdict = audit(Checkpoint.from_json(checkpoint.to_json()))
        assert verdict.is_right, verdict
    assert found == expected


def one_pass(release: Release, config: LoaderConfig, world: int) -> tuple[list[Sample], list[int]]:
    seen, counts = [], []
    for rank in range(world):
        with open_loader(release, config, rank, world) as loader:
            batches = list(loader)
        seen += [sample for batch in batches for sample in samples(batch)]
        counts.append(len(batches))
    return seen, counts


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_pass_is_exact_at_any_world_size(release: Release, split: str) -> None:
    config = small(order={"one_pass": True, "split": split})
    rows = plan_of(release, config).episodes
    expected = {
        (int(source), 0, at - int(np.searchsorted(rows.source, source)), frame)
        for at, source in enumerate(rows.source)
        for frame in range(rows.length[at])
    }
    for world in (1, 2, 3):
        seen, counts = one_pass(release, config, world)
        assert Counter(seen) == dict.fromkeys(expected, 1)
        assert len(set(counts)) == 1, "every rank makes as many micro-steps"


def test_a_changed_configuration_refuses_the_cursor(release: Release) -> None:
    with open_loader(release, SMALL) as loader:
        next(loader)
        cursor = loader.cursor()
    for change in ({"order": {"seed": 5}}, {"packs": {"tokens": 4096}}, {"order": {"lanes": 4}}):
        with pytest.raises(CursorMismatchError, match="belongs to another order"):
            open_loader(release, small(**change), cursor=cursor)
    open_loader(release, small(sample={"horizon": 2}), cursor=cursor).close()


def test_a_cursor_of_some_lanes_is_refused(release: Release) -> None:
    with open_loader(release, SMALL, 0, 2) as loader:
        next(loader)
        part = loader.cursor()
    with pytest.raises(ValueError, match="the cursor knows 2 of 3 lanes; merge"):
        open_loader(release, SMALL, cursor=part)
    with pytest.raises(ValueError, match="no rank knows lane 1"):
        merge([part])


def test_more_ranks_than_lanes_are_refused(release: Release) -> None:
    with pytest.raises(ValueError, match=r"world_size=4 is more than the 3 lanes: 1 ranks would never"):
        open_loader(release, SMALL, 0, 4)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        open_loader(release, SMALL, 2, 2)


def test_an_error_ends_the_wait_and_names_the_sample(tmp_path: Path) -> None:
    release = make_released(tmp_path)
    loader = open_loader(release, SMALL)
    try:
        for path in (tmp_path / "lake/frames.lance/data").iterdir():
            path.unlink()
        for _ in range(2):
            with pytest.raises(LakeDamagedError, match="frames cannot be read"):
                list(itertools.islice(loader, 100))
    finally:
        loader.close()


def test_statistics_that_are_missing_are_named(release: Release) -> None:
    whole = Statistics.of_release(release)
    features = {key: stats for key, stats in whole.features.items() if key[0] != "toy"}
    part = Statistics(features=features, actions=whole.actions, release_id=whole.release_id)
    with pytest.raises(StatisticsMissingError, match="no statistics of toy/toy/state"):
        open_loader(release, SMALL, statistics=part)


def test_a_closed_loader_says_so(release: Release) -> None:
    loader = open_loader(release, SMALL)
    next(loader)
    loader.close()
    with pytest.raises(LoaderClosedError, match="is closed"):
        next(loader)
    loader.close()


def test_closing_leaves_no_threads(release: Release) -> None:
    import threading

    def ours() -> list[str]:
        return [
            thread.name for thread in threading.enumerate() if thread.name.startswith(("packs", "windows", "turns"))
        ]

    before = ours()
    with open_loader(release, SMALL) as loader:
        next(loader)
        assert len(ours()) > len(before)
    assert ours() == before


def in_another_process(release: Release, connection: object) -> None:
    with open_loader(release, SMALL) as loader:
        connection.send([samples(next(loader)) for _ in range(4)])  # type: ignore[attr-defined]


def test_a_spawned_process_sees_the_same(release: Release) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=in_another_process, args=(release, there))
    process.start()
    assert here.poll(120)
    found = here.recv()
    process.join()
    with open_loader(release, SMALL) as loader:
        assert found == [samples(next(loader)) for _ in range(4)]


def test_a_forked_process_is_refused(release: Release) -> None:
    with open_loader(release, SMALL) as loader:
        next(loader)
        loader._pid = os.getppid()
        with pytest.raises(LoaderClosedError, match="belongs to another process"):
            next(loader)
        loader._pid = os.getpid()


def test_a_configuration_survives_json(release: Release) -> None:
    config = small(
        order={"weights": {"toy": 2.0, "other": 1.0}},
        packs={"views": ("top",)},
        sample={"past_frames": (2,), "relative_dims": {"toy": (0,)}},
        augment=Augmentation(still_views=("wrist",)),
        read={"actor_resources": {"cpu_node": 1.0}},
    )
    assert LoaderConfig.from_json(json.loads(json.dumps(asdict(config)))) == config
    assert LoaderConfig.from_json(json.loads(json.dumps(asdict(SMALL)))) == SMALL
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_bad_picture_is_an_error_or_left_out_and_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture is damaged on its way, for the lake's own files have checksums."""
    from train import blocks

    release = make_released(tmp_path)
    original = blocks._block

    def damaged(key: blocks.BlockKey, batch: object) -> blocks.Block:
        block = original(key, batch)  # type: ignore[arg-type]
        if key.rows[0] == 0 and block.jpegs:
            zeros = bytes(block.jpeg_ends[1]) + bytes(block.jpegs[block.jpeg_ends[1] :])
            return blocks.Block(**{**vars(block), "jpegs": memoryview(zeros)})
        return block

    monkeypatch.setattr(blocks, "_block", damaged)
    with open_loader(release, SMALL) as loader, pytest.raises(BadSampleError, match="frame 0 of episode"):
        list(itertools.islice(loader, 60))
    config = small(sample={"on_bad_picture": "leave_out"})
    with open_loader(release, config) as loader:
        batches = [next(loader) for _ in range(60)]
        state = merge_states([loader.state()])
    bad = [sample for batch in batches for sample in samples(batch) if sample[3] == 0]
    assert sorted(state.left_out) == sorted(bad)
    checkpoint = Checkpoint(
        lake=release.storage.uri, release=release.name, release_id=release.id, config=config, state=state
    )
    verdict = audit(checkpoint)
    assert verdict.is_right
    assert verdict.num_left_out == len(bad) > 0


def test_reading_ahead_waits_for_nobody(release: Release) -> None:
    with open_loader(release, SMALL) as loader:
        next(loader)
        deadline = time.monotonic() + 20
        while loader._queue.qsize() < 3 or not all(making.done() for _, making in loader._queue.queue):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert loader._queue.qsize() == 3, "two threads, and one pack ahead of them"


def test_from_an_object_store_through_the_cache(bucket: str, tmp_path: Path) -> None:
    release = make_released(tmp_path, f"{bucket}/lake")
    config = small(read={"cache_dir": str(tmp_path / "cache")})
    with open_loader(release, config) as loader:
        first = [next(loader) for _ in range(20)]
    kept = list((tmp_path / "cache").glob("*/*"))
    assert kept
    with open_loader(reopened(release), config) as loader:
        assert all(equal(batch, next(loader)) for batch in first)


def test_blocks_are_kept_on_the_node_where_that_saves_something(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def kept(config: LoaderConfig, world_size: int = 1) -> int:
        shutil.rmtree(tmp_path / f"robolake-blocks-{os.getuid()}", ignore_errors=True)
        with open_loader(release, config, 0, world_size) as loader:
            next(loader)
        return len(list(tmp_path.glob("robolake-blocks-*/*/*")))

    assert kept(small(order={"lanes": 4})) == 0, "a file system keeps files in memory by itself"
    assert kept(small(order={"lanes": 5})) > 0, "the windows of many lanes are not for one process to hold"
    assert kept(small(order={"lanes": 5}), world_size=2) == 0
    assert kept(small(order={"lanes": 5}, read={"cache_dir": None})) == 0
