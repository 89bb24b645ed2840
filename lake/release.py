"""A release: versions of all tables, pinned together, that readers and trainers open."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from lance import BlobFile, LanceDataset

from lake.schema import FRAMES, frames_table
from lake.sketch import Sketch, merge
from lake.storage import Storage
from lake.tables import check_columns, open_table, quoted, take_rows, uid_array

if TYPE_CHECKING:
    import ray.data

_BATCH_ROWS = 256
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class Release:
    """One release of a lake. Everything it returns is the same for ever."""

    name: str
    id: str
    """Hash of the contents: two releases with one id hold the same episodes."""
    versions: dict[str, int]
    """Version of every table."""
    digests: dict[str, str]
    num_episodes: int
    num_frames: int
    created_at: Any
    storage: Storage = field(repr=False)

    def episodes(self, where: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the episodes, ordered by source and index within it.

        Args:
            where: SQL condition on the columns of ``episodes``.
            columns: names of columns; None means all.

        Raises:
            ValueError: an unknown column or a condition that cannot be parsed.
        """
        order = ["source", "source_index", "episode_uid"]
        asked = list(columns) if columns is not None else self._open("episodes").schema.names
        table = _scan(self._open("episodes"), where, [*asked, *(name for name in order if name not in asked)])
        return table.sort_by([(name, "ascending") for name in order]).select(asked)

    def frames(
        self,
        where: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        episodes: Sequence[str] | None = None,
        resolution: int | None = None,
    ) -> pa.Table:
        """Return frames as one table. For more than fits into memory use ``scan``.

        Args:
            where: SQL condition on the columns of ``frames``.
            columns: names of columns; None means all.
            episodes: episode uids, in the order wanted; None means all.
            resolution: longer side in pixels of a derived table; None means the one ingested.

        Raises:
            ValueError: an unknown column, a condition that cannot be parsed, or no such resolution.
            KeyError: no such episode in this release.
        """
        batches = list(self.scan(where, columns, episodes=episodes, resolution=resolution))
        schema = batches[0].schema if batches else _projected(columns)
        return pa.Table.from_batches(batches, schema)

    def scan(
        self,
        where: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        episodes: Sequence[str] | None = None,
        resolution: int | None = None,
        batch_rows: int = _BATCH_ROWS,
    ) -> Iterator[pa.RecordBatch]:
        """Yield frames as record batches, streaming; arguments as in ``frames``."""
        dataset = self._open("frames" if resolution is None else frames_table(resolution))
        ranges = self._ranges(resolution)
        if episodes is not None:
            yield from _read_ranges(dataset, ranges.of(episodes), where, columns, batch_rows)
            return
        scanner = _checked_scanner(dataset, where, columns, with_row_id=True, batch_size=batch_rows)
        for batch in scanner.to_batches():
            visible = ranges.contain(batch.column("_rowid").to_numpy())
            shown = batch if visible.all() else batch.filter(pa.array(visible))
            if shown.num_rows:
                yield shown.drop_columns(["_rowid"])

    def take_frames(
        self, rows: Sequence[int], columns: Sequence[str] | None = None, *, resolution: int | None = None
    ) -> pa.Table:
        """Return frames by their row ids, in the order given: ``frames_first_row`` of the episode plus the index.

        Raises:
            LakeDamagedError: a row is gone.
        """
        return take_rows(self._open("frames" if resolution is None else frames_table(resolution)), rows, columns)

    def first_rows(self, episodes: Sequence[str], *, resolution: int | None = None) -> npt.NDArray[np.int64]:
        """Return the row id of frame 0 of each episode [E], for ``take_frames`` at the same resolution.

        Raises:
            KeyError: no such episode in this release, or none of this resolution.
            ValueError: no such resolution.
        """
        self._open("frames" if resolution is None else frames_table(resolution))
        return np.array([first for first, _ in self._ranges(resolution).of(episodes)], np.int64)

    def dataset(
        self, where: str | None = None, columns: Sequence[str] | None = None, *, resolution: int | None = None
    ) -> "ray.data.Dataset":
        """Return the frames as a Ray Dataset; arguments as in ``frames``.

        Raises:
            ValueError: as for ``frames``, at once.
        """
        import ray.data

        table = "frames" if resolution is None else frames_table(resolution)
        dataset = self._open(table)
        _checked_scanner(dataset, where, columns)
        ranges = self._ranges(resolution)

        def visible(batch: pa.Table) -> pa.Table:
            rows = ranges.contain(batch.column("_rowid").to_numpy())
            return batch.filter(pa.array(rows)).drop_columns(["_rowid"])

        options: dict[str, Any] = {"with_row_id": True, "batch_size": _BATCH_ROWS}
        if where is not None:
            options["filter"] = where
        source = ray.data.read_lance(
            self.storage.table_uri(table),
            version=self.versions[table],
            # Without names Ray keeps the table's own columns only, so no row ids.
            columns=list(columns) if columns is not None else dataset.schema.names,
            storage_options=self.storage.lance_options(),
            scanner_options=options,
        )
        return source.map_batches(visible, batch_format="pyarrow", batch_size=None)

    def stats(self, *, split: str | None = "train") -> pa.Table:
        """Return the statistics of each feature, folded by source and embodiment.

        Every episode counts once, whatever was ingested or merged how often.

        Args:
            split: episodes of this split only; None means all.

        Returns:
            Rows of (source, embodiment, feature, count, mean, std, min, max, q01 ... q99),
            each statistic a list over the feature's dimensions.
        """
        rows = [
            {"source": source, "embodiment": embodiment, "feature": feature, **_statistics(sketch)}
            for (source, embodiment, feature), sketch in sorted(self.sketches(split=split).items())
        ]
        vector = pa.list_(pa.float64())
        names = ("mean", "std", "min", "max", *(f"q{round(q * 100):02d}" for q in _QUANTILES))
        schema = pa.schema(
            [(name, pa.string()) for name in ("source", "embodiment", "feature")]
            + [("count", pa.int64())]
            + [(name, vector) for name in names]
        )
        return pa.Table.from_pylist(rows, schema)

    def sketches(self, *, split: str | None = "train") -> dict[tuple[str, str, str], Sketch]:
        """Return mergeable statistics by (source, embodiment, feature)."""
        where = None if split is None else f"split = {quoted([split])}"
        episodes = self.episodes(where, ["source", "embodiment", "episode_uid", "stats_first_row", "stats_rows"])
        groups: dict[tuple[str, str, str], Sketch] = {}
        dataset = self._open("stats")
        for start in range(0, episodes.num_rows, _BATCH_ROWS):
            part = episodes.slice(start, _BATCH_ROWS).to_pylist()
            ids = [i for e in part for i in range(e["stats_first_row"], e["stats_first_row"] + e["stats_rows"])]
            of_uid = {e["episode_uid"]: (e["source"], e["embodiment"]) for e in part}
            gathered: dict[tuple[str, str, str], list[Sketch]] = {}
            for row in take_rows(dataset, ids, None).to_pylist():
                key = (*of_uid[row["episode_uid"]], row["feature"])
                gathered.setdefault(key, []).append(Sketch.from_columns(row))
            for key, sketches in gathered.items():
                groups[key] = merge([groups[key], *sketches] if key in groups else sketches)
        return groups

    def video(self, episode_uid: str, view: str) -> bytes:
        """Return one view of an episode as an mp4 file of the source's own packets.

        Raises:
            KeyError: no such episode or view in this release.
        """
        for row, blob in self.open_videos(episode_uid):
            with blob:
                if row["view"] == view:
                    return blob.readall()
        raise KeyError(f"episode {episode_uid} has no view {view!r} in release {self.name}")

    def open_videos(self, episode_uid: str) -> list[tuple[dict[str, Any], BlobFile]]:
        """Return each view's description and its mp4 file, open for reading, in the order of the views.

        The description has the columns of ``videos``; a file may show ``num_lead_frames``
        frames before the episode's first one, where the source's keyframes lie so.

        Raises:
            KeyError: no such episode in this release.
        """
        where = f"episode_uid IN ({quoted([episode_uid])})"
        found = _scan(self._open("episodes"), where, ["videos_first_row", "videos_rows"]).to_pylist()
        if not found:
            raise KeyError(f"release {self.name} has no episode {episode_uid}")
        ids = list(range(found[0]["videos_first_row"], found[0]["videos_first_row"] + found[0]["videos_rows"]))
        if not ids:
            return []
        dataset = self._open("videos")
        rows = take_rows(dataset, ids, [name for name in dataset.schema.names if name != "video"]).to_pylist()
        blobs = dataset.take_blobs("video", ids=ids)
        return [(row, blob) for row, blob in zip(rows, blobs, strict=True) if blob is not None]

    def _open(self, table: str) -> LanceDataset:
        if table not in self.versions:
            raise ValueError(f"release {self.name} has no table {table}; it has {', '.join(sorted(self.versions))}")
        if table not in self._datasets:
            self._datasets[table] = open_table(self.storage, table, self.versions[table])
        return self._datasets[table]

    def _ranges(self, resolution: int | None) -> "_Ranges":
        if resolution is None:
            return self._frame_ranges
        rows = _scan(self._open("derived"), f"resolution = {resolution}", ["episode_uid", "first_row", "rows"])
        visible = uid_array(self.episodes(columns=["episode_uid"]).column("episode_uid"))
        rows = rows.filter(pa.array(np.isin(uid_array(rows.column("episode_uid")), visible)))
        return _Ranges.of_columns(rows.column("episode_uid"), rows.column("first_row"), rows.column("rows"))

    @cached_property
    def _frame_ranges(self) -> "_Ranges":
        table = self.episodes(columns=["episode_uid", "frames_first_row", "frames_rows"])
        return _Ranges.of_columns(table.column(0), table.column(1), table.column(2))

    @cached_property
    def _datasets(self) -> dict[str, LanceDataset]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class _Ranges:
    """Row id ranges of episodes, sorted by their first row: what is visible."""

    uids: npt.NDArray[np.bytes_]
    first: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    @classmethod
    def of_columns(cls, uids: pa.ChunkedArray, first: pa.ChunkedArray, rows: pa.ChunkedArray) -> "_Ranges":
        starts = first.to_numpy().astype(np.int64)
        order = np.argsort(starts, kind="stable")
        return cls(uid_array(uids)[order], starts[order], rows.to_numpy().astype(np.int64)[order])

    def contain(self, row_ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Whether each row id belongs to an episode."""
        if not len(self.first):
            return np.zeros(len(row_ids), bool)
        ids = row_ids.astype(np.int64)
        at = np.searchsorted(self.first, ids, side="right") - 1
        return (at >= 0) & (ids < self.first[at] + self.rows[at])

    def of(self, uids: Sequence[str]) -> list[tuple[int, int]]:
        """Return (first row, rows) of each episode, in the order given."""
        where = {uid.decode(): i for i, uid in enumerate(self.uids.tolist())}
        missing = [uid for uid in uids if uid not in where]
        if missing:
            raise KeyError(f"no such episode: {', '.join(missing[:3])}")
        return [(int(self.first[where[uid]]), int(self.rows[where[uid]])) for uid in uids]


def _read_ranges(
    dataset: LanceDataset,
    ranges: list[tuple[int, int]],
    where: str | None,
    columns: Sequence[str] | None,
    batch_rows: int,
) -> Iterator[pa.RecordBatch]:
    if where is not None:
        raise ValueError("give `where` or `episodes`, not both")
    for first, rows in ranges:
        for start in range(first, first + rows, batch_rows):
            ids = list(range(start, min(start + batch_rows, first + rows)))
            yield from take_rows(dataset, ids, columns).to_batches()


def _checked_scanner(dataset: LanceDataset, where: str | None, columns: Sequence[str] | None, **options: Any) -> Any:
    check_columns(dataset, columns)
    try:
        scanner = dataset.scanner(columns=list(columns) if columns is not None else None, filter=where, **options)
        scanner.explain_plan()
    except (ValueError, OSError) as error:
        if where is None or isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"cannot understand where={where!r}: {str(error)[:300]}") from error
    return scanner


def _scan(dataset: LanceDataset, where: str | None, columns: Sequence[str] | None) -> pa.Table:
    return _checked_scanner(dataset, where, columns).to_table()


def _projected(columns: Sequence[str] | None) -> pa.Schema:
    return FRAMES if columns is None else pa.schema([FRAMES.field(name) for name in columns])


def _statistics(sketch: Sketch) -> dict[str, Any]:
    values = {"mean": sketch.mean, "std": sketch.std(), "min": sketch.min, "max": sketch.max}
    values |= {f"q{round(q * 100):02d}": sketch.quantile(q) for q in _QUANTILES}
    return {"count": sketch.count} | {name: value.tolist() for name, value in values.items()}
