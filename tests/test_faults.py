"""Faults: whatever dies, fills up or answers wrongly, running the job again ends as an unbroken run does."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import BaseError
from s3_proxy import s3_proxy
from staged import darken
from support import ROOT, Made, ingest, last_json, make_v21

from ingest.plan import MIN_TASK_FRAMES
from jobs.store import _SERVERS, Store, _client, _find_program, _free_ports, _is_ready, _locked_log, _spawn, _stop
from lake import Lake
from lake.__main__ import main as lake_command
from lake.errors import LakeDamagedError, StoreError
from lake.failpoints import FAILPOINTS
from lake.tables import open_table

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray")]

LENGTH = MIN_TASK_FRAMES + 8
"""Frames of an episode, so that each is a task of its own."""
COUNT, BAD = 5, 3
GOOD = COUNT - 1
IN_WORKERS = [name for name in FAILPOINTS if name.startswith("task.")]
IN_DRIVER = [name for name in FAILPOINTS if name not in IN_WORKERS]
IN_STORE = [name for name in IN_DRIVER if name.startswith(("commit.", "release.", "plan."))]
BEFORE_DECODING = ("create.before_marker", "plan.before_put", "plan.after_put")
BEFORE_EPISODES = ("commit.before_frames", "commit.after_frames", "commit.after_videos", "commit.after_stats")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five episodes of a task each; one is black, which shows only when it is decoded."""
    folder = tmp_path_factory.mktemp("source") / "toy"
    make_v21(folder, [Made(seed=i, num_frames=LENGTH) for i in range(COUNT)])
    darken(folder, BAD, num_frames=LENGTH)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, ray: object, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The id of the release that an unbroken run makes."""
    result = ingest(source, tmp_path_factory.mktemp("whole") / "lake")
    assert (result["committed"], result["quarantined"]) == (GOOD, 1)
    return result["release_id"]


@pytest.fixture(scope="module")
def address(ray: Any) -> str:
    """Where the Ray of the tests is: a job that joins it is ready in half the time of one that starts its own."""
    return ray.get_runtime_context().gcs_address


@dataclass(frozen=True)
class Jobs:
    """Starts ``python -m jobs.ingest`` on the Ray of the tests."""

    source: Path
    address: str

    def command(self, lake: str) -> list[str]:
        return [sys.executable, "-m", "jobs.ingest", "--source", str(self.source), "--lake", lake]

    def start(self, lake: str, in_workers: dict[str, str] | None = None, **environment: str) -> subprocess.Popen[str]:
        """Start a job; ``in_workers`` are variables of its Ray workers, as a submitted job would be given them."""
        environment |= {"RAY_ADDRESS": self.address}
        if in_workers:
            environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": {"env_vars": in_workers}})
        return subprocess.Popen(
            self.command(lake),
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, lake: str, in_workers: dict[str, str] | None = None, **environment: str) -> "Ended":
        return ended(self.start(lake, in_workers, **environment))


@dataclass(frozen=True)
class Ended:
    """A job that ended."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return last_json(self.out)

    def check_is_clear(self, *errors: str) -> None:
        """Assert that it failed as people can read: one line that names the error, no traceback.

        What Ray passes on of its workers' own output may come behind that line.
        """
        assert self.code == 1, (self.code, self.err)
        assert "Traceback" not in self.err, self.err
        named = [line for line in self.err.splitlines() if line.startswith(tuple(f"{error}: " for error in errors))]
        assert len(named) == 1, self.err


def ended(process: subprocess.Popen[str]) -> Ended:
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Ended(process.returncode, out, err)


@pytest.fixture
def jobs(source: Path, address: str) -> Jobs:
    return Jobs(source, address)


def staged(lake: str) -> dict[str, float]:
    """Return the staged results with the time of writing: what was decoded, and when."""
    storage = Lake(lake).storage
    return {path: changed for path, changed in storage.files("_staging") if "/task-" in path}


def check_as_unbroken(lake: str, whole: str) -> None:
    """Assert that a lake holds what an unbroken run makes: once, undamaged, and nothing else within reach."""
    opened = Lake(lake)
    release = opened.release()
    assert release.id == whole
    episodes = release.episodes(columns=["episode_uid", "num_frames"]).to_pydict()
    assert episodes["num_frames"] == [LENGTH] * GOOD
    frames = release.frames(columns=["episode_uid", "frame_index"]).to_pydict()
    assert Counter(frames["episode_uid"]) == dict.fromkeys(episodes["episode_uid"], LENGTH)
    assert len(set(zip(frames["episode_uid"], frames["frame_index"], strict=True))) == GOOD * LENGTH
    stats = release.stats().to_pylist()
    assert {row["count"] for row in stats if row["feature"] in ("state", "action")} == {GOOD * LENGTH}
    assert [(r["source_index"], r["reason"]) for r in opened.quarantine().to_pylist()] == [(BAD, "black-video")]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["lake", "verify", lake])
        with pytest.raises(SystemExit) as end:
            lake_command()
    assert end.value.code == 0, said.getvalue()
    assert f"0 problems; {GOOD} episodes, {GOOD * LENGTH:,} frames" in said.getvalue()


# Deaths


def check_death(jobs: Jobs, lake: str, name: str, whole: str) -> None:
    """Kill a job at a failpoint, run it again; on a slow machine it may have committed a part before it came there."""
    died = jobs.run(lake, ROBOLAKE_FAILPOINT=name)
    assert died.code == -signal.SIGKILL, f"{name} was never reached: {died.code} {died.err}"
    is_made = name != "create.before_marker"
    before = staged(lake) if is_made else {}
    visible = open_table(Lake(lake).storage, "episodes").count_rows() if is_made else 0
    assert bool(before) == (name not in BEFORE_DECODING)
    assert bool(visible) == (name not in (*BEFORE_DECODING, *BEFORE_EPISODES))
    result = ingest(jobs.source, lake)
    assert result["committed"] == GOOD - visible
    assert result["quarantined"] == 1, "what a dead run rejected counts once"
    check_as_unbroken(lake, whole)
    after = staged(lake)
    assert before.items() <= after.items(), "what was decoded is not decoded again"
    assert len(after) <= COUNT + 1, "only what is bad is, once more"
    assert open_table(Lake(lake).storage, "frames").count_rows() == GOOD * LENGTH, "nothing was appended twice"
    repeated = ingest(jobs.source, lake)
    assert (repeated["committed"], repeated["skipped"], repeated["release"]) == (0, GOOD, result["release"])


@pytest.mark.parametrize("name", IN_DRIVER)
def test_a_job_killed_there_is_carried_on(jobs: Jobs, whole: str, tmp_path: Path, name: str) -> None:
    check_death(jobs, str(tmp_path / "lake"), name, whole)


@pytest.mark.parametrize("name", IN_STORE)
def test_a_job_killed_there_is_carried_on_in_the_object_store(jobs: Jobs, whole: str, bucket: str, name: str) -> None:
    check_death(jobs, f"{bucket}/lake", name, whole)


@pytest.mark.parametrize("name", IN_WORKERS)
def test_a_worker_killed_there_is_replaced(jobs: Jobs, whole: str, tmp_path: Path, name: str) -> None:
    lake, once = str(tmp_path / "lake"), tmp_path / "once"
    result = jobs.run(lake, {"ROBOLAKE_FAILPOINT": name, "ROBOLAKE_FAILPOINT_ONCE": str(once)}).result
    assert once.exists(), f"{name} was never reached"
    assert (result["committed"], result["quarantined"]) == (GOOD, 1)
    check_as_unbroken(lake, whole)
    assert len(staged(lake)) == COUNT


def test_a_task_that_always_dies_ends_the_job(jobs: Jobs, whole: str, tmp_path: Path) -> None:
    lake = str(tmp_path / "lake")
    jobs.run(lake, {"ROBOLAKE_FAILPOINT": "task.before_stage"}).check_is_clear("WorkerDiedError")
    assert Lake(lake).releases() == []
    assert ingest(jobs.source, lake)["committed"] == GOOD
    check_as_unbroken(lake, whole)


def test_a_job_that_dies_again_and_again_gets_there(jobs: Jobs, whole: str, tmp_path: Path) -> None:
    lake = str(tmp_path / "lake")
    for name in ("plan.after_put", "commit.after_videos", "commit.after_episodes", "release.after_first_tag"):
        assert jobs.run(lake, ROBOLAKE_FAILPOINT=name).code == -signal.SIGKILL
        open_table(Lake(lake).storage, "frames").optimize.compact_files()
        open_table(Lake(lake).storage, "episodes").optimize.compact_files()
    assert ingest(jobs.source, lake)["committed"] == 0
    check_as_unbroken(lake, whole)


# Two jobs at once


@pytest.mark.parametrize("dies_at", [None, "commit.after_frames", "commit.after_episodes"])
def test_two_jobs_at_once_on_one_cluster(jobs: Jobs, whole: str, root: str, dies_at: str | None) -> None:
    first = jobs.start(root, **({"ROBOLAKE_FAILPOINT": dies_at} if dies_at else {}))
    second = ended(jobs.start(root))
    one = ended(first)
    if dies_at is None:
        assert one.result["committed"] + second.result["committed"] == GOOD
    else:
        assert one.code == -signal.SIGKILL
        # What the dead one made visible is not counted again: all, a part on a slow machine, or nothing.
        assert second.result["committed"] <= GOOD
        assert second.result["committed"] + second.result["skipped"] <= GOOD
    ingest(jobs.source, root)
    check_as_unbroken(root, whole)


def test_two_jobs_at_once_on_two_clusters(jobs: Jobs, whole: str, tmp_path: Path) -> None:
    lake = str(tmp_path / "lake")

    def run() -> Ended:
        folder = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        try:
            command = [*jobs.command(lake), "--num-cpus", "1"]
            environment |= {"RAY_TMPDIR": folder}
            pipe = subprocess.PIPE
            return ended(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    with ThreadPoolExecutor(2) as pool:
        both = [future.result() for future in [pool.submit(run), pool.submit(run)]]
    assert sum(job.result["committed"] for job in both) == GOOD
    assert [job.result["quarantined"] for job in both] == [1, 1]
    check_as_unbroken(lake, whole)


# An object store that answers wrongly

PUTS = {
    "frames": r"frames\.lance/_versions/",
    "videos": r"videos\.lance/_versions/",
    "stats": r"stats\.lance/_versions/",
    "episodes": r"episodes\.lance/_versions/",
    "quarantine": r"quarantine\.lance/_versions/",
    "releases": r"releases\.lance/_versions/",
    "tags": r"_refs/tags/",
    "plan": r"plan\.parquet",
    "close": r"/closed",
}


@pytest.mark.parametrize("fault", ["drop_reply", "answer_500", "refuse"])
@pytest.mark.parametrize("put", PUTS)
def test_a_put_whose_answer_is_wrong_is_made_once(
    jobs: Jobs, whole: str, store: Store, monkeypatch: pytest.MonkeyPatch, put: str, fault: str
) -> None:
    source, lake = jobs.source, f"s3://{store.bucket}/{put}-{fault}"
    Lake.create(lake)
    with s3_proxy(store) as proxy:
        times = 3 if fault == "refuse" else 1
        getattr(proxy, fault)(f"PUT {PUTS[put]}", times)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        result = ingest(source, lake)
        assert proxy.counts[fault] == times
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    assert (result["committed"], result["frames"], result["quarantined"]) == (GOOD, GOOD * LENGTH, 1)
    check_as_unbroken(lake, whole)
    assert open_table(Lake(lake).storage, "frames").count_rows() == GOOD * LENGTH
    assert ingest(source, lake)["skipped"] == GOOD


@pytest.mark.parametrize("fault", ["drop_reply", "answer_500"])
def test_a_lake_is_made_though_every_table_s_answer_is_lost(
    store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    with s3_proxy(store) as proxy:
        for table in ("episodes", "frames", "releases"):
            getattr(proxy, fault)(rf"PUT {table}\.lance/_versions/")
        getattr(proxy, fault)("PUT lake.json")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        lake = Lake.create(f"{bucket}/lake")
        assert proxy.counts[fault] == 4
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    assert {open_table(lake.storage, table).version for table in ("episodes", "frames", "releases")} == {1}


def test_a_store_that_refuses_everything_ends_the_job(jobs: Jobs, whole: str, store: Store, bucket: str) -> None:
    lake = f"{bucket}/lake"
    Lake.create(lake)
    with s3_proxy(store) as proxy:
        proxy.refuse(r"PUT episodes\.lance/_versions/")
        jobs.run(lake, AWS_ENDPOINT_URL=proxy.endpoint).check_is_clear("StoreUnreachableError")
    assert Lake(lake).releases() == []
    assert ingest(jobs.source, lake)["committed"] == GOOD
    check_as_unbroken(lake, whole)


def test_everything_goes_wrong_a_little(jobs: Jobs, whole: str, store: Store, bucket: str) -> None:
    puts = ["task-", r"frames\.lance/data/", "_transactions/", r"frames\.lance/_versions/", "releases", "lake.json"]
    with s3_proxy(store) as proxy:
        for match in puts:
            for fault in (proxy.drop_reply, proxy.answer_500, proxy.refuse):
                fault(f"PUT {match}", 1)
        for match in (r"GET episodes\.lance", "GET task-", "HEAD lake", "GET _staging"):
            proxy.refuse(match, 2)
        through = {"AWS_ENDPOINT_URL": proxy.endpoint}
        result = jobs.run(f"{bucket}/lake", through, **through).result
        assert min(proxy.counts[fault] for fault in ("drop_reply", "answer_500", "refuse")) >= len(puts)
    assert (result["committed"], result["quarantined"]) == (GOOD, 1)
    check_as_unbroken(f"{bucket}/lake", whole)


# An object store that dies


class MortalStore:
    """A store that can be killed and comes back with the same address, keys and objects."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._log = stack.enter_context(_locked_log(directory))
        self._ports = _free_ports(2 * len(_SERVERS))
        self.store = Store(f"http://127.0.0.1:{self._ports[0]}", "lake", "AKMORTAL", "s" * 40)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        stack.callback(self.end)

    def start(self) -> None:
        self._process = _spawn(_find_program(), self._ports, self.store, self._log)
        assert _is_ready(self._process, self.store)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def end(self) -> None:
        if self._process is not None:
            _stop(self._process, self._ports)

    def wait_for(self, name: str) -> None:
        """Wait until there is an object of this name."""
        client, deadline = _client(self.store), time.monotonic() + 120
        while not any(name in item["path"] for page in obstore.list(client, "") for item in page):
            assert time.monotonic() < deadline, name
            time.sleep(0.02)

    def wait_until_all_is_back(self) -> None:
        """Wait until every object can be read: the first seconds after a start give errors."""
        client, deadline = _client(self.store), time.monotonic() + 120
        left = [item["path"] for page in obstore.list(client, "") for item in page]
        while left:
            assert time.monotonic() < deadline, left
            with contextlib.suppress(BaseError):
                obstore.get(client, left[-1]).bytes()
                left.pop()


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[MortalStore]:
    with contextlib.ExitStack() as stack:
        (tmp_path / "mortal").mkdir()
        yield MortalStore(tmp_path / "mortal", stack)


@pytest.mark.parametrize("moment", ["plan.parquet", "task-", "_refs/tags"])
def test_a_store_that_dies_and_comes_back(
    jobs: Jobs, whole: str, mortal: MortalStore, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    environment = mortal.store.environment()
    job = jobs.start("s3://lake/lake", environment, **environment)
    mortal.wait_for(moment)
    mortal.kill()
    time.sleep(2.0)
    mortal.start()
    first = ended(job)
    if first.code:
        first.check_is_clear("StoreUnreachableError", "CommitUnknownError")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mortal.wait_until_all_is_back()
    second = jobs.run("s3://lake/lake", environment).result
    assert (first.result["committed"] if first.code == 0 else 0) + second["committed"] <= GOOD
    check_as_unbroken("s3://lake/lake", whole)


# Disks that fill up


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(num_bytes: int) -> Path:
        nonlocal mounted
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a small file system takes root: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("free_bytes", [20_000, 250_000])
def test_a_lake_on_a_full_disk(jobs: Jobs, whole: str, small_disk: Callable[[int], Path], free_bytes: int) -> None:
    disk = small_disk(8 << 20)
    lake, ballast = str(disk / "lake"), disk / "ballast"
    ballast.write_bytes(b"0" * ((8 << 20) - 4096 * 2 - free_bytes))
    jobs.run(lake).check_is_clear("StoreFullError")
    ballast.unlink()
    if (disk / "lake" / "lake.json").exists():
        assert list(Lake(lake).verify()) == []
        assert Lake(lake).releases() == []
    ingest(jobs.source, lake)
    check_as_unbroken(lake, whole)


def test_a_disk_that_fills_up_at_any_point_harms_nothing(
    source: Path, whole: str, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(8 << 20)
    lake, ballast, size = disk / "lake", disk / "ballast", 8 << 20
    failures = 0
    for step in range(40):
        ballast.write_bytes(b"")
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(b"0" * max(0, free - 4096 * (3 + 2 * step)))
        try:
            ingest(source, lake)
            break
        except StoreError as error:
            assert type(error).__name__ == "StoreFullError", error  # noqa: PT017 (the rest of them is a failure)
            failures += 1
    assert failures > 3
    assert shutil.disk_usage(disk).used <= size
    check_as_unbroken(str(lake), whole)


def test_a_full_temporary_folder(jobs: Jobs, whole: str, tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
    lake, disk = str(tmp_path / "lake"), small_disk(16 << 10)
    jobs.run(lake, {"TMPDIR": str(disk)}).check_is_clear("StoreFullError")
    assert list(Lake(lake).verify()) == []
    assert ingest(jobs.source, lake)["committed"] == GOOD
    check_as_unbroken(lake, whole)


# Damage


def test_what_does_not_read_back_is_taken_out_and_decoded_anew(jobs: Jobs, whole: str, tmp_path: Path) -> None:
    lake = str(tmp_path / "lake")
    assert jobs.run(lake, ROBOLAKE_FAILPOINT="commit.after_quarantine").code == -signal.SIGKILL
    before = staged(lake)
    files = sorted((tmp_path / "lake" / "frames.lance" / "data").glob("*.lance"), key=lambda path: path.stat().st_mtime)
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 0xFF
    files[0].write_bytes(data)
    with pytest.raises(LakeDamagedError, match="1 episodes did not read back as written"):
        ingest(jobs.source, lake)
    assert Lake(lake).releases() == []
    assert open_table(Lake(lake).storage, "episodes").count_rows() == GOOD - 1
    assert ingest(jobs.source, lake)["committed"] == 1
    check_as_unbroken(lake, whole)
    assert not before.items() & staged(lake).items(), "what was staged with it is not trusted either"


# Retrying


def test_what_is_retried_is_decoded_anew(tmp_path: Path) -> None:
    source = make_v21(tmp_path / "dark", [Made(seed=1), Made(seed=2)])
    for index in range(2):
        darken(source, index)
    lake = str(tmp_path / "lake")
    assert ingest(source, lake, max_bad_fraction=1.0)["quarantined_new"] == 2
    first = staged(lake)
    assert ingest(source, lake, max_bad_fraction=1.0)["quarantined_new"] == 0
    assert staged(lake) == first
    time.sleep(0.01)
    assert ingest(source, lake, max_bad_fraction=1.0, retry=True)["quarantined_new"] == 2
    second = staged(lake)
    assert second.keys() == first.keys()
    assert not second.items() & first.items()
    assert ingest(source, lake, retry=True, accept=("black-video", "frozen-video"))["committed"] == 2
    assert Lake(lake).quarantine().num_rows == 0


def test_a_dead_run_s_rejections_are_not_taken_for_new_ones(jobs: Jobs, tmp_path: Path) -> None:
    lake = str(tmp_path / "lake")
    assert jobs.run(lake, ROBOLAKE_FAILPOINT="commit.after_episodes").code == -signal.SIGKILL
    result = ingest(jobs.source, lake, accept=("black-video", "frozen-video"))
    assert (result["committed"], result["quarantined"]) == (1, 0)
    assert Lake(lake).quarantine().num_rows == 0
