"""What is to be ingested: a source's episodes less those that the lake knows."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ingest.source import EpisodeRef
from ingest.task import PlannedEpisode, Profile
from lake.commit import episode_uid
from lake.storage import Storage
from lake.tables import open_table, quoted, uid_array

MIN_TASK_FRAMES, MAX_TASK_FRAMES, TASKS_WANTED = 512, 4096, 64

REF_SCHEMA = pa.schema(
    [
        ("source_index", pa.int64()),
        ("num_frames", pa.int64()),
        ("fingerprint", pa.string()),
        ("locator", pa.string()),
    ]
)
"""An EpisodeRef as a row."""

PLAN_SCHEMA = pa.schema([("task", pa.int32()), ("content_digest", pa.string()), ("ordinal", pa.int32()), *REF_SCHEMA])
"""A planned episode as a row."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What the lake knows of a source, in a few bytes an episode."""

    fingerprints: npt.NDArray[np.bytes_]
    """Of ingested episodes, sorted: a match means unchanged."""
    uids: npt.NDArray[np.bytes_]
    """Of ingested episodes, sorted."""
    uid_of_fingerprint: npt.NDArray[np.bytes_]
    """The episode of each of ``fingerprints``."""
    digests: npt.NDArray[np.bytes_]
    """Content digests of ingested episodes, sorted."""
    digest_uids: npt.NDArray[np.bytes_]
    """The episode of each of ``digests``."""
    ordinals: npt.NDArray[np.int32]
    """Its ordinal among equals."""
    quarantined: frozenset[str]
    """Fingerprints of episodes in quarantine."""

    def match(self, fingerprints: list[str], taken: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Return the place in ``uids`` of the ingested episode with each fingerprint, -1 where there is none.

        Args:
            taken: by place in ``uids``, what was matched before, which is not matched again: equal episodes that
                change places are seen under each other's fingerprints. It is brought up to date.
        """
        values = np.array(fingerprints, "S32")
        places = np.full(len(values), -1, np.int64)
        first, end = (np.searchsorted(self.fingerprints, values, side) for side in ("left", "right"))
        hits = np.flatnonzero(first < end)
        found = self._places(self.uid_of_fingerprint[first[hits]])
        is_sure = np.zeros(len(hits), bool)
        is_sure[np.unique(found, return_index=True)[1]] = True
        is_sure[found >= 0] &= ~taken[found[found >= 0]]
        is_sure &= found >= 0
        places[hits[is_sure]] = found[is_sure]
        taken[found[is_sure]] = True
        for i in hits[~is_sure].tolist():
            candidates = self._places(self.uid_of_fingerprint[first[i] : end[i]]).tolist()
            free = [place for place in candidates if place >= 0 and not taken[place]]
            if free:
                places[i] = free[0]
                taken[free[0]] = True
        return places

    def _places(self, uids: npt.NDArray[np.bytes_]) -> npt.NDArray[np.int64]:
        """Return where ``uids`` has each of some uids; -1 where it has not: a sighting outlives its episode."""
        if not len(self.uids):
            return np.full(len(uids), -1, np.int64)
        at = np.minimum(np.searchsorted(self.uids, uids), len(self.uids) - 1)
        return np.where(self.uids[at] == uids, at, -1)

    def has_uid(self, uid: str) -> bool:
        """Whether an episode is ingested."""
        return _contains(self.uids, uid.encode())

    def equals(self, digest: str) -> list[tuple[bytes, int]]:
        """Return (uid, ordinal) of the ingested episodes with a content digest."""
        first, end = (np.searchsorted(self.digests, np.bytes_(digest.encode()), side) for side in ("left", "right"))
        return [(bytes(self.digest_uids[i]), int(self.ordinals[i])) for i in range(first, end)]


@dataclass(kw_only=True)
class Discovered:
    """A discovery so far."""

    total: int = 0
    skipped: int = 0
    quarantined: set[str] = field(default_factory=set[str])
    """Fingerprints that are in quarantine and still in the source."""
    matched: list[npt.NDArray[np.bytes_]] = field(default_factory=list[npt.NDArray[np.bytes_]])
    """Uids of ingested episodes that the source still shows unchanged."""

    def still_there(self) -> npt.NDArray[np.bytes_]:
        """Return ``matched`` sorted, as one array."""
        return np.sort(np.concatenate(self.matched)) if self.matched else np.zeros(0, "S32")


def known_episodes(storage: Storage, source_name: str) -> Known:
    """Read what the lake knows of a source."""
    where = f"source IN ({quoted([source_name])})"
    columns = ["fingerprint", "episode_uid", "content_digest", "ordinal"]
    episodes = open_table(storage, "episodes").to_table(columns=columns, filter=where)
    sightings = open_table(storage, "sightings").to_table(columns=["fingerprint", "episode_uid"], filter=where)
    quarantine = open_table(storage, "quarantine").to_table(columns=["fingerprint"], filter=where)
    uids = uid_array(episodes.column("episode_uid"))
    fingerprints = np.concatenate(
        [uid_array(episodes.column("fingerprint")), uid_array(sightings.column("fingerprint"))]
    )
    owners = np.concatenate([uids, uid_array(sightings.column("episode_uid"))])
    digests = uid_array(episodes.column("content_digest"))
    by_digest, by_fingerprint = np.argsort(digests), np.argsort(fingerprints)
    return Known(
        fingerprints=fingerprints[by_fingerprint],
        uid_of_fingerprint=owners[by_fingerprint],
        uids=np.sort(uids),
        digests=digests[by_digest],
        digest_uids=uids[by_digest],
        ordinals=episodes.column("ordinal").to_numpy().astype(np.int32)[by_digest],
        quarantined=frozenset(quarantine.column("fingerprint").to_pylist()),
    )


def new_refs(batches: Iterable[list[EpisodeRef]], known: Known, so_far: Discovered) -> Iterator[pa.Table]:
    """Yield the episodes that look new as rows of REF_SCHEMA; count the others in ``so_far``."""
    taken = np.zeros(len(known.uids), bool)
    for refs in batches:
        so_far.total += len(refs)
        places = known.match([ref.fingerprint for ref in refs], taken)
        so_far.matched.append(known.uids[places[places >= 0]])
        so_far.skipped += len(so_far.matched[-1])
        unmatched = [ref for ref, place in zip(refs, places.tolist(), strict=True) if place < 0]
        bad = {ref.fingerprint for ref in unmatched} & known.quarantined
        so_far.quarantined |= bad
        rows = [asdict(ref) for ref in unmatched if ref.fingerprint not in bad]
        if rows:
            yield pa.Table.from_pylist(rows, REF_SCHEMA)


def limited(batches: Iterable[list[EpisodeRef]], limit: int | None) -> Iterator[list[EpisodeRef]]:
    """Yield batches up to a number of episodes; None means all."""
    left = limit
    for refs in batches:
        if left is None:
            yield refs
        elif left > 0:
            yield refs[:left]
            left -= len(refs)
        else:
            return


@dataclass(frozen=True, kw_only=True)
class Identified:
    """The outcome of giving digested episodes their identity."""

    new: list[PlannedEpisode]
    sighted: list[tuple[str, str]]
    """(fingerprint, episode uid) of episodes that are ingested under another fingerprint."""


class Ordinals:
    """Counts equals, so that each of several episodes with the same contents has a uid of its own.

    An episode whose contents are in the lake takes the place of one that the source no
    longer shows elsewhere, so a renumbered source adds nothing; a copy of one that it
    still shows is an episode of its own.
    """

    def __init__(self, known: Known, still_there: npt.NDArray[np.bytes_]) -> None:
        self._known = known
        self._still_there = still_there
        self._taken: dict[bytes, tuple[int, ...]] = {}

    def next(self, digest: str) -> int:
        """Take and return the first free ordinal of a content digest."""
        key = bytes.fromhex(digest)
        if key not in self._taken:
            known = self._known.equals(digest)
            self._taken[key] = tuple(n for uid, n in known if _contains(self._still_there, uid))
        taken = self._taken[key]
        ordinal = next(n for n in range(len(taken) + 1) if n not in taken)
        self._taken[key] = (*taken, ordinal)
        return ordinal


def identify(
    digested: Iterable[tuple[EpisodeRef, str]], known: Known, ordinals: Ordinals, source_name: str
) -> Identified:
    """Give each digested episode its identity, and see which are new."""
    new: list[PlannedEpisode] = []
    sighted: list[tuple[str, str]] = []
    for ref, digest in sorted(digested, key=lambda pair: pair[0].source_index):
        ordinal = ordinals.next(digest)
        uid = episode_uid(source_name, digest, ordinal)
        if known.has_uid(uid):
            sighted.append((ref.fingerprint, uid))
        else:
            new.append(PlannedEpisode(ref=ref, content_digest=digest, ordinal=ordinal))
    return Identified(new=new, sighted=sighted)


def make_plan(episodes: list[PlannedEpisode]) -> pa.Table:
    """Group episodes into tasks: neighbours stay together, so that files are read once.

    Returns:
        Rows of PLAN_SCHEMA.
    """
    total = sum(episode.ref.num_frames for episode in episodes)
    target = min(MAX_TASK_FRAMES, max(MIN_TASK_FRAMES, total // TASKS_WANTED))
    rows: list[dict[str, object]] = []
    task = frames = 0
    for episode in episodes:
        if frames >= target:
            task, frames = task + 1, 0
        frames += max(1, episode.ref.num_frames)
        rows.append(
            {"task": task, "content_digest": episode.content_digest, "ordinal": episode.ordinal} | asdict(episode.ref)
        )
    return pa.Table.from_pylist(rows, PLAN_SCHEMA)


def tasks_of(plan: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """Yield (number, rows) of each task of a plan, or of a part of one."""
    tasks = plan.column("task").to_pylist()
    starts = [at for at in range(len(tasks)) if at == 0 or tasks[at] != tasks[at - 1]]
    for first, end in zip(starts, [*starts[1:], len(tasks)], strict=True):
        yield tasks[first], plan.slice(first, end - first)


def attempt_of(plan: pa.Table, profile: Profile, source_uri: str) -> str:
    """Return the name of a plan: the hash of what is to be done, the same for whoever plans it."""
    head = [profile.source_name, profile.resolution, profile.backend, list(profile.accept), source_uri]
    total = hashlib.sha256(json.dumps(head).encode())
    for name in PLAN_SCHEMA.names:
        total.update(json.dumps(plan.column(name).to_pylist()).encode())
    return total.hexdigest()[:24]


def refs_of(rows: pa.Table) -> list[EpisodeRef]:
    """Return the episodes of rows of REF_SCHEMA."""
    return [EpisodeRef(**row) for row in rows.select(REF_SCHEMA.names).to_pylist()]


def planned_episodes(rows: pa.Table) -> list[PlannedEpisode]:
    """Return the episodes of plan rows."""
    return [
        PlannedEpisode(ref=ref, content_digest=digest, ordinal=ordinal)
        for ref, digest, ordinal in zip(
            refs_of(rows), rows.column("content_digest").to_pylist(), rows.column("ordinal").to_pylist(), strict=True
        )
    ]


def _contains(ordered: npt.NDArray[np.bytes_], value: bytes) -> bool:
    at = int(np.searchsorted(ordered, np.bytes_(value)))
    return at < len(ordered) and bytes(ordered[at]) == value
