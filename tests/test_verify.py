"""Tests of lake/verify.py: damage is found, named and never released."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from lakes import make_sources, make_unreleased

from ingest.pipeline import check_new
from lake import Lake
from lake.errors import (
    LakeDamagedError,
)
from lake.tables import open_table


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def unreleased(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_unreleased(tmp_path_factory.mktemp("unreleased") / "lake", sources).uri)


@pytest.fixture
def fresh(unreleased: Path, tmp_path: Path) -> Lake:
    """A copy of the unreleased lake for one test."""
    shutil.copytree(unreleased, tmp_path / "lake")
    return Lake(str(tmp_path / "lake"))


def test_orphans_are_neither_damage_nor_visible(fresh: Lake) -> None:
    assert list(fresh.verify()) == []
    release = fresh.make_release()
    assert open_table(fresh.storage, "frames", release.versions["frames"]).count_rows() == release.num_frames + 12
    assert "f" * 32 not in release.frames(columns=["episode_uid"]).column(0).to_pylist()
    assert release.frames("state[1] = 9.0").num_rows == 0
    assert sum(batch.num_rows for batch in release.scan(columns=["frame_index"])) == release.num_frames


Damage = Callable[[Lake, str], object]


def delete(table: str, where: str) -> Damage:
    return lambda lake, uid: open_table(lake.storage, table).delete(f"episode_uid = '{uid}' AND {where}")


def files_of(lake: Lake, table: str, uid: str) -> Iterator[Path]:
    """Yield the data files that hold an episode's rows."""
    for fragment in open_table(lake.storage, table).get_fragments():
        if fragment.count_rows(f"episode_uid = '{uid}'"):
            for file in fragment.data_files():
                yield Path(lake.uri) / f"{table}.lance/data/{file.path}"


def remove_files(table: str) -> Damage:
    return lambda lake, uid: [file.unlink() for file in files_of(lake, table, uid)]


def halve_files(table: str) -> Damage:
    return lambda lake, uid: [
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) for file in files_of(lake, table, uid)
    ]


def change_bytes(table: str, needle: Callable[[Lake, str], bytes]) -> Damage:
    """Flip a byte of what a table stores of an episode."""

    def damage(lake: Lake, uid: str) -> None:
        wanted = needle(lake, uid)
        [file] = [file for file in files_of(lake, table, uid) if wanted in file.read_bytes()]
        content = bytearray(file.read_bytes())
        content[content.index(wanted) + len(wanted) // 2] ^= 0x55
        file.write_bytes(content)

    return damage


def video_bytes(lake: Lake, uid: str) -> bytes:
    blobs = open_table(lake.storage, "videos")
    rows = blobs.scanner(columns=["episode_uid"], with_row_id=True, filter=f"episode_uid = '{uid}'").to_table()
    with blobs.take_blobs("video", ids=rows.column("_rowid").to_pylist()[:1])[0] as blob:
        return blob.readall()


def jpeg_bytes(lake: Lake, uid: str) -> bytes:
    frames = open_table(lake.storage, "frames").to_table(columns=["views"], filter=f"episode_uid = '{uid}'")
    return frames.column(0)[4].as_py()[0]


def rewrite(**columns: Any) -> Damage:
    """Let the index say something else of an episode."""

    def damage(lake: Lake, uid: str) -> None:
        index = open_table(lake.storage, "episodes")
        [row] = index.to_table(filter=f"episode_uid = '{uid}'").to_pylist()
        index.delete(f"episode_uid = '{uid}'")
        changed = pa.Table.from_pylist([row | columns], index.schema)
        lance.write_dataset(changed, lake.storage.table_uri("episodes"), mode="append")

    return damage


LOST: list[tuple[str, str, str, Damage]] = [
    ("first frame", "frames", "1 of 13 rows are gone", delete("frames", "frame_index = 0")),
    ("frame in the middle", "frames", "1 of 13 rows are gone", delete("frames", "frame_index = 6")),
    ("last frame", "frames", "1 of 13 rows are gone", delete("frames", "frame_index = 12")),
    ("all frames", "frames", "13 of 13 rows are gone", delete("frames", "true")),
    ("a video", "videos", "1 of 2 rows are gone", delete("videos", "view = 'wrist'")),
    ("all videos", "videos", "2 of 2 rows are gone", delete("videos", "true")),
    ("a feature's statistics", "stats", "1 of 4 rows are gone", delete("stats", "feature = 'state'")),
    ("files of frames", "frames", "cannot be read: .*[Nn]ot found", remove_files("frames")),
    ("files of videos", "videos", "cannot be read: .*[Nn]ot found", remove_files("videos")),
    ("files of statistics", "stats", "cannot be read: .*[Nn]ot found", remove_files("stats")),
    ("half a file of frames", "frames", "cannot be read", halve_files("frames")),
    ("half a file of videos", "videos", "cannot be read", halve_files("videos")),
    ("index says a frame more", "frames", "13 rows for 14 frames", rewrite(num_frames=14)),
    ("index says a view more", "videos", "2 rows for 3 views", (
        rewrite(views=["side", "top", "wrist"])
    )),
    ("index names rows of others", "frames", "belongs to episode", (
        rewrite(frames_first_row=4)
    )),
    ("index names rows that never were", "frames", "13 of 13 rows are gone", (
        rewrite(frames_first_row=10**6)
    )),
]  # fmt: skip
ALTERED: list[tuple[str, str, str, Damage]] = [
    ("a byte of a video", "videos", "view top: checksum differs", change_bytes("videos", video_bytes)),
    ("a byte of a picture", "frames", "checksum .*, expected", change_bytes("frames", jpeg_bytes)),
    ("another checksum", "frames", "checksum .*, expected 000000000000", (
        rewrite(frames_sha256="0" * 64)
    )),
]  # fmt: skip


def victim_of(lake: Lake) -> str:
    """Return the uid of the episode that is to be damaged: the middle one of its source."""
    where = "source = 'toy' AND source_index = 1"
    return open_table(lake.storage, "episodes").to_table(columns=["episode_uid"], filter=where).column(0)[0].as_py()


def problems_of(lake: Lake, uid: str, *, contents: bool = True) -> str:
    """Return the problems; all must be of this episode, but that files are shared with its source's others."""
    problems = list(lake.verify(contents=contents))
    shared = open_table(lake.storage, "episodes").to_table(filter="source = 'toy'").column("episode_uid").to_pylist()
    assert {problem.episode_uid for problem in problems} <= {uid, *shared}
    return "\n".join(f"{p.table}: {p.message}" for p in problems if p.episode_uid == uid)


@pytest.mark.parametrize(("name", "table", "says", "damage"), LOST, ids=[case[0] for case in LOST])
def test_what_is_lost_is_found_and_never_released(
    fresh: Lake, name: str, table: str, says: str, damage: Damage
) -> None:
    uid = victim_of(fresh)
    damage(fresh, uid)
    for contents in (True, False):
        found = problems_of(fresh, uid, contents=contents)
        assert any(matches(line, table, says) for line in found.splitlines()), found
    with pytest.raises(LakeDamagedError, match=f"problems in {fresh.uri}, nothing is released: "):
        fresh.make_release()
    assert fresh.releases() == []


def matches(line: str, table: str, says: str) -> bool:
    return line.startswith(f"{table}: ") and re.search(says, line) is not None


@pytest.mark.parametrize(("name", "table", "says", "damage"), ALTERED, ids=[case[0] for case in ALTERED])
@pytest.mark.usefixtures("ray")
def test_what_is_altered_is_found_and_never_released(
    fresh: Lake, name: str, table: str, says: str, damage: Damage
) -> None:
    uid = victim_of(fresh)
    damage(fresh, uid)
    assert matches(problems_of(fresh, uid), table, says)
    assert list(fresh.verify(contents=False)) == []
    with pytest.raises(LakeDamagedError, match=f"1 episodes did not read back as written.*{uid} {table}: "):
        check_new(fresh)
    assert fresh.releases() == []
    assert uid not in fresh.make_release().episodes().column("episode_uid").to_pylist()
    assert list(fresh.verify()) == []
