"""Tests of ingest/plan.py."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ingest.plan import (
    MAX_TASK_FRAMES,
    MIN_TASK_FRAMES,
    PLAN_SCHEMA,
    TASKS_WANTED,
    Discovered,
    Known,
    Ordinals,
    attempt_of,
    identify,
    known_episodes,
    limited,
    make_plan,
    new_refs,
    planned_episodes,
    refs_of,
)
from ingest.source import EpisodeRef, fingerprint
from ingest.task import PlannedEpisode, Profile
from lake import Lake
from lake.commit import episode_uid, quarantine_uid
from lake.schema import EPISODES, QUARANTINE, SIGHTINGS
from lake.tables import merge_new

SOURCE = "toy"
PROFILE = Profile(source_name=SOURCE)


@dataclass(frozen=True)
class Listed:
    """An episode as a source lists it: its contents, and a state of its files that copying changes."""

    content: int
    copy: int = 0


@dataclass
class Memory:
    """What a lake remembers of a source, as rows."""

    episodes: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    """(fingerprint, content digest, ordinal) by uid."""
    sightings: dict[str, str] = field(default_factory=dict)
    quarantined: set[str] = field(default_factory=set)

    def known(self) -> Known:
        episodes = [(print_, uid, digest, ordinal) for uid, (print_, digest, ordinal) in self.episodes.items()]
        prints = sorted([(p, uid) for p, uid, _, _ in episodes] + list(self.sightings.items()))
        by_digest = sorted((digest, uid, ordinal) for _, uid, digest, ordinal in episodes)
        return Known(
            fingerprints=np.array([p for p, _ in prints], "S32"),
            uid_of_fingerprint=np.array([uid for _, uid in prints], "S32"),
            uids=np.sort(np.array(list(self.episodes), "S32")),
            digests=np.array([digest for digest, _, _ in by_digest], "S32"),
            digest_uids=np.array([uid for _, uid, _ in by_digest], "S32"),
            ordinals=np.array([ordinal for _, _, ordinal in by_digest], np.int32),
            quarantined=frozenset(self.quarantined),
        )


@dataclass(frozen=True)
class Outcome:
    new: list[PlannedEpisode]
    read: int
    """How many episodes had to be opened."""


def digest_of(content: int) -> str:
    return hashlib.sha256(str(content).encode()).hexdigest()[:32]


def listing(state: list[Listed]) -> list[EpisodeRef]:
    return [
        EpisodeRef(source_index=i, num_frames=10, fingerprint=fingerprint(i, one.content, one.copy), locator="{}")
        for i, one in enumerate(state)
    ]


def ingest(memory: Memory, state: list[Listed], *, batch: int = 3, limit: int | None = None) -> Outcome:
    """Do to the rows what ``ingest.pipeline.ingest`` does to the tables."""
    known, so_far = memory.known(), Discovered()
    refs = listing(state)
    batches = [refs[start : start + batch] for start in range(0, len(refs), batch)]
    found = [ref for rows in new_refs(limited(batches, limit), known, so_far) for ref in refs_of(rows)]
    ordinals = Ordinals(known, so_far.still_there())
    digested = [(ref, digest_of(state[ref.source_index].content)) for ref in found]
    identified = identify(reversed(digested), known, ordinals, SOURCE)
    for episode in identified.new:
        uid = episode_uid(SOURCE, episode.content_digest, episode.ordinal)
        assert uid not in memory.episodes
        memory.episodes[uid] = (episode.ref.fingerprint, episode.content_digest, episode.ordinal)
    for print_, uid in identified.sighted:
        assert uid in memory.episodes
        memory.sightings.setdefault(print_, uid)
    assert so_far.total == min(len(state), len(state) if limit is None else limit)
    assert so_far.skipped + len(found) == so_far.total
    assert len(identified.new) + len(identified.sighted) == len(found)
    return Outcome(new=identified.new, read=len(found))


def held(memory: Memory) -> Counter[tuple[str, int]]:
    return Counter((digest, ordinal) for _, digest, ordinal in memory.episodes.values())


states = st.lists(st.builds(Listed, st.integers(0, 3), st.integers(0, 1)), max_size=7)


@given(st.lists(states, max_size=6))
@example([[Listed(0)], [Listed(1), Listed(0)], [Listed(0), Listed(0)]])
@example([[Listed(0), Listed(0)], [Listed(1), Listed(0)], [Listed(0), Listed(1)], [Listed(0), Listed(0)]])
def test_the_lake_holds_each_content_as_often_as_the_source_ever_showed_it(history: list[list[Listed]]) -> None:
    memory, most = Memory(), Counter[str]()
    for state in history:
        shown = Counter(digest_of(one.content) for one in state)
        expected_new = sum((shown - most).values())
        most |= shown
        assert len(ingest(memory, state).new) == expected_new
        assert held(memory) == Counter((digest, n) for digest, count in most.items() for n in range(count))
        assert ingest(memory, state).new == []


@given(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=8), max_size=6), st.integers(0, 1))
def test_distinct_episodes_are_read_once_under_each_number_and_in_each_copy(
    history: list[list[int]], copy: int
) -> None:
    memory, seen = Memory(), set[tuple[int, int]]()
    for contents in history:
        outcome = ingest(memory, [Listed(content, copy) for content in contents])
        assert outcome.read == len(set(enumerate(contents)) - seen)
        seen |= set(enumerate(contents))
        assert ingest(memory, [Listed(content, copy) for content in contents]).read == 0


@given(states, st.randoms(use_true_random=False), st.integers(0, 7))
def test_a_renumbered_or_shrunk_source_adds_nothing(state: list[Listed], random: Random, keep: int) -> None:
    memory = Memory()
    ingest(memory, state)
    before = held(memory)
    shuffled = list(state)
    random.shuffle(shuffled)
    assert ingest(memory, shuffled[:keep]).new == []
    assert ingest(memory, state).new == []
    assert held(memory) == before


@given(states, states)
def test_a_grown_source_adds_exactly_what_is_new(state: list[Listed], more: list[Listed]) -> None:
    memory = Memory()
    ingest(memory, state)
    outcome = ingest(memory, state + more)
    assert Counter(e.content_digest for e in outcome.new) == Counter(digest_of(one.content) for one in more)
    assert [e.ref.source_index for e in outcome.new] == list(range(len(state), len(state) + len(more)))
    assert outcome.read == len(more)


@given(states, st.integers(0, 8))
def test_a_limit_takes_the_first_and_the_rest_follow(state: list[Listed], limit: int) -> None:
    memory = Memory()
    first = ingest(memory, state, limit=limit)
    assert [e.ref.source_index for e in first.new] == list(range(min(limit, len(state))))
    rest = ingest(memory, state)
    assert [e.ref.source_index for e in rest.new] == list(range(min(limit, len(state)), len(state)))


@given(st.lists(st.integers(0, 5), max_size=9), st.integers(1, 9))
def test_batches_do_not_matter(contents: list[int], batch: int) -> None:
    one, other = Memory(), Memory()
    ingest(one, [Listed(content) for content in contents], batch=1)
    ingest(other, [Listed(content) for content in contents], batch=batch)
    assert one == other


@given(st.lists(st.lists(st.integers(), max_size=5), max_size=5), st.one_of(st.none(), st.integers(0, 30)))
def test_a_limit_cuts_batches(batches: list[list[int]], limit: int | None) -> None:
    kept = [one for batch in limited(batches, limit) for one in batch]  # type: ignore[arg-type]
    assert kept == [one for batch in batches for one in batch][:limit]


def test_an_episode_that_was_taken_out_again_comes_back_though_it_was_sighted() -> None:
    memory = Memory()
    ingest(memory, [Listed(0), Listed(1)])
    ingest(memory, [Listed(1), Listed(0)])
    assert len(memory.sightings) == 2
    memory.episodes.clear()
    assert len(ingest(memory, [Listed(1), Listed(0)]).new) == 2


def test_quarantined_episodes_are_skipped_and_told_apart() -> None:
    memory = Memory()
    refs = listing([Listed(0), Listed(1), Listed(2)])
    memory.quarantined = {refs[1].fingerprint, "of an episode that is gone"}
    so_far = Discovered()
    found = [ref for rows in new_refs([refs], memory.known(), so_far) for ref in refs_of(rows)]
    assert found == [refs[0], refs[2]]
    assert (so_far.total, so_far.skipped, so_far.quarantined) == (3, 0, {refs[1].fingerprint})


def planned(lengths: list[int]) -> list[PlannedEpisode]:
    return [
        PlannedEpisode(
            ref=EpisodeRef(source_index=i, num_frames=n, fingerprint=fingerprint(i), locator='{"data": "x"}'),
            content_digest=digest_of(i),
            ordinal=i % 3,
        )
        for i, n in enumerate(lengths)
    ]


@given(st.lists(st.integers(0, 2 * MAX_TASK_FRAMES), max_size=200))
def test_tasks_are_runs_of_neighbours_of_about_one_size(lengths: list[int]) -> None:
    episodes = planned(lengths)
    plan = make_plan(episodes)
    assert plan.schema.equals(PLAN_SCHEMA)
    assert planned_episodes(plan) == episodes
    tasks = plan.column("task").to_pylist()
    assert tasks == sorted(tasks)
    assert set(tasks) == set(range(len(set(tasks))))
    target = min(MAX_TASK_FRAMES, max(MIN_TASK_FRAMES, sum(lengths) // TASKS_WANTED))
    for task in set(tasks):
        frames = [max(1, n) for n, of in zip(lengths, tasks, strict=True) if of == task]
        assert sum(frames[:-1]) < target
        assert task == tasks[-1] or sum(frames) >= target


def test_a_plan_has_one_name_whoever_makes_it_and_another_for_other_work() -> None:
    episodes = planned([10, 20, 30])
    plan = make_plan(episodes)
    name = attempt_of(plan, PROFILE, "/data/toy")
    assert name == attempt_of(pa.Table.from_pylist(plan.to_pylist(), PLAN_SCHEMA), PROFILE, "/data/toy")
    others = [
        attempt_of(plan, PROFILE, "/data/other"),
        attempt_of(plan, replace(PROFILE, source_name="other"), "/data/toy"),
        attempt_of(plan, replace(PROFILE, resolution=448), "/data/toy"),
        attempt_of(plan, replace(PROFILE, backend="pyav"), "/data/toy"),
        attempt_of(plan, replace(PROFILE, accept=("black-video",)), "/data/toy"),
        attempt_of(make_plan(episodes[:2]), PROFILE, "/data/toy"),
        attempt_of(make_plan([*episodes[:2], replace(episodes[2], ordinal=7)]), PROFILE, "/data/toy"),
        attempt_of(make_plan([*episodes[:2], replace(episodes[2], content_digest="0" * 32)]), PROFILE, "/data/toy"),
    ]
    assert len({name, *others}) == 1 + len(others)


@pytest.mark.parametrize("source", ["toy", "it's; DROP TABLE episodes --"])
def test_what_the_lake_knows_of_a_source_is_of_this_source_only(tmp_path: Path, source: str) -> None:
    storage = Lake.create(str(tmp_path / "lake")).storage
    for name in (source, "other"):
        rows = [
            {
                "episode_uid": episode_uid(name, digest_of(i), ordinal),
                "source": name,
                "fingerprint": fingerprint(name, i, ordinal),
                "content_digest": digest_of(i),
                "ordinal": ordinal,
                "commit_id": "c",
            }
            for i in range(3)
            for ordinal in range(i + 1)
        ]
        merge_new(storage, "episodes", pa.Table.from_pylist(rows, EPISODES))
        sighted = {"fingerprint": fingerprint(name, "moved"), "source": name, "episode_uid": rows[0]["episode_uid"]}
        merge_new(storage, "sightings", pa.Table.from_pylist([sighted], SIGHTINGS))
        bad = {"episode_uid": quarantine_uid(name, "bad"), "source": name, "fingerprint": fingerprint(name, "bad")}
        merge_new(storage, "quarantine", pa.Table.from_pylist([bad], QUARANTINE))
    known = known_episodes(storage, source)
    assert len(known.uids) == 6
    assert len(known.fingerprints) == 7
    assert known.quarantined == {fingerprint(source, "bad")}
    for i in range(3):
        for ordinal in range(i + 1):
            uid = episode_uid(source, digest_of(i), ordinal)
            assert known.has_uid(uid)
            assert not known.has_uid(episode_uid("other", digest_of(i), ordinal))
            taken = np.zeros(6, bool)
            assert known.uids[known.match([fingerprint(source, i, ordinal)], taken)].tolist() == [uid.encode()]
            assert taken.sum() == 1
        assert sorted(ordinal for _, ordinal in known.equals(digest_of(i))) == list(range(i + 1))
    assert known.match([fingerprint("other", 0, 0), fingerprint(source, "new")], np.zeros(6, bool)).tolist() == [-1, -1]
    place = known.match([fingerprint(source, "moved")], np.zeros(6, bool))
    assert known.uids[place].tolist() == [episode_uid(source, digest_of(0), 0).encode()]
    assert known.equals(digest_of(9)) == []
