"""Tests of ingest/plan.py."""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
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
    limited,
    make_plan,
    new_refs,
    planned_episodes,
    refs_of,
)
from ingest.source import EpisodeRef, fingerprint
from ingest.task import PlannedEpisode, Profile
from lake.commit import episode_uid

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
