"""The committer: from staged results to episodes that exist, exactly once.

Rows go first, the index last. An episode exists from the moment its row is merged
into ``episodes``; that row names the stable row ids of everything it owns, so rows
that a dead task, a dead committer or a second committer left are never seen.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pyarrow as pa
from lance.fragment import FragmentMetadata

from lake import __version__
from lake.errors import CommitError
from lake.failpoints import failpoint
from lake.schema import EPISODES, QUARANTINE, ROW_TABLES
from lake.staging import EpisodeWrite, TaskResult
from lake.storage import Storage
from lake.tables import append_fragments, merge_new, open_table, quoted


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """What one commit made visible."""

    episodes: int
    frames: int
    quarantined: int


def commit(
    storage: Storage, source: str, results: list[TaskResult], wanted: Collection[str] | None = None
) -> Committed:
    """Make the episodes of staged results visible.

    Safe to repeat, to interrupt anywhere and to run twice at once.

    Args:
        wanted: episode uids to publish; None means all. Others stay unseen.

    Returns:
        What this call inserted; what another committer was first with is not counted.

    Raises:
        StoreError: the storage refused; run it again.
        CommitUnknownError: an outcome could not be found out; run it again.
        CommitError: staged files were cleaned away before their episodes were visible.
    """
    results = [r for r in results if r.rejected or _wanted(r, wanted)]
    failpoint("commit.before_frames")
    first_rows: dict[tuple[int, str], int] = {}
    for table in ROW_TABLES:
        first_rows |= _append(storage, table, [r for r in results if _wanted(r, wanted)])
        failpoint(f"commit.after_{table}")
    rows: list[dict[str, Any]] = []
    gone: list[str] = []
    for result in results:
        where = {t: first_rows[id(result), t] for t in result.writes if (id(result), t) in first_rows}
        if where.keys() == result.writes.keys():
            rows += [_episode_row(result, episode, where) for episode in _wanted(result, wanted)]
        else:
            gone += [episode.episode_uid for episode in _wanted(result, wanted)]
    _check_visible(storage, gone)
    mine = _merge_episodes(storage, rows) if rows else []
    failpoint("commit.after_episodes")
    bad = [_quarantine_row(source, result.attempt_id, r) for result in results for r in result.rejected]
    quarantined = merge_new(storage, "quarantine", pa.Table.from_pylist(bad, QUARANTINE)) if bad else 0
    failpoint("commit.after_quarantine")
    return Committed(episodes=len(mine), frames=sum(mine), quarantined=quarantined)


def quarantine_uid(source: str, fingerprint: str) -> str:
    """Return the key of a bad episode: it has no content to hash, so what was found there is."""
    return hashlib.sha256(f"quarantine\0{source}\0{fingerprint}".encode()).hexdigest()[:32]


def episode_uid(source: str, content_digest: str, ordinal: int) -> str:
    """Return an episode's identity: where from, what, and which among equals.

    The index within the source is not part of it, so a source that grows, shrinks
    or renumbers its episodes changes no identity.
    """
    return hashlib.sha256(f"episode\0{source}\0{content_digest}\0{ordinal}".encode()).hexdigest()[:32]


def _wanted(result: TaskResult, wanted: Collection[str] | None) -> list[EpisodeWrite]:
    return [e for e in result.episodes if wanted is None or e.episode_uid in wanted]


def _append(storage: Storage, table: str, results: list[TaskResult]) -> dict[tuple[int, str], int]:
    """Append the fragments of one table; return their first row ids by (result, table)."""
    written = [
        (r, r.writes[table], FragmentMetadata.from_json(r.writes[table].json)) for r in results if table in r.writes
    ]
    if not written:
        return {}
    properties = {"robolake.attempts": ",".join(sorted({r.attempt_id for r in results}))}
    base_version = min(write.base_version for _, write, _ in written)
    found = append_fragments(storage, table, [f for _, _, f in written], base_version, properties)
    paths = [(result, fragment.files[0].path) for result, _, fragment in written]
    return {(id(result), table): found[path] for result, path in paths if path in found}


def _check_visible(storage: Storage, uids: list[str]) -> None:
    """Raise unless these episodes, whose staged files are gone, were made visible before.

    Raises:
        CommitError: some were not.
    """
    where = f"episode_uid IN ({quoted(uids)})"
    visible = open_table(storage, "episodes").count_rows(filter=where) if uids else 0
    if visible < len(set(uids)):
        raise CommitError(
            f"{storage.uri}: the staged files of {len(set(uids)) - visible} episodes were cleaned away before they "
            "were committed; run it again to decode them anew, and clean up with a longer --older-than-days"
        )


def _merge_episodes(storage: Storage, rows: list[dict[str, Any]]) -> list[int]:
    """Insert the episodes that are new; return the number of frames of each one inserted here."""
    commit_id = uuid4().hex
    table = pa.Table.from_pylist([row | {"commit_id": commit_id} for row in rows], EPISODES)
    if merge_new(storage, "episodes", table) == len(rows):
        return [row["num_frames"] for row in rows]
    # Somebody else was first with some, or a reply was lost: the table knows.
    mine = open_table(storage, "episodes").to_table(columns=["num_frames"], filter=f"commit_id = '{commit_id}'")
    return mine.column("num_frames").to_pylist()


def _episode_row(result: TaskResult, episode: EpisodeWrite, first_rows: dict[str, int]) -> dict[str, Any]:
    row = dict(episode.row)
    for table, (offset, num_rows) in episode.ranges.items():
        row[f"{table}_first_row"] = first_rows[table] + offset if num_rows else 0
        row[f"{table}_rows"] = num_rows
    return row | {
        "episode_uid": episode.episode_uid,
        "attempt_id": result.attempt_id,
        "writer": f"robolake {__version__}",
        "ingested_at": datetime.now(UTC),
    }


def _quarantine_row(source: str, attempt_id: str, rejected: Any) -> dict[str, Any]:
    return {
        "episode_uid": quarantine_uid(source, rejected.fingerprint),
        "source": source,
        "source_index": rejected.source_index,
        "reason": rejected.reason,
        "message": rejected.message,
        "fingerprint": rejected.fingerprint,
        "attempt_id": attempt_id,
        "quarantined_at": datetime.now(UTC),
    }
