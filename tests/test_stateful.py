"""Any sequence of ingests, changes of the source, crashes, compactions and cleanups, against a model in memory."""

import os
import shutil
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import Made, ingest, make_v21

import lake.failpoints
from lake import Lake
from lake.errors import LakeNotFoundError
from lake.failpoints import FAILPOINTS
from lake.tables import open_table

CRASHES = [name for name in FAILPOINTS if not name.startswith(("task.", "create."))]


class CrashError(BaseException):
    """Stands for the end of the process: no handler of the product catches it."""


def crash(_pid: int, _signal: int) -> None:
    raise CrashError


class Machine(RuleBasedStateMachine):
    """An episode of seed s has s + 3 frames, so the lake tells which episodes it holds."""

    @initialize(seeds=st.lists(st.integers(0, 4), min_size=1, max_size=4))
    def begin(self, seeds: list[int]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="stateful-"))
        self.uri = str(self.folder / "lake")
        self.seeds: list[int] = seeds
        self.held: Counter[int] = Counter()
        self.released: dict[str, Counter[int]] = {}
        self.write()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def write(self) -> None:
        shutil.rmtree(self.folder / "toy", ignore_errors=True)
        make_v21(self.folder / "toy", [Made(seed=seed, num_frames=seed + 3) for seed in self.seeds])

    @rule(seed=st.integers(0, 4))
    def grow(self, seed: int) -> None:
        self.seeds = [*self.seeds, seed]
        self.write()

    @rule(at=st.integers(0, 10))
    def lose_an_episode(self, at: int) -> None:
        if len(self.seeds) > 1:
            self.seeds = [seed for i, seed in enumerate(self.seeds) if i != at % len(self.seeds)]
            self.write()

    @rule(order=st.randoms(use_true_random=False))
    def renumber(self, order) -> None:
        order.shuffle(self.seeds)
        self.write()

    @rule()
    def take_all(self) -> None:
        result = ingest(self.folder / "toy", self.uri)
        after = self.held | Counter(self.seeds)
        assert result["committed"] <= sum((after - self.held).values())
        assert result["committed"] + result["skipped"] == len(self.seeds)
        self.held = after
        self.released.setdefault(result["release"], Counter(after))

    @rule(name=st.sampled_from(CRASHES))
    def crash_and_take_all(self, name: str) -> None:
        kill = lake.failpoints.os.kill
        os.environ["ROBOLAKE_FAILPOINT"], lake.failpoints.os.kill = name, crash
        try:
            ingest(self.folder / "toy", self.uri)
        except CrashError:
            pass
        finally:
            del os.environ["ROBOLAKE_FAILPOINT"]
            lake.failpoints.os.kill = kill
        self.take_all()

    @rule()
    def compact(self) -> None:
        if self.held:
            for table in ("episodes", "frames", "videos", "stats"):
                open_table(Lake(self.uri).storage, table).optimize.compact_files()

    @rule()
    def clean_up(self) -> None:
        if self.held:
            Lake(self.uri).cleanup(older_than=timedelta(0))

    @invariant()
    def every_release_holds_what_it_held(self) -> None:
        if not hasattr(self, "uri"):
            return
        try:
            opened = Lake(self.uri)
        except LakeNotFoundError:
            assert not self.held
            return
        for name, expected in self.released.items():
            release = opened.release(name)
            lengths = release.episodes(columns=["num_frames"]).column(0).to_pylist()
            assert Counter(length - 3 for length in lengths) == expected
            assert release.frames(columns=["frame_index"]).num_rows == sum(lengths)

    @rule()
    def verify(self) -> None:
        if self.held:
            assert list(Lake(self.uri).verify()) == []


CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]
TestStateful = pytest.mark.usefixtures("ray")(Machine.TestCase)
TestStateful.settings = settings(max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=CHECKS)
TestStatefulLong = pytest.mark.slow(pytest.mark.usefixtures("ray")(type("TestStatefulLong", (Machine.TestCase,), {})))
TestStatefulLong.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=CHECKS
)
