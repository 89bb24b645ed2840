"""Ingestion on Ray Data: discover, digest, plan, decode, commit, check, release."""

import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

from ingest.formats import format_of
from ingest.parallel import blocks_of, groups_of, rows_of
from ingest.plan import (
    REF_SCHEMA,
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
    tasks_of,
)
from ingest.source import EpisodeRef, Source
from ingest.task import Profile, digest_episode, write_task
from lake import Lake, Release
from lake.commit import Committed, commit, episode_uid, quarantine_uid
from lake.errors import EpisodeError, LakeDamagedError, SourceTooBadError
from lake.failpoints import failpoint
from lake.schema import ROW_TABLES, SIGHTINGS
from lake.staging import (
    Rejected,
    TaskResult,
    close_attempt,
    forget_attempt,
    is_closed,
    open_attempts,
    open_results,
    put_plan,
)
from lake.storage import Storage
from lake.tables import delete_rows, merge_new, open_table, quoted
from lake.verify import INDEX_COLUMNS, check_contents

WAVE_EPISODES = 16_384
"""Episodes that are planned together; a larger source takes several waves."""
BLOCK_EPISODES = 64
"""Episodes that one task digests or checks."""
GROUP_FRAMES = 8192
"""One Ray task executes about so many frames' worth of tasks in a row, at most."""
COMMIT_TASKS, COMMIT_SECONDS = 32, 20.0
"""A commit follows after so many tasks, or so many seconds with at least one."""

log = logging.getLogger("robolake.ingest")


@dataclass(kw_only=True)
class Progress:
    """What an ingestion has done so far; ``say`` is called when it changes."""

    say: Callable[["Progress"], None]
    phase: str = "discover"
    discovered: int = 0
    skipped: int = 0
    digested: int = 0
    planned_frames: int = 0
    committed: int = 0
    frames: int = 0
    quarantined: int = 0
    quarantined_new: int = 0
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def enter(self, phase: str) -> None:
        """Begin a phase; the time since the last change counts for the one before."""
        now = time.perf_counter()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
        self._since = now
        self.phase = phase
        self.say(self)

    def __post_init__(self) -> None:
        self._since = time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When an ingestion stops."""

    max_bad_fraction: float = 0.5
    episodes: int | None = None
    """Take only the first so many episodes of the source; None means all."""


def ingest(lake: Lake, source: Source, profile: Profile, limits: Limits, progress: Progress) -> Release | None:
    """Bring everything new in a source into a lake, each episode exactly once, and release it.

    Returns:
        The release that holds it; None where the lake is still empty.

    Raises:
        SourceError: the source as a whole cannot be ingested, or too much of it is bad.
        StoreError: the storage failed; run it again, nothing is lost or doubled.
        LakeDamagedError: what was written does not read back as it was.
    """
    storage, name = lake.storage, profile.source_name
    known = known_episodes(storage, name)
    so_far = Discovered()
    found = list(new_refs(limited(format_of(source).discover(source), limits.episodes), known, so_far))
    refs = pa.concat_tables(found) if found else REF_SCHEMA.empty_table()
    progress.discovered, progress.skipped = so_far.total, so_far.skipped
    progress.quarantined = len(so_far.quarantined)
    progress.planned_frames = int(refs.column("num_frames").to_numpy().sum())
    run = _Run(lake=lake, source=source, profile=profile, limits=limits, progress=progress)
    run.attempts |= open_attempts(storage, name)
    ordinals = Ordinals(known, so_far.still_there())
    for start in range(0, refs.num_rows, WAVE_EPISODES):
        run.wave(refs.slice(start, WAVE_EPISODES), known, ordinals)
    if limits.episodes is None:
        _heal(storage, name, known, so_far)
    run.check_bad()
    progress.enter("check")
    checked = check_new(lake)
    progress.enter("release")
    is_empty = open_table(storage, "episodes", checked).count_rows() == 0
    release = None if is_empty else lake.make_release(episodes_version=checked)
    failpoint("plan.before_close")
    for attempt_id in run.attempts:
        close_attempt(storage, name, attempt_id)
    progress.enter("done")
    return release


@dataclass(kw_only=True)
class _Run:
    """One ingestion of one source."""

    lake: Lake
    source: Source
    profile: Profile
    limits: Limits
    progress: Progress
    attempts: set[str] = field(default_factory=set[str])

    def wave(self, refs: pa.Table, known: Known, ordinals: Ordinals) -> None:
        """Take some thousands of new-looking episodes from their files into the lake."""
        storage, name = self.lake.storage, self.profile.source_name
        self.progress.enter("digest")
        identified = identify(self._digest(refs), known, ordinals, name)
        self.check_bad()
        self.progress.skipped += len(identified.sighted)
        _remember(storage, name, identified.sighted)
        new = {episode_uid(name, e.content_digest, e.ordinal): e for e in identified.new}
        self.progress.enter("recover")
        done = self._recover(new.keys())
        rest = [episode for uid, episode in new.items() if uid not in done]
        self.progress.enter("decode")
        if rest:
            self.attempts.add(self._decode(make_plan(rest)))

    def _digest(self, refs: pa.Table) -> Iterator[tuple[EpisodeRef, str]]:
        """Yield the content digests of good episodes; put the bad ones into quarantine."""
        source = self.source

        def digest(block: pa.Table) -> pa.Table:
            return pa.Table.from_pylist([_digested(source, ref) for ref in refs_of(block)], _DIGESTED)

        by_index = {ref.source_index: ref for ref in refs_of(refs)}
        rejected: list[Rejected] = []
        for row in rows_of(blocks_of(refs, BLOCK_EPISODES), digest, "DigestEpisodes"):
            ref = by_index[row["source_index"]]
            self.progress.digested += 1
            if row["digest"] is not None:
                yield ref, row["digest"]
            else:
                rejected.append(
                    Rejected(
                        source_index=ref.source_index,
                        fingerprint=ref.fingerprint,
                        reason=row["reason"],
                        message=row["message"],
                    )
                )
            self.progress.say(self.progress)
        if rejected:
            result = TaskResult(attempt_id="digest", task=0, created_at=time.time(), rejected=tuple(rejected))
            self._commit([result])

    def _recover(self, wanted: Collection[str]) -> set[str]:
        """Commit what earlier attempts staged of the wanted episodes; return their uids."""
        # Their bad episodes are not taken: they may be mended, or accepted, by now, and are few.
        results = [
            replace(result, rejected=())
            for result in open_results(self.lake.storage, self.profile.source_name)
            if any(episode.episode_uid in wanted for episode in result.episodes)
            and all(episode.row["resolution"] == self.profile.resolution for episode in result.episodes)
        ]
        if results:
            log.info("committing what %d tasks of an earlier run left", len(results))
            self._commit(results, wanted)
        return {e.episode_uid for result in results for e in result.episodes if e.episode_uid in wanted}

    def _decode(self, plan: pa.Table) -> str:
        """Execute a plan: decode its tasks on the cluster and commit as they finish."""
        storage, source, profile = self.lake.storage, self.source, self.profile
        attempt_id = attempt_of(plan, profile, source.files.uri)
        if is_closed(storage, profile.source_name, attempt_id):
            # All that was good in it is committed: what was bad then is to be tried again, not looked up.
            forget_attempt(storage, profile.source_name, attempt_id)
        failpoint("plan.before_put")
        put_plan(storage, profile.source_name, attempt_id, plan)
        failpoint("plan.after_put")

        def decode(block: pa.Table) -> pa.Table:
            results = [
                write_task(storage, source, profile, attempt_id, task, planned_episodes(rows))
                for task, rows in tasks_of(block)
            ]
            return pa.table({"result": [result.to_json() for result in results]})

        tasks = [rows for _, rows in tasks_of(plan)]
        most = max(1, GROUP_FRAMES * len(tasks) // max(1, sum(plan.column("num_frames").to_pylist())))
        blocks = [pa.concat_tables(tasks[first:end]) for first, end in groups_of(len(tasks), most)]
        waiting: list[TaskResult] = []
        since = time.monotonic()
        for row in rows_of(blocks, decode, "DecodeEpisodes"):
            waiting.append(TaskResult.from_json(row["result"]))
            if len(waiting) >= COMMIT_TASKS or time.monotonic() - since > COMMIT_SECONDS:
                self._commit(waiting)
                waiting, since = [], time.monotonic()
        if waiting:
            self._commit(waiting)
        return attempt_id

    def check_bad(self) -> None:
        """Raise where too many episodes are bad."""
        bad, total = self.progress.quarantined, self.progress.discovered
        if total and bad / total > self.limits.max_bad_fraction:
            counts = _reasons(self.lake.storage, self.profile.source_name)
            raise SourceTooBadError(
                f"{bad} of {total} episodes of {self.source.files.uri} are bad ({counts}), more than "
                f"max_bad_fraction={self.limits.max_bad_fraction:g} allows. See `python -m lake quarantine "
                f"{self.lake.uri}`; mend the source, or raise --max-bad-fraction."
            )

    def _commit(self, results: list[TaskResult], wanted: Collection[str] | None = None) -> None:
        done: Committed = commit(self.lake.storage, self.profile.source_name, results, wanted)
        self.progress.committed += done.episodes
        self.progress.frames += done.frames
        self.progress.quarantined += sum(len(result.rejected) for result in results)
        self.progress.quarantined_new += done.quarantined
        self.progress.say(self.progress)
        self.check_bad()


def check_new(lake: Lake) -> int:
    """Read back every episode that no release holds yet and compare checksums.

    Those that differ are taken out of the index and what was staged with them is
    forgotten, so that the next ingest writes them anew; no release has ever shown them.

    Returns:
        The version of ``episodes`` that was checked. Others may have committed more since.

    Raises:
        LakeDamagedError: something differs.
    """
    storage = lake.storage
    checked = open_table(storage, "episodes").version
    index = lake.unreleased([*INDEX_COLUMNS, "source", "attempt_id"])
    versions = {table: open_table(storage, table).version for table in ROW_TABLES}

    def check(block: pa.Table) -> pa.Table:
        tables = {table: open_table(storage, table, version) for table, version in versions.items()}
        problems = [asdict(problem) for problem in check_contents(tables, block)]
        return pa.Table.from_pylist(problems, _PROBLEM)

    problems: list[dict[str, Any]] = []
    bad: set[str] = set()
    for _ in range(2):  # What could not be read for a moment is not damaged: look twice.
        problems = list(rows_of(blocks_of(index, BLOCK_EPISODES), check, "CheckEpisodes")) if index.num_rows else []
        bad = {problem["episode_uid"] for problem in problems}
        index = index.filter(pa.array([uid in bad for uid in index.column("episode_uid").to_pylist()], pa.bool_()))
    if problems:
        for source, attempt_id in {(row["source"], row["attempt_id"]) for row in index.to_pylist()}:
            forget_attempt(storage, source, attempt_id)
        delete_rows(storage, "episodes", f"episode_uid IN ({quoted(sorted(bad))})")
        shown = "; ".join(f"{p['episode_uid']} {p['table']}: {p['message']}" for p in problems[:5])
        raise LakeDamagedError(
            f"{len(bad)} episodes did not read back as written and were taken out again; nothing is released. "
            f"Check the storage and ingest again: {shown}"
        )
    return checked


_PROBLEM = pa.schema([("episode_uid", pa.string()), ("table", pa.string()), ("message", pa.string())])

_DIGESTED = pa.schema(
    [("source_index", pa.int64()), ("digest", pa.string()), ("reason", pa.string()), ("message", pa.string())]
)


def _digested(source: Source, ref: EpisodeRef) -> dict[str, Any]:
    try:
        return {"source_index": ref.source_index, "digest": digest_episode(source, ref)}
    except EpisodeError as error:
        return {"source_index": ref.source_index, "reason": error.reason, "message": error.message}


def _remember(storage: Storage, name: str, sighted: list[tuple[str, str]]) -> None:
    """Note under which new fingerprints known episodes were seen, so that they are not read again."""
    if sighted:
        rows = [{"fingerprint": fingerprint, "source": name, "episode_uid": uid} for fingerprint, uid in sighted]
        merge_new(storage, "sightings", pa.Table.from_pylist(rows, SIGHTINGS))


def _heal(storage: Storage, name: str, known: Known, so_far: Discovered) -> None:
    """Take out of quarantine what the source no longer holds in that state."""
    gone = known.quarantined - so_far.quarantined
    if gone:
        uids = quoted(quarantine_uid(name, fingerprint) for fingerprint in sorted(gone))
        delete_rows(storage, "quarantine", f"episode_uid IN ({uids})")


def _reasons(storage: Storage, name: str) -> str:
    where = f"source IN ({quoted([name])})"
    counts = open_table(storage, "quarantine").to_table(columns=["reason"], filter=where).column(0).value_counts()
    return ", ".join(f"{entry['counts']} {entry['values']}" for entry in counts)
