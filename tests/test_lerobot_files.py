"""Tests of ingest/lerobot_files.py."""

import stat
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.lerobot_files import Destination, FileLimits, ParquetFiles, tasks_table


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_can_be_seen_before_the_commit(tmp_path: Path) -> None:
    destination = Destination(str(tmp_path / "deep" / "out"))
    destination.stage("meta/info.json").write_text("{}")
    destination.publish("meta/info.json")
    assert not (tmp_path / "deep" / "out").exists()
    destination.commit()
    assert (tmp_path / "deep" / "out" / "meta" / "info.json").read_text() == "{}"
    assert names(tmp_path / "deep") == ["out"]


def test_a_directory_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    destination = Destination(str(tmp_path / "out"))
    destination.stage("a").write_text("")
    destination.commit()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_a_discarded_dataset_leaves_nothing(tmp_path: Path) -> None:
    destination = Destination(str(tmp_path / "out"))
    destination.stage("a").write_text("")
    destination.publish("a")
    destination.discard()
    assert names(tmp_path) == []


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    destination = Destination(str(tmp_path / "out"))
    destination.stage("a").write_text("")
    destination.commit()
    assert names(tmp_path / "out") == ["a"]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("")
    for name in ("file", "folder"):
        with pytest.raises(ValueError, match="is not empty: remove what is there"):
            Destination(str(tmp_path / name))
    assert names(tmp_path) == ["file", "folder"]


def test_tables_go_to_files_and_chunks_of_limited_size(tmp_path: Path) -> None:
    limits = FileLimits(data_bytes=2500, files_per_chunk=2)
    destination = Destination(str(tmp_path / "out"))
    pattern = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    files = ParquetFiles(destination, pattern, schema=pa.schema([("x", pa.int64())]), limits=limits)
    tables = [pa.table({"x": range(100 * n, 100 * n + 100)}) for n in range(10)]
    places = [files.write(table) for table in tables]
    files.close()
    destination.commit()
    assert places[0] == (0, 0)
    assert len(set(places)) > 2
    assert places == sorted(places)
    for place in set(places):
        path = tmp_path / "out" / pattern.format(chunk_index=place[0], file_index=place[1])
        expected = [table for table, at in zip(tables, places, strict=True) if at == place]
        assert pq.read_table(path).equals(pa.concat_tables(expected))
        assert pq.ParquetFile(path).num_row_groups == len(expected)
        assert place[1] < 2


def test_pandas_finds_tasks_by_their_text() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(tasks_table({"open the drawer": 0, "close it": 1}), sink)
    tasks = pd.read_parquet(pa.BufferReader(sink.getvalue()))
    assert tasks.index.tolist() == ["open the drawer", "close it"]
    assert tasks.index.name == "task"
    assert tasks.loc["close it"].task_index == 1
    assert tasks.iloc[0].name == "open the drawer"
