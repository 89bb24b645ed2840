"""Tests of train/blocks.py."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from training import make_released, reopened, small

from lake import Release
from lake.errors import LakeDamagedError
from train.blocks import Block, BlockCache, BlockKey, BlockReader
from train.loader import open_parts


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_released(tmp_path_factory.mktemp("blocks"))


def keys_of(release: Release) -> list[BlockKey]:
    """Return ranges of every kind: whole episodes, their ends, single rows, without rows around."""
    found = []
    for episode in release.episodes(columns=["episode_uid", "frames_first_row", "num_frames"]).to_pylist():
        n = episode["num_frames"]
        for views, rows in (((0, n), (0, n)), ((3, 7), (1, n)), ((n - 1, n), (n - 1, n)), ((0, 1), (0, 5))):
            uid = episode["episode_uid"].encode()
            found.append(BlockKey(uid=uid, content=7, first_row=episode["frames_first_row"], views=views, rows=rows))
    return found[::-1]


def check(release: Release, key: BlockKey, block: Block) -> None:
    frames = release.frames(episodes=[key.uid.decode()]).to_pylist()[key.rows[0] : key.rows[1]]
    assert block.first == key.rows[0]
    assert np.array_equal(block.state, np.array([frame["state"] for frame in frames], np.float32))
    assert np.array_equal(block.action, np.array([frame["action"] for frame in frames], np.float32))
    assert block.task.tolist() == [frame["task_index"] for frame in frames]
    for row, frame in enumerate(frames):
        is_shown = key.views[0] <= row + key.rows[0] < key.views[1]
        jpegs = [bytes(block.jpeg(row, view)) for view in range(block.num_views(row))]
        assert jpegs == (frame["views"] if is_shown else [])
        with pytest.raises(IndexError, match="no view"):
            block.jpeg(row, len(jpegs))


@pytest.mark.parametrize("cached", [False, True])
def test_blocks_hold_what_the_release_holds(release: Release, tmp_path: Path, cached: bool) -> None:
    cache = BlockCache(tmp_path / "cache", 1 << 30) if cached else None
    keys = keys_of(release)
    for _ in range(2):
        for key, block in zip(keys, BlockReader(release, cache=cache).read(keys), strict=True):
            check(release, key, block)
    assert BlockReader(release).read([]) == []


def test_from_an_object_store(bucket: str, tmp_path: Path) -> None:
    release = make_released(tmp_path, f"{bucket}/lake")
    keys = keys_of(release)
    for key, block in zip(keys, BlockReader(reopened(release)).read(keys), strict=True):
        check(release, key, block)
    assembler, reader = open_parts(release, small(read={"cache_dir": str(tmp_path / "cache")}))
    assert len(reader.read(assembler.block_keys(0))) == 4
    assert len(list((tmp_path / "cache").glob("*/*"))) == 4, "blocks of a window are kept on the node"


def test_a_cached_block_needs_no_lake(tmp_path: Path) -> None:
    release = make_released(tmp_path)
    keys = keys_of(release)
    cache = BlockCache(tmp_path / "cache", 1 << 30)
    first = BlockReader(release, cache=cache).read(keys)
    for path in (tmp_path / "lake/frames.lance/data").iterdir():
        path.unlink()
    again = BlockReader(reopened(release), cache=BlockCache(tmp_path / "cache", 1 << 30)).read(keys)
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.state, other.state)
        assert bytes(one.jpegs) == bytes(other.jpegs)
    with pytest.raises(LakeDamagedError, match="cannot be read"):
        BlockReader(reopened(release)).read(keys)


def test_an_episode_of_other_contents_is_another_block(release: Release, tmp_path: Path) -> None:
    """A lake may be made anew at the same place, with pictures of another size: the uid is that of the source."""
    cache = BlockCache(tmp_path / "cache", 1 << 30)
    reader = BlockReader(release, cache=cache)
    (key, *_) = keys_of(release)
    reader.read([key])
    assert len(names(tmp_path / "cache")) == 1
    reader.read([replace(key, content=8)])
    assert len(names(tmp_path / "cache")) == 2


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BlockCache(tmp_path / "cache", 1)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ValueError, match="belongs to another user"):
        BlockCache(tmp_path / "cache", 1)


def batch_of(num_bytes: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"x": [bytes(num_bytes)]})


def names(folder: Path) -> set[str]:
    return {path.parent.name + path.name for path in folder.glob("*/*")}


def test_the_longest_unused_blocks_go_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 50_000)
    for at, name in enumerate(["aa1", "bb2", "cc3", "dd4"]):
        BlockCache(tmp_path, 1 << 30).put(name, batch_of(20_000))
        os.utime(tmp_path / name[:2] / name[2:], (at, at))
    held = cache.get("aa1")
    cache.evict()
    assert names(tmp_path) == {"aa1", "dd4"}
    (tmp_path / "aa" / "1").unlink()
    assert held is not None
    assert held.column("x")[0].as_py() == bytes(20_000), "what is mapped stays readable"


def test_writing_keeps_the_folder_within_its_bounds(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 100_000)
    for at in range(60):
        cache.put(f"{at:04}", batch_of(5_000))
        size = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
        assert size < 100_000 * 17 / 16 + 6_000
    assert len(names(tmp_path)) > 10


def test_a_file_that_a_dead_process_left_half_written_goes(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    cache.put("aa1", batch_of(10))
    for name, age_s in (("old.part", 7200), ("new.part", 10)):
        path = tmp_path / "aa" / name
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_s,) * 2)
    cache.evict()
    assert names(tmp_path) == {"aa1", "aanew.part"}


@pytest.mark.parametrize("content", [b"", b"no arrow at all, but long enough to be some", b"\xff\xff\xff\xff\x10\x00"])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    cache.put("aa1", batch_of(10))
    (tmp_path / "aa" / "1").write_bytes(content)
    assert cache.get("aa1") is None
    assert names(tmp_path) == set()
    assert cache.get("bb1") is None


def test_a_folder_that_cannot_be_written_only_costs_time(release: Release, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", 1 << 20)
    keys = keys_of(release)
    for at in range(256):
        (tmp_path / "cache" / f"{at:02x}").write_text("a file where a folder should be")
    for key, block in zip(keys, BlockReader(release, cache=cache).read(keys), strict=True):
        check(release, key, block)


def test_threads_may_share_it(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def work(seed: int) -> None:
        cache = BlockCache(tmp_path, 60_000)
        rng = np.random.default_rng(seed)
        try:
            for each in rng.integers(0, 40, 200).tolist():
                found = cache.get(f"{each:04}")
                if found is None:
                    found = cache.put(f"{each:04}", pa.RecordBatch.from_pydict({"x": [str(each).encode() * 2000]}))
                assert found.column("x")[0].as_py() == str(each).encode() * 2000
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
