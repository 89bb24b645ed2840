"""A lake through any history of ingests, deaths and maintenance, beside a model of what it must hold."""

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from staged import Death, darken, dying_at
from support import DATA, VIDEO, Made, make_v21, write_episode, write_meta

import ingest.pipeline
import ingest.plan
from ingest.features import parse_map
from ingest.files import open_files
from ingest.formats import format_of, open_source
from ingest.pipeline import Limits, Progress
from ingest.task import Profile, digest_episode
from lake import Lake, Release
from lake.errors import ReleaseExistsError
from lake.failpoints import FAILPOINTS
from lake.schema import TABLES
from lake.tables import open_table

LENGTHS = [8, 9, 10, 11]
"""Frames of each content."""
REASONS = {"dark": "black-video", "gone": "video-missing"}
ON_THE_WAY = [name for name in FAILPOINTS if not name.startswith("create.")]


@dataclass(frozen=True)
class Listed:
    """An episode as the source shows it."""

    content: int
    flaw: str | None = None
    copy: int = 0
    """Which copy of the files: another one looks new until it is read."""


LISTED = st.builds(
    Listed,
    content=st.integers(0, len(LENGTHS) - 1),
    flaw=st.sampled_from([None, None, None, "dark", "gone"]),
    copy=st.integers(0, 1),
)
LISTING = st.lists(LISTED, min_size=1, max_size=5)


@cache
def home() -> Path:
    """Return the folder of this process's machines, which live one after another."""
    folder = Path(tempfile.mkdtemp(prefix="robolake-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def made(content: int) -> Made:
    return Made(seed=content, num_frames=LENGTHS[content])


@cache
def dark_video(content: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / VIDEO.format("top", 0)
        path.parent.mkdir(parents=True)
        darken(Path(folder), 0, num_frames=LENGTHS[content])
        return path.read_bytes()


@cache
def facts() -> tuple[dict[str, int], list[np.ndarray]]:
    """Return the content of each content digest, and the states of each content."""
    with tempfile.TemporaryDirectory() as folder:
        toy = make_v21(Path(folder), [made(i) for i in range(len(LENGTHS))])
        source = open_source(open_files(str(toy)), parse_map(()))
        refs = [ref for batch in format_of(source).discover(source) for ref in batch]
        digests = {digest_episode(source, ref): i for i, ref in enumerate(refs)}
        return digests, [format_of(source).read_episode(source, ref).state for ref in refs]


def rows_here(blocks: list[pa.Table], function: Callable[[pa.Table], pa.Table], _: str) -> Iterator[dict[str, Any]]:
    """Do what ``rows_of`` does on a cluster, in this process: a death of a task is then the death of the job."""
    for block in blocks:
        yield from function(block).to_pylist()


def blocks_here(rows: pa.Table, _: int) -> list[pa.Table]:
    return [rows.slice(start, 2) for start in range(0, rows.num_rows, 2)]


def groups_here(count: int, _: int) -> list[tuple[int, int]]:
    return [(first, min(count, first + 2)) for first in range(0, count, 2)]


class LakeMachine(RuleBasedStateMachine):
    """Whatever happens, a lake holds every content as often as the source ever showed it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(ingest.pipeline, "rows_of", rows_here)
        self.patch.setattr(ingest.pipeline, "blocks_of", blocks_here)
        self.patch.setattr(ingest.pipeline, "groups_of", groups_here)
        # Several waves, tasks and commits, though there are only a few episodes.
        self.patch.setattr(ingest.pipeline, "WAVE_EPISODES", 5)
        self.patch.setattr(ingest.plan, "MIN_TASK_FRAMES", 18)
        self.patch.setattr(ingest.pipeline, "COMMIT_TASKS", 1)
        self.folder = home() / "machine"  # The same each time, for the names of attempts depend on it.
        self.folder.mkdir()
        self.lake = Lake.create(str(self.folder / "lake"))
        self.shown: list[Listed] = []
        self.held: Counter[int] = Counter()
        self.quarantined: Counter[tuple[int, str]] | None = Counter()
        """None where a death or a limit leaves open what is there."""
        self.releases: dict[str, tuple[Counter[int], str]] = {}
        self.steps = 0

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.folder)

    # The source

    @initialize(listing=LISTING)
    def begin(self, listing: list[Listed]) -> None:
        self.show(listing)

    @rule(listed=LISTED)
    def grow(self, listed: Listed) -> None:
        self.show([*self.shown, listed])

    @rule(random=st.randoms(use_true_random=False), count=st.integers(1, 5))
    def renumber_and_shrink(self, random: Any, count: int) -> None:
        self.show(random.sample(self.shown, min(count, len(self.shown))))

    @rule()
    def mend(self) -> None:
        self.show([Listed(listed.content, None, listed.copy) for listed in self.shown])

    def show(self, listing: list[Listed]) -> None:
        """Make the source list these episodes; files have times of their contents, as etags are on an object store."""
        root = self.folder / "toy"
        (root / "meta").mkdir(parents=True, exist_ok=True)
        for index in range(max(len(listing), len(self.shown))):
            before = self.shown[index] if index < len(self.shown) else None
            listed = listing[index] if index < len(listing) else None
            data, video = root / DATA.format(index), root / VIDEO.format("top", index)
            if listed is None:
                data.unlink()
                video.unlink(missing_ok=True)
            elif listed != before:
                write_episode(root, index, made(listed.content), 0, ["top"])
                if listed.flaw == "dark":
                    video.write_bytes(dark_video(listed.content))
                if listed.flaw == "gone":
                    video.unlink()
                seconds = 1_000_000_000 + 100 * listed.content + 10 * listed.copy + len(listed.flaw or "")
                for path in (data, video):
                    if path.exists():
                        os.utime(path, (seconds, seconds))
        write_meta(root, [made(listed.content) for listed in listing], ["top"], ["push the button"], {})
        self.shown = listing

    # Ingestion

    @rule()
    def ingest_all(self) -> None:
        self.run(None)
        self.held |= self.good(None)
        self.quarantined = Counter((i, REASONS[one.flaw]) for i, one in enumerate(self.shown) if one.flaw)
        self.check_newest()

    @rule(limit=st.integers(1, 4))
    def ingest_some(self, limit: int) -> None:
        self.run(limit)
        self.held |= self.good(limit)
        self.quarantined = None
        self.check_newest()

    @rule(listing=LISTING)
    def change_then_ingest(self, listing: list[Listed]) -> None:
        self.show(listing)
        self.ingest_all()

    @rule(name=st.sampled_from(ON_THE_WAY))
    def die(self, name: str) -> None:
        try:
            with dying_at(name):
                self.run(None)
        except Death:
            now = self.in_lake()
            assert self.held <= now <= self.held | self.good(None)
            self.held = now
            self.quarantined = None
        else:
            self.ingest_all()

    @rule(name=st.sampled_from(ON_THE_WAY), listing=LISTING)
    def change_then_die(self, name: str, listing: list[Listed]) -> None:
        self.show(listing)
        self.die(name)

    def run(self, limit: int | None) -> None:
        source = open_source(open_files(str(self.folder / "toy")), parse_map(()))
        profile = Profile(source_name="toy", resolution=32)
        progress = Progress(say=lambda _: None)
        ingest.pipeline.ingest(self.lake, source, profile, Limits(max_bad_fraction=1.0, episodes=limit), progress)
        listed = self.shown[:limit]
        assert progress.discovered == len(listed)
        assert progress.quarantined == sum(one.flaw is not None for one in listed)
        assert progress.committed + progress.skipped + progress.quarantined == len(listed)

    def good(self, limit: int | None) -> Counter[int]:
        return Counter(listed.content for listed in self.shown[:limit] if listed.flaw is None)

    def in_lake(self) -> Counter[int]:
        index = open_table(self.lake.storage, "episodes").to_table(columns=["content_digest", "ordinal"]).to_pylist()
        assert len({(row["content_digest"], row["ordinal"]) for row in index}) == len(index)
        return Counter(facts()[0][row["content_digest"]] for row in index)

    def check_newest(self) -> None:
        """Assert that the newest release is of what is held now, and that it is not made twice."""
        assert self.in_lake() == self.held
        if self.held:
            newest = self.lake.release()
            assert self.contents(newest) == self.held
            assert self.lake.make_release().id == newest.id
        else:
            assert self.lake.releases() == []

    # Maintenance

    @rule(before=st.booleans(), after=st.booleans())
    def maintain(self, before: bool, after: bool) -> None:
        """Compact every table, or remove all history that no release needs, or both in any order."""
        if before:
            self.lake.cleanup(older_than=timedelta(0))
        if after or not before:
            for table in TABLES:
                open_table(self.lake.storage, table).optimize.compact_files()
        if after:
            self.lake.cleanup(older_than=timedelta(0))

    @rule()
    def retry_what_is_bad(self) -> None:
        self.lake.retry("toy")
        self.quarantined = Counter()

    @rule(name=st.sampled_from(["gold", "baseline"]), which=st.integers(0, 9))
    def name_a_release(self, name: str, which: int) -> None:
        releases = self.lake.releases()
        if not releases:
            return
        release = releases[which % len(releases)]
        try:
            assert self.lake.tag(name, release).id == release.id
        except ReleaseExistsError:
            assert self.releases[name][1] != release.id

    # What must always hold

    @invariant()
    def the_index_agrees_with_the_tables(self) -> None:
        assert list(self.lake.verify(contents=False)) == []

    @invariant()
    def the_quarantine_holds_what_is_bad(self) -> None:
        rows = self.lake.quarantine().to_pylist()
        found = Counter((row["source_index"], row["reason"]) for row in rows)
        assert self.quarantined is None or found == self.quarantined

    @invariant()
    def every_release_holds_what_it_held(self) -> None:
        self.steps += 1
        releases = self.lake.releases()
        assert self.releases.keys() <= {release.name for release in releases}
        for release in releases:
            if release.name not in self.releases:
                self.releases[release.name] = (self.contents(release), release.id)
        if releases:
            self.check_release(releases[self.steps % len(releases)])

    def contents(self, release: Release) -> Counter[int]:
        return Counter(facts()[0][d] for d in release.episodes(columns=["content_digest"]).column(0).to_pylist())

    def check_release(self, release: Release) -> None:
        """Assert that a release holds what it held at first, to the bit, and nothing else."""
        contents, identity = self.releases[release.name]
        assert self.contents(release) == contents
        assert release.id == identity
        rows = release.episodes(columns=["episode_uid", "content_digest", "num_frames"]).to_pylist()
        visible = Counter(release.frames(columns=["episode_uid"]).column(0).to_pylist())
        assert visible == {row["episode_uid"]: row["num_frames"] for row in rows}
        for row in rows:
            frames = release.frames(episodes=[row["episode_uid"]], columns=["state", "frame_index"])
            state = np.stack(frames.column("state").to_pylist()).astype(np.float32)
            assert np.array_equal(state, facts()[1][facts()[0][row["content_digest"]]])
            assert frames.column("frame_index").to_pylist() == list(range(row["num_frames"]))
            assert release.video(row["episode_uid"], "top")[4:8] == b"ftyp"


EASY = settings(deadline=None, suppress_health_check=list(HealthCheck))


def test_any_short_history() -> None:
    run_state_machine_as_test(
        LakeMachine, settings=settings(EASY, max_examples=40, stateful_step_count=20, derandomize=True)
    )


@pytest.mark.slow
def test_any_history() -> None:
    run_state_machine_as_test(LakeMachine, settings=settings(EASY, max_examples=60, stateful_step_count=40))
