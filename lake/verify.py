"""Checks that the tables hold what the index of episodes says."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from lance import LanceDataset

from lake.checksum import FramesDigest
from lake.errors import LakeDamagedError

_BATCH = 512
_CHUNK_BYTES = 1 << 20

INDEX_COLUMNS = [
    "episode_uid",
    "num_frames",
    "views",
    "frames_first_row",
    "frames_rows",
    "videos_first_row",
    "videos_rows",
    "stats_first_row",
    "stats_rows",
    "frames_sha256",
]
"""The columns of ``episodes`` that the checks need."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One disagreement."""

    episode_uid: str
    table: str
    message: str


def check_index(tables: dict[str, LanceDataset], episodes: pa.Table) -> Iterator[Problem]:
    """Yield disagreements of counts and range borders; reads row ids, and a few narrow rows an episode.

    Args:
        tables: frames, videos and stats, open.
        episodes: rows with INDEX_COLUMNS.
    """
    columns = {"frames": ["episode_uid", "frame_index"], "videos": ["episode_uid"], "stats": ["episode_uid"]}
    for table in columns:
        yield from _check_counts(tables[table], table, episodes)
    for start in range(0, episodes.num_rows, _BATCH):
        rows = episodes.slice(start, _BATCH).to_pylist()
        for row in rows:
            uid = row["episode_uid"]
            if row["frames_rows"] != row["num_frames"]:
                yield Problem(uid, "frames", f"{row['frames_rows']} rows for {row['num_frames']} frames")
            if row["videos_rows"] != len(row["views"]):
                yield Problem(uid, "videos", f"{row['videos_rows']} rows for {len(row['views'])} views")
        for table, names in columns.items():
            yield from _readable(tables[table], table, rows, names)


def check_contents(tables: dict[str, LanceDataset], episodes: pa.Table) -> Iterator[Problem]:
    """Yield disagreements of checksums; reads every byte of the episodes.

    Args:
        tables: frames, videos and stats, open.
        episodes: rows with INDEX_COLUMNS.
    """
    for row in episodes.select(INDEX_COLUMNS).to_pylist():
        uid = row["episode_uid"]
        try:
            found = frames_checksum(tables["frames"], row["frames_first_row"], row["frames_rows"])
            if found != row["frames_sha256"]:
                yield Problem(uid, "frames", f"checksum {found[:12]}, expected {row['frames_sha256'][:12]}")
        except (LakeDamagedError, OSError, RuntimeError) as error:
            yield Problem(uid, "frames", f"cannot be read: {_brief(error)}")
        for table, check in (("videos", _check_videos), ("stats", _check_stats)):
            try:
                yield from check(tables[table], row)
            except (OSError, RuntimeError) as error:
                yield Problem(uid, table, f"cannot be read: {_brief(error)}")


def check_derived(dataset: LanceDataset, table: str, rows: Sequence[dict[str, Any]]) -> Iterator[Problem]:
    """Yield disagreements of a table of derived frames with its rows of ``derived``; reads every byte."""
    for row in rows:
        try:
            found = frames_checksum(dataset, row["first_row"], row["rows"])
            if found != row["sha256"]:
                yield Problem(row["episode_uid"], table, f"checksum {found[:12]}, expected {row['sha256'][:12]}")
        except (LakeDamagedError, OSError, RuntimeError) as error:
            yield Problem(row["episode_uid"], table, f"cannot be read: {_brief(error)}")


def frames_checksum(dataset: LanceDataset, first_row: int, num_rows: int) -> str:
    """Return the checksum of a range of frames.

    Raises:
        LakeDamagedError: rows of the range are gone.
    """
    digest = FramesDigest()
    for start in range(first_row, first_row + num_rows, _BATCH):
        ids = list(range(start, min(start + _BATCH, first_row + num_rows)))
        for batch in _rows(dataset, ids, None).to_batches():
            digest.update(batch)
    if digest.num_frames != num_rows:
        raise LakeDamagedError(f"{dataset.uri}: {num_rows - digest.num_frames} of {num_rows} rows are gone")
    return digest.hexdigest()


def _check_counts(dataset: LanceDataset, table: str, episodes: pa.Table) -> Iterator[Problem]:
    """Yield episodes of which rows are gone; row ids stand in the table's own metadata, so this reads no data."""
    if not episodes.num_rows:
        return
    first, rows = (episodes.column(f"{table}_{name}").to_numpy() for name in ("first_row", "rows"))
    order = np.argsort(first, kind="stable")
    first, rows = first[order], rows[order]
    there = np.zeros(len(first), np.int64)
    for batch in dataset.scanner(columns=[], with_row_id=True).to_batches():
        ids = batch.column("_rowid").to_numpy().astype(np.int64)
        at = np.searchsorted(first, ids, side="right") - 1
        at = at[(at >= 0) & (ids < first[at] + rows[at])]
        there += np.bincount(at, minlength=len(first))
    for i in np.flatnonzero(there < rows).tolist():
        uid = episodes.column("episode_uid")[int(order[i])].as_py()
        yield Problem(uid, table, f"{rows[i] - there[i]} of {rows[i]} rows are gone")


def _readable(
    dataset: LanceDataset, table: str, rows: Sequence[dict[str, Any]], columns: list[str]
) -> Iterator[Problem]:
    """Check borders of many episodes at once, or one by one where some cannot be read."""
    try:
        yield from list(_check_borders(dataset, table, rows, columns))
    except (OSError, RuntimeError) as error:
        if len(rows) == 1:
            yield Problem(rows[0]["episode_uid"], table, f"cannot be read: {_brief(error)}")
        else:
            for row in rows:
                yield from _readable(dataset, table, [row], columns)


def _check_borders(
    dataset: LanceDataset, table: str, rows: Sequence[dict[str, Any]], columns: list[str]
) -> Iterator[Problem]:
    wanted: list[tuple[dict[str, Any], int, int]] = []
    for row in rows:
        first, count = row[f"{table}_first_row"], row[f"{table}_rows"]
        if count:
            wanted += [(row, first, 0), (row, first + count - 1, count - 1)]
    ids = sorted({row_id for _, row_id, _ in wanted})
    found = _rows(dataset, ids, columns)
    by_id: dict[int, dict[str, Any]] = {}
    if found.num_rows == len(ids):
        by_id = dict(zip(ids, found.to_pylist(), strict=True))
    else:  # Some are gone: find out which.
        for row_id in ids:
            single = _rows(dataset, [row_id], columns).to_pylist()
            if single:
                by_id[row_id] = single[0]
    for row, row_id, index in wanted:
        uid, there = row["episode_uid"], by_id.get(row_id)
        if there is None:
            yield Problem(uid, table, f"row {row_id} is gone")
        elif there["episode_uid"] != uid:
            yield Problem(uid, table, f"row {row_id} belongs to episode {there['episode_uid']}")
        elif there.get("frame_index", index) != index:
            yield Problem(uid, table, f"row {row_id} is frame {there['frame_index']}, expected {index}")


def _check_videos(dataset: LanceDataset, row: dict[str, Any]) -> Iterator[Problem]:
    ids = list(range(row["videos_first_row"], row["videos_first_row"] + row["videos_rows"]))
    described = _rows(dataset, ids, ["view", "sha256", "num_bytes"]).to_pylist()
    if [d["view"] for d in described] != row["views"]:
        yield Problem(row["episode_uid"], "videos", f"views {[d['view'] for d in described]}, expected {row['views']}")
    if len(described) != len(ids):
        return
    for blob, description in zip(dataset.take_blobs("video", ids=ids) if ids else [], described, strict=True):
        assert blob is not None
        sha256 = hashlib.sha256()
        with blob:
            while chunk := blob.read(_CHUNK_BYTES):
                sha256.update(chunk)
        if sha256.hexdigest() != description["sha256"]:
            yield Problem(row["episode_uid"], "videos", f"view {description['view']}: checksum differs")


def _check_stats(dataset: LanceDataset, row: dict[str, Any]) -> Iterator[Problem]:
    ids = list(range(row["stats_first_row"], row["stats_first_row"] + row["stats_rows"]))
    for stat in _rows(dataset, ids, ["feature", "count"]).to_pylist():
        if stat["feature"] in ("state", "action") and stat["count"] != row["num_frames"]:
            message = f"{stat['feature']}: counted {stat['count']} frames of {row['num_frames']}"
            yield Problem(row["episode_uid"], "stats", message)


def _rows(dataset: LanceDataset, ids: list[int], columns: list[str] | None) -> pa.Table:
    """Return those of the rows that exist, in the order given."""
    if not ids:
        names = columns or dataset.schema.names
        return pa.schema([dataset.schema.field(name) for name in names]).empty_table()
    return dataset._take_rows(ids, columns=columns)  # noqa: SLF001


def _brief(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200]
