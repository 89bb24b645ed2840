"""Tests of jobs/command.py: TOML files and flags in, one line of JSON out."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from jobs.command import expand, main_of
from lake.errors import LakeNotFoundError


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part."""

    depth: int = 1
    """How deep."""
    fast: bool = True
    """Whether it is fast."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Do something."""

    source: str
    """Where from."""
    share: float = 0.5
    """How much."""
    limit: int | None = None
    """At most so many."""
    accept: tuple[Literal["black", "frozen"], ...] = ()
    """What is accepted."""
    batch_size: int = 8
    """How many at once."""
    retry: bool = False
    """Whether to try again."""
    part: Part = field(default_factory=Part)
    """The part."""


def run(config: Config) -> dict[str, Any]:
    if config.source == "nowhere":
        raise LakeNotFoundError("no lake at nowhere")
    if config.share > 1:
        raise ValueError(f"share={config.share} is more than 1")
    if config.source == "bug":
        raise RuntimeError("a bug")
    print("working")
    return {"done": 3, "where": Path(config.source)}


Main = Callable[..., dict[str, Any]]


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """Run the job with TOML texts (as files) and flags; return the last line of its output."""

    def main(*arguments: str) -> dict[str, Any]:
        given = []
        for number, argument in enumerate(arguments):
            if "=" in argument or "\n" in argument:
                (tmp_path / f"{number}.toml").write_text(argument)
                argument = str(tmp_path / f"{number}.toml")  # noqa: PLW2901
            given.append(argument)
        monkeypatch.setattr(sys, "argv", ["job", *given])
        main_of(Config, run)()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return main


def test_the_last_line_is_json_with_the_resolved_config(main: Main) -> None:
    result = main("--source", "here", "--part.depth", "3")
    config = Config(source="here", part=Part(depth=3))
    assert result == {"done": 3, "where": "here", "config": json.loads(json.dumps(asdict(config)))}


def test_a_file_holds_flags(main: Main) -> None:
    text = 'source = "here"\nshare = 0.25\nlimit = 5\naccept = ["black", "frozen"]\nbatch_size = 2\nretry = true\n'
    config = main(text + "[part]\ndepth = 4\nfast = false\n")["config"]
    assert config == {
        "source": "here",
        "share": 0.25,
        "limit": 5,
        "accept": ["black", "frozen"],
        "batch_size": 2,
        "retry": True,
        "part": {"depth": 4, "fast": False},
    }


def test_the_last_wins(main: Main) -> None:
    first, second = 'source = "a"\nretry = true\naccept = ["black"]\n[part]\ndepth = 2\n', 'source = "b"\nshare = 0.1\n'
    config = main(first, second, "--share", "0.2", "--no-retry", "--part.depth", "9")["config"]
    assert (config["source"], config["share"], config["retry"], config["part"]["depth"]) == ("b", 0.2, False, 9)
    assert config["accept"] == ["black"]
    assert main("--source", "c", second)["config"]["source"] == "b"
    assert main(first, "--accept", "frozen")["config"]["accept"] == ["frozen"]


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("a = 1", ["--a=1"]),
        ("a = -1", ["--a=-1"]),
        ("a = 1.5", ["--a=1.5"]),
        ("a = 'x y'", ["--a=x y"]),
        ("a = ''", ["--a="]),
        ("a_b = true", ["--a-b"]),
        ("a_b = false", ["--no-a-b"]),
        ("a = [1, 2]", ["--a", "1", "2"]),
        ("a = []", ["--a"]),
        ("[a_b]\nc_d = 1", ["--a-b.c-d=1"]),
        ("[a.b]\nc = false", ["--a.b.no-c"]),
        ("a = {b = 1, c = true}", ["--a.b=1", "--a.c"]),
        ("", []),
    ],
)
def test_a_table_is_a_list_of_flags(tmp_path: Path, text: str, flags: list[str]) -> None:
    (tmp_path / "x.toml").write_text(text)
    assert expand([str(tmp_path / "x.toml")]) == flags
    assert expand(["--before", str(tmp_path / "x.toml"), "--behind"]) == ["--before", *flags, "--behind"]


def test_only_arguments_that_end_in_toml_are_files() -> None:
    assert expand(["--name", "toml", "x.tom", "--file.toml"]) == ["--name", "toml", "x.tom", "--file.toml"]


def test_an_empty_list_is_an_empty_tuple(main: Main) -> None:
    assert main('source = "here"\naccept = []\n')["config"]["accept"] == []


def test_negative_numbers_are_values(main: Main) -> None:
    config = main('source = "here"\nlimit = -3\nshare = -0.5\n')["config"]
    assert (config["limit"], config["share"]) == (-3, -0.5)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), ("a = ", "Invalid value"), ("= 1", "Invalid"), ("a = 1\na = 2", "overwrite")],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, says: str
) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        expand([str(path)])
    assert str(caught.value.code).startswith(f"{path}: ")
    assert says in str(caught.value.code)


def test_a_folder_is_no_file_of_flags(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(SystemExit) as caught:
        expand([str(tmp_path / "folder.toml")])
    assert "Is a directory" in str(caught.value.code)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--source", "nowhere"), "LakeNotFoundError: no lake at nowhere\n"),
        (("--source", "here", "--share", "2"), "ValueError: share=2.0 is more than 1\n"),
    ],
)
def test_a_failure_that_is_foreseen_is_one_line(
    main: Main, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(*arguments)
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", says)


def test_a_bug_is_not_hidden(main: Main) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        main("--source", "bug")


@pytest.mark.parametrize(
    "arguments",
    [(), ("--source",), ("--source", "x", "--nope"), ("--source", "x", "--limit", "many"), ("nope = 1",)],
)
def test_wrong_usage_exits_with_2(main: Main, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(*arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().out == ""


def test_help_is_made_of_the_docstrings(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main("--help")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Do something." in shown
    assert "How deep." in shown
    assert shown.startswith(f"usage: python -m {Config.__module__} ")
