"""A lake: create it, open it, list and make its releases."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from lake import staging
from lake.checksum import fold_digests
from lake.errors import (
    LakeDamagedError,
    LakeExistsError,
    LakeNotFoundError,
    LakeTooNewError,
    ReleaseExistsError,
    ReleaseNotFoundError,
)
from lake.failpoints import failpoint
from lake.release import Release
from lake.schema import FORMAT_VERSION, RELEASES, ROW_TABLES, TABLES
from lake.storage import open_storage
from lake.tables import create_table, delete_rows, merge_new, open_table, quoted, retried, uid_array
from lake.verify import INDEX_COLUMNS, Problem, check_contents, check_derived, check_index

MARKER = "lake.json"
_UNPINNED = ("releases", "sightings")


class Lake:
    """A lake at a URI.

    Args:
        uri: a path, ``file://`` or ``s3://BUCKET/PATH``; credentials come from the
            standard AWS environment alone.

    Raises:
        LakeNotFoundError: there is none; ``Lake.create`` makes one.
        LakeTooNewError: a newer robolake wrote it.
        StoreUnreachableError: the storage does not answer.
    """

    def __init__(self, uri: str) -> None:
        self.storage = open_storage(uri)
        marker = self.storage.read(MARKER)
        if marker is None:
            raise LakeNotFoundError(f"no lake at {uri}; make one with Lake.create({uri!r}), or check the URI")
        version = _format_version(marker, uri)
        if version > FORMAT_VERSION:
            raise LakeTooNewError(
                f"the lake at {uri} has format {version}; this robolake reads up to {FORMAT_VERSION}. Upgrade robolake."
            )

    @classmethod
    def create(cls, uri: str, *, exist_ok: bool = False) -> "Lake":
        """Make a lake; safe to repeat after a crash and to run twice at once.

        Args:
            exist_ok: open the lake that is there instead of raising.

        Raises:
            LakeExistsError: there is one.
            StoreUnsafeError: the store ignores conditional puts.
        """
        storage = open_storage(uri)
        if storage.read(MARKER) is not None:
            if exist_ok:
                return cls(uri)
            raise LakeExistsError(f"there is a lake at {uri} already")
        storage.probe()
        for table in TABLES:
            create_table(storage, table)
        failpoint("create.before_marker")
        marker = {"format_version": FORMAT_VERSION, "created_at": datetime.now(UTC).isoformat()}
        storage.put_if_absent(MARKER, json.dumps(marker).encode())
        return cls(uri)

    @property
    def uri(self) -> str:
        """Where the lake is."""
        return self.storage.uri

    def __repr__(self) -> str:
        return f"Lake({self.uri!r})"

    def releases(self) -> list[Release]:
        """Return all releases, the one of the oldest state first."""
        rows = open_table(self.storage, "releases").to_table().to_pylist()
        return [self._release(row) for row in sorted(rows, key=_age)]

    def release(self, name: str | None = None) -> Release:
        """Return a release by name; None means the newest.

        Raises:
            ReleaseNotFoundError: there is none of this name.
        """
        if name is None:
            releases = self.releases()
            if not releases:
                raise ReleaseNotFoundError(f"the lake at {self.uri} has no release yet; ingest something")
            return releases[-1]
        rows = open_table(self.storage, "releases").to_table(filter=f"name IN ({quoted([name])})").to_pylist()
        if not rows:
            names = ", ".join(release.name for release in self.releases()[-8:]) or "none"
            raise ReleaseNotFoundError(f"no release {name!r} in {self.uri}; the newest are: {names}")
        return self._release(rows[0])

    def quarantine(self) -> pa.Table:
        """Return the rejected episodes: source, source_index, reason, message."""
        columns = ["source", "source_index", "reason", "message"]
        return (
            open_table(self.storage, "quarantine")
            .to_table(columns=columns)
            .sort_by([("source", "ascending"), ("source_index", "ascending")])
        )

    def retry(self, source: str) -> int:
        """Take a source's episodes out of quarantine, so that the next ingest tries them again.

        Returns:
            How many.
        """
        where = f"source IN ({quoted([source])})"
        count = open_table(self.storage, "quarantine").count_rows(filter=where)
        delete_rows(self.storage, "quarantine", where)
        return count

    def make_release(self, name: str | None = None, *, note: str = "", episodes_version: int | None = None) -> Release:
        """Pin the present state as a release.

        The versions of all tables are pinned under a name made from the version of
        ``episodes``, so that two who release the same state make the same release.
        A given name is a second name for it.

        Args:
            episodes_version: release this version of the index, for one who has checked it;
                None means the newest.

        Raises:
            LakeDamagedError: the tables disagree with the index; nothing is released.
            ReleaseExistsError: the given name is taken by other contents.
        """
        release = self._release_of_now(note, episodes_version)
        return release if name is None else self.tag(name, release)

    def tag(self, name: str, release: Release) -> Release:
        """Give a release one more name.

        Raises:
            ReleaseExistsError: the name is taken by other contents.
            ValueError: not a name that tags can have.
        """
        _check_name(name)
        if name != release.name and re.fullmatch(r"r\d+(\.\d+)?", name):
            raise ValueError(f"release name {name!r}: the lake itself gives names of this form; take another")
        row = _row_of(release) | {"name": name, "created_at": datetime.now(UTC)}
        merge_new(self.storage, "releases", pa.Table.from_pylist([row], RELEASES))
        winner = self.release(name)
        if winner.id != release.id:
            raise ReleaseExistsError(f"release {name!r} exists and holds other contents ({winner.id} != {release.id})")
        for table, version in winner.versions.items():
            _tag(open_table(self.storage, table), name, version)
        return winner

    def verify(self, *, contents: bool = True) -> Iterator[Problem]:
        """Yield everything that is wrong with the newest state; nothing means that it is whole.

        Args:
            contents: read every byte and compare checksums, not only counts and borders.
        """
        tables = {table: open_table(self.storage, table) for table in ROW_TABLES}
        index = _index(open_table(self.storage, "episodes"))
        yield from _duplicates(index)
        yield from check_index(tables, index)
        if not contents:
            return
        for start in range(0, index.num_rows, 64):
            yield from check_contents(tables, index.slice(start, 64))
        rows = open_table(self.storage, "derived").to_table().to_pylist()
        for table in sorted({row["table"] for row in rows}):
            yield from check_derived(
                open_table(self.storage, table), table, [row for row in rows if row["table"] == table]
            )

    def unreleased(self, columns: list[str]) -> pa.Table:
        """Return the episodes that the newest release does not hold.

        Args:
            columns: of ``episodes``; ``episode_uid`` must be among them.
        """
        return self._unreleased(open_table(self.storage, "episodes").to_table(columns=columns))

    def cleanup(self, *, older_than: timedelta = timedelta(days=14)) -> dict[str, int]:
        """Remove old versions that no release pins, and staged files of old attempts.

        Args:
            older_than: must be longer than the longest job that reads or writes.

        Returns:
            Bytes removed and old versions removed, and staged files removed.
        """
        if older_than < timedelta(0):
            raise ValueError(f"older_than={older_than} is negative")
        removed = {"bytes": 0, "versions": 0, "staged": 0}
        for table in self._table_names():
            stats = open_table(self.storage, table).cleanup_old_versions(
                older_than=older_than, error_if_tagged_old_versions=False
            )
            removed["bytes"] += stats.bytes_removed
            removed["versions"] += stats.old_versions
        oldest = datetime.now(UTC).timestamp() - max(older_than.total_seconds(), staging.MAX_AGE_S)
        old = [path for path, changed in self.storage.files("_staging") if changed < oldest]
        self.storage.delete(old)
        return removed | {"staged": len(old)}

    def _release_of_now(self, note: str, episodes_version: int | None) -> Release:
        datasets = {"episodes": open_table(self.storage, "episodes", episodes_version)}
        # The index first: whatever it names was in the other tables before.
        datasets |= {t: open_table(self.storage, t) for t in self._table_names() if t not in (*_UNPINNED, "episodes")}
        summary = _summary(datasets)
        previous = self.releases()
        for release in reversed(previous):
            if release.id == summary.id and release.versions.keys() == datasets.keys():
                return release
        self._check_new(datasets)
        name = f"r{datasets['episodes'].version}"
        if datasets["derived"].count_rows():
            name += f".{datasets['derived'].version}"
        failpoint("release.before_tags")
        versions = {"episodes": _tag(datasets["episodes"], name, datasets["episodes"].version)}
        failpoint("release.after_first_tag")
        versions |= {table: _tag(datasets[table], name, datasets[table].version) for table in datasets}
        failpoint("release.after_tags")
        row = {
            "name": name,
            "id": summary.id,
            "created_at": datetime.now(UTC),
            "versions": list(versions.items()),
            "digests": list(summary.digests.items()),
            "num_episodes": summary.num_episodes,
            "num_frames": summary.num_frames,
            "note": note,
        }
        merge_new(self.storage, "releases", pa.Table.from_pylist([row], RELEASES))
        failpoint("release.after_row")
        return self.release(name)

    def _check_new(self, datasets: dict[str, lance.LanceDataset]) -> None:
        """Raise where the index names an episode that is not there as it says."""
        index = _index(datasets["episodes"])
        problems = [*_duplicates(index), *check_index(datasets, self._unreleased(index))]
        if problems:
            shown = "; ".join(f"{p.episode_uid} {p.table}: {p.message}" for p in problems[:5])
            raise LakeDamagedError(f"{len(problems)} problems in {self.uri}, nothing is released: {shown}")

    def _unreleased(self, episodes: pa.Table) -> pa.Table:
        releases = self.releases()
        if not releases:
            return episodes
        known = uid_array(releases[-1].episodes(columns=["episode_uid"]).column("episode_uid"))
        return episodes.filter(pa.array(~np.isin(uid_array(episodes.column("episode_uid")), known)))

    def _table_names(self) -> list[str]:
        derived = open_table(self.storage, "derived").to_table(columns=["table"]).column("table").unique().to_pylist()
        return [*TABLES, *sorted(derived)]

    def _release(self, row: dict[str, Any]) -> Release:
        return Release(
            name=row["name"],
            id=row["id"],
            versions=dict(row["versions"]),
            digests=dict(row["digests"]),
            num_episodes=row["num_episodes"],
            num_frames=row["num_frames"],
            created_at=row["created_at"],
            storage=self.storage,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Summary:
    id: str
    digests: dict[str, str]
    num_episodes: int
    num_frames: int


def _summary(datasets: dict[str, lance.LanceDataset]) -> _Summary:
    """Digest what is visible: the same for the same episodes, however they are laid out."""
    episodes = _index(datasets["episodes"], ["episode_uid", "num_frames", "frames_sha256", "content_digest"])
    columns = episodes.to_pydict()
    digests = {
        "episodes": fold_digests([hashlib.sha256(uid.encode()).hexdigest() for uid in columns["episode_uid"]]),
        "frames": fold_digests(columns["frames_sha256"]),
        "videos": fold_digests(columns["content_digest"]),
    }
    derived = datasets["derived"].to_table(columns=["key", "sha256"]).to_pydict()
    digests["derived"] = fold_digests(
        [
            hashlib.sha256(f"{key} {sha256}".encode()).hexdigest()
            for key, sha256 in zip(derived["key"], derived["sha256"], strict=True)
        ]
    )
    identity = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]
    return _Summary(id=identity, digests=digests, num_episodes=episodes.num_rows, num_frames=sum(columns["num_frames"]))


def _index(episodes: lance.LanceDataset, columns: list[str] = INDEX_COLUMNS) -> pa.Table:
    try:
        return episodes.to_table(columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise LakeDamagedError(f"{episodes.uri}: the index of episodes cannot be read: {str(error)[:300]}") from error


def _duplicates(index: pa.Table) -> Iterator[Problem]:
    counts = index.column("episode_uid").combine_chunks().value_counts()
    for entry in counts:
        if entry["counts"].as_py() > 1:
            yield Problem(entry["values"].as_py(), "episodes", f"is there {entry['counts']} times")


def _format_version(marker: bytes, uri: str) -> int:
    try:
        version = json.loads(marker)["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise LakeDamagedError(f"{uri}: {MARKER} is not what a lake's is: {marker[:100]!r}") from error
    if not isinstance(version, int):
        raise LakeDamagedError(f"{uri}: {MARKER} has format_version={version!r}, expected a number")
    return version


def _tag(dataset: lance.LanceDataset, name: str, version: int) -> int:
    """Tag a version unless the tag is there; return the version that the tag has."""

    def create() -> int:
        tags = dataset.tags.list()
        if name in tags:
            return tags[name]["version"]
        try:
            dataset.tags.create(name, version)
        except ValueError as error:
            if "already exists" not in str(error):
                raise
        return dataset.tags.list()[name]["version"]

    return retried(dataset.uri, create)


def _age(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what orders releases: the state that they show, so that a second name makes nothing new."""
    versions = dict(row["versions"])
    return versions["episodes"], versions["derived"], row["created_at"], row["name"]


def _row_of(release: Release) -> dict[str, Any]:
    return {
        "id": release.id,
        "versions": list(release.versions.items()),
        "digests": list(release.digests.items()),
        "num_episodes": release.num_episodes,
        "num_frames": release.num_frames,
        "note": f"second name of {release.name}",
    }


def _check_name(name: str) -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
    if not name or not set(name) <= allowed or name.startswith((".", "-")) or len(name) > 100:
        raise ValueError(f"release name {name!r}: use letters, digits, '-', '_' and '.', not first '.' or '-'")
