"""Committing staged results: each episode becomes visible once, whatever is repeated, raced or interrupted."""

import dataclasses
import json
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lance import Blob, LanceOperation, blob_array
from lance.fragment import FragmentMetadata
from staged import Death, darken, dying_at, stage
from support import Made, make_v21

import lake.commit
from ingest.task import write_fragment
from lake import Lake
from lake.commit import Committed, commit, quarantine_uid
from lake.errors import CommitError
from lake.failpoints import FAILPOINTS
from lake.schema import EPISODES, ROW_TABLES, SIGHTINGS, VIDEOS
from lake.staging import (
    MAX_AGE_S,
    EpisodeWrite,
    Rejected,
    TableWrite,
    TaskResult,
    close_attempt,
    forget_attempt,
    get_result,
    is_closed,
    open_attempts,
    open_results,
    put_result,
)
from lake.tables import append_fragments, create_table, merge_new, open_table, take_rows

COMMIT_POINTS = [name for name in FAILPOINTS if name.startswith("commit.")]
LENGTHS = [12, 9, 14, 12, 11, 10]
BAD = 2
GOOD_FRAMES = sum(LENGTHS) - LENGTHS[BAD]
ALL = Committed(episodes=len(LENGTHS) - 1, frames=GOOD_FRAMES, quarantined=1)
NOTHING = Committed(episodes=0, frames=0, quarantined=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six episodes, one of them black."""
    folder = tmp_path_factory.mktemp("source") / "toy"
    make_v21(folder, [Made(seed=i, num_frames=n) for i, n in enumerate(LENGTHS)])
    darken(folder, BAD, num_frames=LENGTHS[BAD])
    return folder


@pytest.fixture
def made(root: str, source: Path) -> tuple[Lake, list[TaskResult]]:
    """A lake with what three tasks staged, on both kinds of storage."""
    lake = Lake.create(root)
    return lake, stage(lake, source)


@pytest.fixture
def local(tmp_path: Path, source: Path) -> tuple[Lake, list[TaskResult]]:
    """The same on the file system only."""
    lake = Lake.create(str(tmp_path / "lake"))
    return lake, stage(lake, source)


def put(lake: Lake, results: list[TaskResult], wanted: list[str] | None = None) -> Committed:
    return commit(lake.storage, "toy", results, wanted)


def uids(results: list[TaskResult]) -> list[str]:
    return [episode.episode_uid for result in results for episode in result.episodes]


def check(lake: Lake, results: list[TaskResult], *, quarantined: int = 1) -> None:
    """Assert that exactly the results' episodes are visible, once each, and that nothing is damaged."""
    index = open_table(lake.storage, "episodes").to_table(columns=["episode_uid", "num_frames"]).to_pydict()
    assert sorted(index["episode_uid"]) == sorted(set(uids(results)))
    assert list(lake.verify()) == []
    assert open_table(lake.storage, "quarantine").count_rows() == quarantined
    if not results:
        return
    frames = lake.make_release().frames(columns=["episode_uid", "frame_index"]).to_pydict()
    seen = Counter(frames["episode_uid"])
    assert seen == dict(zip(index["episode_uid"], index["num_frames"], strict=True))
    assert len(set(zip(frames["episode_uid"], frames["frame_index"], strict=True))) == seen.total()


def compact(lake: Lake) -> None:
    for table in (*ROW_TABLES, "episodes", "quarantine"):
        open_table(lake.storage, table).optimize.compact_files()


def versions(lake: Lake) -> dict[str, int]:
    return {table: open_table(lake.storage, table).version for table in (*ROW_TABLES, "episodes", "quarantine")}


# Once


def test_a_commit_makes_its_episodes_visible(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    assert put(lake, results) == ALL
    check(lake, results)
    assert open_table(lake.storage, "frames").count_rows() == GOOD_FRAMES + LENGTHS[BAD], (
        "a bad one's frames are unseen"
    )
    release = lake.make_release()
    assert (release.num_episodes, release.num_frames) == (ALL.episodes, ALL.frames)


def test_a_commit_that_is_repeated_changes_nothing(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    put(lake, results)
    before = {table: open_table(lake.storage, table).count_rows() for table in ROW_TABLES}
    for _ in range(2):
        assert put(lake, results) == NOTHING
    assert {table: open_table(lake.storage, table).count_rows() for table in ROW_TABLES} == before
    check(lake, results)


@pytest.mark.parametrize("done", range(4))
def test_a_commit_after_a_part_of_it_takes_the_rest(made: tuple[Lake, list[TaskResult]], done: int) -> None:
    lake, results = made
    first = put(lake, results[:done])
    check(lake, results[:done], quarantined=first.quarantined)
    second = put(lake, results)
    assert first.episodes + second.episodes == ALL.episodes
    assert first.frames + second.frames == ALL.frames
    assert first.quarantined + second.quarantined == 1
    assert open_table(lake.storage, "frames").count_rows() == sum(LENGTHS)
    check(lake, results)


@pytest.mark.parametrize("name", COMMIT_POINTS)
def test_a_commit_that_died_is_done_by_the_next(made: tuple[Lake, list[TaskResult]], name: str) -> None:
    lake, results = made
    with dying_at(name), pytest.raises(Death, match=name):
        put(lake, results)
    died_late = name in ("commit.after_episodes", "commit.after_quarantine")
    check(lake, results if died_late else [], quarantined=int(name == "commit.after_quarantine"))
    done = put(lake, results)
    assert done.episodes == (0 if died_late else ALL.episodes)
    assert done.quarantined == int(name != "commit.after_quarantine")
    assert open_table(lake.storage, "frames").count_rows() == sum(LENGTHS), "fragments are found, not appended again"
    check(lake, results)


def test_only_what_is_wanted_is_published(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    everything = uids(results)
    assert put(lake, results, []).episodes == 0
    check(lake, [])
    wanted = [everything[0], everything[3], "f" * 32]
    assert put(lake, results, wanted) == Committed(episodes=2, frames=LENGTHS[0] + LENGTHS[4], quarantined=0)
    index = open_table(lake.storage, "episodes").to_table(columns=["episode_uid"])
    assert sorted(index.column(0).to_pylist()) == sorted(wanted[:2])
    assert lake.make_release().frames(columns=[]).num_rows in (0, LENGTHS[0] + LENGTHS[4])
    assert set(lake.make_release().frames(columns=["episode_uid"]).column(0).to_pylist()) == set(wanted[:2])
    assert list(lake.verify()) == []
    assert put(lake, results).episodes == ALL.episodes - 2
    check(lake, results)


def test_bad_episodes_come_into_quarantine_once(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    rejected = [r for result in results for r in result.rejected]
    assert [(r.source_index, r.reason) for r in rejected] == [(BAD, "black-video")]
    twice = [dataclasses.replace(result, attempt_id="b" * 24, episodes=(), writes={}) for result in results]
    assert put(lake, results + twice).quarantined == 1
    assert put(lake, twice).quarantined == 0
    row = open_table(lake.storage, "quarantine").to_table().to_pylist()
    assert [(r["episode_uid"], r["attempt_id"]) for r in row] == [
        (quarantine_uid("toy", rejected[0].fingerprint), "a" * 24)
    ]
    assert commit(lake.storage, "other", twice).quarantined == 1, "of another source it is another one"


def test_one_episode_in_two_attempts_becomes_visible_once(root: str, source: Path) -> None:
    lake = Lake.create(root)
    results = stage(lake, source) + stage(lake, source, attempt_id="b" * 24, per_task=3)
    assert put(lake, results) == ALL
    check(lake, results)
    assert put(lake, results[::-1]) == NOTHING
    check(lake, results)


def test_episodes_without_views_are_episodes(tmp_path: Path) -> None:
    lake = Lake.create(str(tmp_path / "lake"))
    results = stage(lake, make_v21(tmp_path / "blind", [Made(seed=1), Made(seed=2)], views=()))
    assert put(lake, results).episodes == 2
    check(lake, results, quarantined=0)
    assert lake.make_release().frames(columns=["views"]).column(0).to_pylist() == [[]] * 24


def test_nothing_is_committed_of_nothing(tmp_path: Path) -> None:
    lake = Lake.create(str(tmp_path / "lake"))
    before = versions(lake)
    assert put(lake, []) == NOTHING
    assert versions(lake) == before


# Two at once


class Turns:
    """Lets one of several committers run from one failpoint to the next, and no other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, committers: dict[str, Callable[[], Any]]) -> None:
        self._mine = threading.local()
        self._may_go = {name: threading.Semaphore(0) for name in committers}
        self._stands = threading.Semaphore(0)
        self._running = set(committers)
        self._pool = ThreadPoolExecutor(len(committers))
        monkeypatch.setattr(lake.commit, "failpoint", self._wait)
        self._results = {name: self._pool.submit(self._run, name, action) for name, action in committers.items()}

    def _run(self, name: str, action: Callable[[], Any]) -> Any:
        self._mine.name = name
        self._may_go[name].acquire()
        try:
            return action()
        finally:
            self._running.discard(name)
            self._stands.release()

    def _wait(self, _: str) -> None:
        self._stands.release()
        self._may_go[self._mine.name].acquire()

    def give(self, name: str) -> None:
        """Let a committer go on to its next failpoint, or to its end."""
        if name in self._running:
            self._may_go[name].release()
            self._stands.acquire()

    def finish(self) -> list[Any]:
        """Let each run to its end; return what they returned."""
        for name in self._results:
            while name in self._running:
                self.give(name)
        self._pool.shutdown()
        return [result.result() for result in self._results.values()]


def race(lake: Lake, results: list[TaskResult], turns: list[bool]) -> list[Committed]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        both = Turns(monkeypatch, {"one": lambda: put(lake, results), "two": lambda: put(lake, results[::-1])})
        for turn in turns:
            both.give("one" if turn else "two")
        return both.finish()


def check_race(lake: Lake, results: list[TaskResult], done: list[Committed]) -> None:
    assert sum(d.episodes for d in done) == ALL.episodes
    assert sum(d.frames for d in done) == ALL.frames
    assert sum(d.quarantined for d in done) == ALL.quarantined
    check(lake, results)
    compact(lake)
    check(lake, results)


@pytest.mark.parametrize("pause", range(1, len(COMMIT_POINTS) + 1), ids=COMMIT_POINTS)
def test_one_committer_overtakes_another(local: tuple[Lake, list[TaskResult]], pause: int) -> None:
    lake, results = local
    check_race(lake, results, race(lake, results, [True] * pause + [False] * 8))


def test_one_committer_overtakes_another_on_each_storage(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    check_race(lake, results, race(lake, results, [True, False, True, False, False, False, True]))


@given(turns=st.lists(st.booleans(), min_size=4, max_size=14))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_two_committers_take_turns_in_any_order(
    source: Path, tmp_path_factory: pytest.TempPathFactory, turns: list[bool]
) -> None:
    lake = Lake.create(str(tmp_path_factory.mktemp("turns") / "lake"))
    results = stage(lake, source)
    check_race(lake, results, race(lake, results, turns))


def test_committers_in_parallel_threads(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    start = threading.Barrier(4)

    def run(turn: int) -> Committed:
        start.wait()
        return put(lake, results[turn % 3 :] + results[: turn % 3])

    with ThreadPoolExecutor(4) as pool:
        check_race(lake, results, list(pool.map(run, range(4))))


def commit_at(lake_uri: str, results: list[bytes], start: float) -> Committed:
    """Commit in a process of its own, at a given time."""
    opened = Lake(lake_uri)
    time.sleep(max(0.0, start - time.time()))
    return put(opened, [TaskResult.from_json(result) for result in results])


def test_committers_in_parallel_processes(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    staged = [result.to_json() for result in results]
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(time.sleep, [0.0] * 3)
        done = pool.starmap(commit_at, [(lake.uri, staged, time.time() + 3.0)] * 3, chunksize=1)
    check_race(lake, results, done)


def test_committers_beside_compaction(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    end = threading.Event()

    def keep_compacting() -> int:
        rounds = 0
        while not end.is_set():
            for table in (*ROW_TABLES, "episodes"):
                try:
                    open_table(lake.storage, table).optimize.compact_files()
                except (OSError, RuntimeError) as error:
                    assert "conflict" in str(error).lower()  # noqa: PT017 (the rest is a failure)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(3) as pool:
        compacting = pool.submit(keep_compacting)
        try:
            done = list(pool.map(lambda _: [put(lake, [result]) for result in results], range(2)))
        finally:
            end.set()
        assert compacting.result() > 0
    check_race(lake, results, [d for each in done for d in each])


# Fragments


def frame_fragments(results: list[TaskResult]) -> list[FragmentMetadata]:
    return [FragmentMetadata.from_json(result.writes["frames"].json) for result in results]


def test_fragments_are_appended_once(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    fragments = frame_fragments(results)
    first = append_fragments(lake.storage, "frames", fragments[:1], 1, {})
    both = append_fragments(lake.storage, "frames", fragments, 1, {})
    assert first.items() <= both.items()
    assert both == append_fragments(lake.storage, "frames", fragments[::-1], 1, {})
    table = open_table(lake.storage, "frames")
    assert table.count_rows() == sum(LENGTHS)
    for result, fragment in zip(results, fragments, strict=True):
        for episode in result.episodes:
            offset, rows = episode.ranges["frames"]
            first_row = both[fragment.files[0].path] + offset
            found = take_rows(table, range(first_row, first_row + rows), ["episode_uid", "frame_index"]).to_pydict()
            assert found == {"episode_uid": [episode.episode_uid] * rows, "frame_index": list(range(rows))}


def test_fragments_are_found_after_compaction(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    fragments = frame_fragments(results)
    before = append_fragments(lake.storage, "frames", fragments, 1, {})
    open_table(lake.storage, "frames").optimize.compact_files()
    assert len(open_table(lake.storage, "frames").get_fragments()) == 1
    assert append_fragments(lake.storage, "frames", fragments, 1, {}) == before
    assert open_table(lake.storage, "frames").count_rows() == sum(LENGTHS)


@pytest.mark.parametrize("name", COMMIT_POINTS)
def test_compaction_between_a_death_and_the_next_commit(local: tuple[Lake, list[TaskResult]], name: str) -> None:
    lake, results = local
    with dying_at(name), pytest.raises(Death):
        put(lake, results)
    compact(lake)
    put(lake, results)
    assert open_table(lake.storage, "frames").count_rows() == sum(LENGTHS)
    check(lake, results)


def test_fragments_that_were_appended_twice_are_seen_once(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    for _ in range(2):  # What two committers do that both looked before either appended.
        for table in ROW_TABLES:
            dataset = open_table(lake.storage, table)
            fragments = [FragmentMetadata.from_json(result.writes[table].json) for result in results]
            append = lance.Transaction(read_version=1, operation=LanceOperation.Append(fragments))
            lance.LanceDataset.commit(dataset, append, storage_options=lake.storage.lance_options())
    assert open_table(lake.storage, "frames").count_rows() == 2 * sum(LENGTHS)
    assert put(lake, results) == ALL
    check(lake, results)
    compact(lake)
    assert put(lake, results) == NOTHING
    check(lake, results)
    assert open_table(lake.storage, "frames").count_rows() == 2 * sum(LENGTHS)


def test_row_ids_are_those_after_other_appends(made: tuple[Lake, list[TaskResult]], source: Path) -> None:
    lake, results = made
    others = [stage(lake, source, name=f"other-{i}", attempt_id=str(i) * 24) for i in range(3)]
    with ThreadPoolExecutor(4) as pool:
        mine = pool.submit(put, lake, results)
        list(pool.map(lambda i: commit(lake.storage, f"other-{i}", others[i]), range(3)))
    assert mine.result() == ALL
    check(lake, [result for each in (results, *others) for result in each], quarantined=4)


# History that is gone


def forget_history(lake: Lake) -> None:
    """Compact, then remove every version but the newest with the files that only they name."""
    compact(lake)
    for table in (*ROW_TABLES, "episodes"):
        open_table(lake.storage, table).cleanup_old_versions(older_than=timedelta(0))


def test_what_is_committed_outlives_its_history(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    put(lake, results)
    forget_history(lake)
    check(lake, results)
    assert put(lake, results) == NOTHING
    check(lake, results)


def test_staged_files_that_were_cleaned_away_are_not_appended(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    with dying_at("commit.after_videos"), pytest.raises(Death):
        put(lake, results)
    forget_history(lake)
    with pytest.raises(CommitError, match="staged files of 5 episodes were cleaned away"):
        put(lake, results)
    check(lake, [], quarantined=0)
    assert open_table(lake.storage, "frames").to_table(columns=["episode_uid"]).num_rows == sum(LENGTHS)
    assert list(open_results(lake.storage, "toy")) == []
    assert get_result(lake.storage, "toy", "a" * 24, 0) is None


def test_tasks_are_done_anew_where_staged_files_were_cleaned_away(
    made: tuple[Lake, list[TaskResult]], source: Path
) -> None:
    lake, results = made
    with dying_at("commit.after_videos"), pytest.raises(Death):
        put(lake, results)
    forget_history(lake)
    anew = stage(lake, source)
    assert put(lake, anew) == ALL
    check(lake, anew)
    assert [r.created_at for r in open_results(lake.storage, "toy")] == [r.created_at for r in anew]
    assert all(new.created_at > old.created_at for new, old in zip(anew, results, strict=True))


def test_videos_of_every_size_outlive_compaction_and_history(tmp_path: Path) -> None:
    lake = Lake.create(str(tmp_path / "lake"))
    sizes = [1_000, 200_000, 6_000_000]  # Lance keeps them within the file, in a shared one beside it, in one's own.
    writes = []
    for size in sizes:
        path = tmp_path / f"{size}.bin"
        path.write_bytes(np.random.default_rng(size).bytes(size))
        columns = {name: pa.nulls(1, VIDEOS.field(name).type) for name in VIDEOS.names}
        columns |= {"episode_uid": pa.array([str(size)]), "view": pa.array(["top"])}
        columns["video"] = blob_array([Blob.from_uri(path.as_uri())])
        data, no_error = pa.table(columns, schema=VIDEOS), SimpleNamespace(error=None)
        writes.append(write_fragment(lake.storage, "videos", open_table(lake.storage, "videos"), data, no_error))
    fragments = [FragmentMetadata.from_json(write["videos"].json) for write in writes]
    first = append_fragments(lake.storage, "videos", fragments, 1, {})
    forget_history(lake)
    ids = [first[fragment.files[0].path] for fragment in fragments]
    for blob, size in zip(open_table(lake.storage, "videos").take_blobs("video", ids=ids), sizes, strict=True):
        with blob:
            assert blob.readall() == (tmp_path / f"{size}.bin").read_bytes()


# Staging


def test_the_first_staged_result_counts(local: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = local
    other = dataclasses.replace(results[0], created_at=results[0].created_at + 1)
    assert put_result(lake.storage, "toy", other) == results[0]
    assert get_result(lake.storage, "toy", "a" * 24, 0) == results[0]
    assert list(open_results(lake.storage, "toy")) == results
    assert list(open_results(lake.storage, "other")) == []


def test_a_result_that_is_too_old_is_replaced(local: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = local
    old = dataclasses.replace(results[0], attempt_id="c" * 24, created_at=time.time() - MAX_AGE_S - 1)
    put_result(lake.storage, "toy", old)
    assert get_result(lake.storage, "toy", "c" * 24, 0) is None
    new = dataclasses.replace(old, created_at=time.time())
    assert put_result(lake.storage, "toy", new) == new
    assert get_result(lake.storage, "toy", "c" * 24, 0) == new


def test_a_closed_attempt_is_not_recovered_and_can_be_forgotten(local: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = local
    close_attempt(lake.storage, "toy", "b" * 24)
    assert open_attempts(lake.storage, "toy") == {"a" * 24}
    close_attempt(lake.storage, "toy", "a" * 24)
    assert is_closed(lake.storage, "toy", "a" * 24)
    assert list(open_results(lake.storage, "toy")) == []
    assert get_result(lake.storage, "toy", "a" * 24, 0) == results[0], "what was done is still known"
    forget_attempt(lake.storage, "toy", "a" * 24)
    assert not is_closed(lake.storage, "toy", "a" * 24)
    assert get_result(lake.storage, "toy", "a" * 24, 0) is None
    assert is_closed(lake.storage, "toy", "b" * 24)


WORDS = st.text(st.characters(codec="utf-8"), max_size=12)
COUNTS = st.integers(0, 2**53)
ROW = st.dictionaries(
    WORDS, st.none() | st.booleans() | COUNTS | st.floats(allow_nan=False) | WORDS | st.lists(WORDS, max_size=3)
)
RESULTS = st.builds(
    TaskResult,
    attempt_id=WORDS,
    task=st.integers(0, 999_999),
    created_at=st.floats(0, 1e12),
    writes=st.dictionaries(st.sampled_from(ROW_TABLES), st.builds(TableWrite, json=WORDS, base_version=COUNTS)),
    episodes=st.lists(
        st.builds(
            EpisodeWrite,
            episode_uid=WORDS,
            row=ROW,
            ranges=st.dictionaries(st.sampled_from(ROW_TABLES), st.tuples(COUNTS, COUNTS)),
        ),
        max_size=3,
    ).map(tuple),
    rejected=st.lists(
        st.builds(Rejected, source_index=COUNTS, fingerprint=WORDS, reason=WORDS, message=WORDS), max_size=3
    ).map(tuple),
)


@given(RESULTS)
def test_a_result_comes_back_from_json_as_it_was(result: TaskResult) -> None:
    data = result.to_json()
    assert TaskResult.from_json(data) == result
    assert json.loads(data)["attempt_id"] == result.attempt_id


# Merging


def sightings(keys: list[str]) -> pa.Table:
    rows = [{"fingerprint": key, "source": "toy", "episode_uid": str(i)} for i, key in enumerate(keys)]
    return pa.Table.from_pylist(rows, SIGHTINGS)


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6), max_size=4))
@settings(max_examples=20, deadline=None)
def test_a_merge_counts_the_keys_that_are_new(
    tmp_path_factory: pytest.TempPathFactory, merges: list[list[str]]
) -> None:
    storage = Lake.create(str(tmp_path_factory.mktemp("merge"))).storage
    first: dict[str, str] = {}
    for keys in merges:
        new = set(keys) - first.keys()
        assert merge_new(storage, "sightings", sightings(keys)) == len(new)
        for i, key in enumerate(keys):
            first.setdefault(key, str(i))
    rows = open_table(storage, "sightings").to_table().to_pylist()
    assert {row["fingerprint"]: row["episode_uid"] for row in rows} == first
    assert len(rows) == len(first)


def test_merges_at_once_insert_each_key_once(root: str) -> None:
    storage = Lake.create(root).storage
    start = threading.Barrier(4)
    keys = [f"{i:04d}" for i in range(300)]

    def merge(turn: int) -> int:
        start.wait()
        return merge_new(storage, "sightings", sightings(keys[50 * turn :] + keys[:50]))

    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(merge, range(4)))
    assert sum(counts) == 300
    table = open_table(storage, "sightings")
    assert sorted(table.to_table().column("fingerprint").to_pylist()) == keys


def test_the_index_has_a_primary_key_on_the_storage(root: str) -> None:
    schema = open_table(Lake.create(root).storage, "episodes").schema
    assert schema.field("episode_uid").metadata == EPISODES.field("episode_uid").metadata
    assert schema.field("episode_uid").metadata == {b"lance-schema:unenforced-primary-key": b"true"}


def test_a_lake_made_by_several_at_once_is_one(root: str) -> None:
    start = threading.Barrier(4)

    def make(_: int) -> str:
        start.wait()
        return Lake.create(root, exist_ok=True).uri

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(make, range(4))) == {Lake(root).uri}
    assert {open_table(Lake(root).storage, table).version for table in (*ROW_TABLES, "episodes")} == {1}


def test_a_table_that_is_there_is_left_as_it_is(made: tuple[Lake, list[TaskResult]]) -> None:
    lake, results = made
    put(lake, results)
    for table in (*ROW_TABLES, "episodes"):
        create_table(lake.storage, table)
    check(lake, results)
