"""Tests of lake/__main__.py: every command of ``python -m lake``."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lakes import add_orphans, make_sources, make_unreleased
from support import ROOT, run_module

from lake import Lake
from lake.__main__ import main
from lake.tables import open_table


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Return the one line of JSON that was printed."""
        [line] = self.out.splitlines()
        return json.loads(line)


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["lake", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Done(caught.value.code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    lake = make_unreleased(root / "lake", make_sources(root / "sources"))
    lake.make_release()
    return root / "lake"


@pytest.fixture
def uri(made: Path, tmp_path: Path) -> str:
    """A copy of a lake with two sources, one release and orphans."""
    shutil.copytree(made, tmp_path / "lake")
    return str(tmp_path / "lake")


def test_ls_lists_the_sources(run: Run, uri: str) -> None:
    rows = run("ls", uri, "--json").json()
    assert rows == [
        {
            "source": "other",
            "embodiment": "arm",
            "episodes": 2,
            "frames": 24,
            "hours": 0.001,
            "views": ["top"],
            "state": [3],
            "action": [2],
            "tasks": 1,
        },
        {
            "source": "toy",
            "embodiment": "toy",
            "episodes": 3,
            "frames": 39,
            "hours": 0.001,
            "views": ["top", "wrist"],
            "state": [3],
            "action": [2],
            "tasks": 2,
        },
    ]
    shown = run("ls", uri)
    assert (shown.code, shown.err) == (0, "")
    head, *lines = shown.out.splitlines()
    assert head.split() == list(rows[0])
    assert [line.split()[:4] for line in lines] == [["other", "arm", "2", "24"], ["toy", "toy", "3", "39"]]
    assert len({line.index("0.001") for line in lines}) == 1, "columns are aligned"


def test_show_says_what_a_release_pins(run: Run, uri: str) -> None:
    release = Lake(uri).release()
    [row] = run("show", uri, "--release", release.name, "--json").json()
    created = release.created_at.strftime("%Y-%m-%d %H:%M:%S UTC")
    assert row == {
        "name": release.name,
        "id": release.id,
        "created": created,
        "episodes": 5,
        "frames": 63,
        "versions": release.versions,
    }
    shown = run("show", uri)
    assert (shown.code, shown.err) == (0, "")
    assert [line.split()[0] for line in shown.out.splitlines()] == list(row)
    assert f"episodes={release.versions['episodes']}" in shown.out


def test_releases_lists_them_and_tag_adds_a_name(run: Run, uri: str) -> None:
    name = Lake(uri).release().name
    [tagged] = run("tag", uri, "paper-v1", "--json").json()
    assert (tagged["name"], tagged["id"]) == ("paper-v1", Lake(uri).release().id)
    rows = run("releases", uri, "--json").json()
    assert sorted(row["name"] for row in rows) == sorted([name, "paper-v1"])
    shown = run("releases", uri)
    assert shown.code == 0
    assert len(shown.out.splitlines()) == 3
    also = run("tag", uri, "also", "--release", "paper-v1")
    assert (also.code, also.out.splitlines()[-1].split()[0]) == (0, "also")
    assert run("show", uri, "--release", "also", "--json").json()[0]["id"] == tagged["id"]


def test_quarantine_lists_the_rejected_and_retries(run: Run, uri: str) -> None:
    [row] = run("quarantine", uri, "--json").json()
    assert list(row) == ["source", "source_index", "reason", "message"]
    assert (row["source"], row["source_index"], row["reason"]) == ("other", 2, "video-missing")
    shown = run("quarantine", uri)
    assert "video-missing" in shown.out.splitlines()[1]
    assert run("quarantine", uri, "--retry", "other", "--json").json() == [{"source": "other", "to_retry": 1}]
    assert run("quarantine", uri).out == "nothing\n"
    assert run("quarantine", uri, "--json").json() == []


def test_stats_are_by_source_feature_and_dimension(run: Run, uri: str) -> None:
    rows = run("stats", uri, "--json").json()
    by_feature = {(row["source"], row["feature"]): row for row in rows}
    assert by_feature["toy", "state"]["count"] == 39
    assert by_feature["other", "state"]["count"] == 12, "of the split for training"
    assert len(by_feature["toy", "action"]["mean"]) == 2
    whole = {(row["source"], row["feature"]): row for row in run("stats", uri, "--split", "all", "--json").json()}
    assert whole["other", "state"]["count"] == 24
    assert run("stats", uri, "--split", "none").out == "nothing\n"
    head, *lines = run("stats", uri).out.splitlines()
    assert " ".join(head.split()) == "source embodiment feature count dim mean std min q01 q50 q99 max"
    assert len(lines) == sum(len(row["mean"]) for row in rows)
    mean = by_feature["toy", "action"]["mean"][1]
    [line] = [line.split() for line in lines if line.split()[:3] == ["toy", "toy", "action"] and line.split()[4] == "1"]
    assert float(line[5]) == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize("flags", [(), ("--quick",)], ids=["contents", "quick"])
def test_verify_says_that_all_is_well(run: Run, uri: str, flags: tuple[str, ...]) -> None:
    add_orphans(Lake(uri), 2)
    done = run("verify", uri, *flags)
    assert done == Done(0, "0 problems; 5 episodes, 63 frames, 14 orphan_frames\n", "")
    assert run("verify", uri, *flags, "--json").json() == [
        {"episodes": 5, "frames": 63, "orphan_frames": 14, "problems": []}
    ]


def test_verify_names_what_is_wrong_and_exits_with_1(run: Run, uri: str) -> None:
    lake = Lake(uri)
    uid = lake.release().episodes("source = 'toy'", ["episode_uid"]).column(0)[1].as_py()
    open_table(lake.storage, "frames").delete(f"episode_uid = '{uid}' AND frame_index = 3")
    done = run("verify", uri, "--json")
    [summary] = done.json()
    assert done.code == 1
    assert {(p["episode_uid"], p["table"]) for p in summary["problems"]} == {(uid, "frames")}
    assert "1 of 13 rows are gone" in summary["problems"][0]["problem"]
    shown = run("verify", uri, "--quick")
    assert shown.code == 1
    assert f"{uid}  frames  1 of 13 rows are gone" in shown.out
    assert shown.out.splitlines()[-1].startswith("1 problems; 5 episodes, ")


def test_cleanup_removes_old_versions(run: Run, uri: str) -> None:
    for name in ("a", "b"):
        run("tag", uri, name)
    assert run("cleanup", uri, "--json").json() == [{"bytes": 0, "versions": 0, "staged": 0}], "none is 14 days old"
    [removed] = run("cleanup", uri, "--older-than-days", "0", "--json").json()
    assert removed["versions"] > 0
    assert removed["bytes"] > 0
    assert run("verify", uri).code == 0
    assert run("cleanup", uri, "--older-than-days", "-1") == Done(
        1, "", "ValueError: older_than=-1 day, 0:00:00 is negative\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ls", "{}/typo"), r"LakeNotFoundError: no lake at {}/typo; make one with Lake.create('{}/typo'), or check"),
        (("verify", "gs://bucket/lake"), "ValueError: a lake lives at a path, file:// or s3://, not gs://"),
        (("ls", "{}", "--release", "r99"), "ReleaseNotFoundError: no release 'r99' in {}; the newest are: r"),
        (("tag", "{}", "a b"), "ValueError: release name 'a b': use letters, digits"),
        (("tag", "{}", "r99"), "ValueError: release name 'r99': the lake itself gives names of this form"),
        (("stats", "{}", "--release", "it's"), 'ReleaseNotFoundError: no release "it\'s" in {}'),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(run: Run, uri: str, arguments: tuple[str, ...], says: str) -> None:
    done = run(*(argument.replace("{}", uri) for argument in arguments))
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(says.replace("{}", uri))
    assert done.err.count("\n") == 1


def test_a_lake_without_a_release_says_so(run: Run, tmp_path: Path) -> None:
    Lake.create(str(tmp_path / "empty"))
    for command in ("ls", "show", "stats"):
        done = run(command, str(tmp_path / "empty"))
        assert done == Done(
            1, "", f"ReleaseNotFoundError: the lake at {tmp_path}/empty has no release yet; ingest something\n"
        )
    assert run("releases", str(tmp_path / "empty")).out == "nothing\n"
    assert run("verify", str(tmp_path / "empty")).out == "0 problems; 0 episodes, 0 frames, 0 orphan_frames\n"


@pytest.mark.parametrize("arguments", [(), ("list", "x"), ("ls",), ("ls", "x", "--nope"), ("tag", "x")])
def test_wrong_usage_exits_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err


def test_help_names_every_command(run: Run) -> None:
    done = run("--help")
    assert done.code == 0
    for command in ("ls", "show", "quarantine", "releases", "stats", "tag", "verify", "cleanup"):
        assert f" {command} " in done.out
        help_of = run(command, "--help")
        assert help_of.code == 0
        assert "--json" in help_of.out


def test_it_runs_as_a_module(uri: str) -> None:
    done = run_module("lake", "ls", uri, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["source"] for row in json.loads(done.stdout)] == ["other", "toy"]


def test_a_reader_that_has_seen_enough_is_no_error(uri: str) -> None:
    # The other end of the pipe is closed before the first line is written.
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "lake", "ls", uri],
        cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
    )  # fmt: skip
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_reads_from_an_object_store(run: Run, uri: str, bucket: str, tmp_path: Path) -> None:
    lake = make_unreleased(f"{bucket}/lake", make_sources(tmp_path / "sources"))
    lake.make_release()
    assert run("ls", f"{bucket}/lake", "--json").json() == run("ls", uri, "--json").json()
    assert run("verify", f"{bucket}/lake").code == 0
    assert run("releases", f"{bucket}/lake", "--json").json()[0]["id"] == Lake(uri).release().id
