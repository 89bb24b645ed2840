"""The lake on the command line: ``python -m lake COMMAND URI``."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

import pyarrow as pa
import tyro

from lake import Lake, Release
from lake.errors import RobolakeError
from lake.tables import open_table

Uri = tyro.conf.Positional[str]
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ls:
    """List the sources of a release: episodes, frames, hours, embodiments, views."""

    uri: Uri
    """Path or s3:// URI of the lake."""
    release: str | None = None
    """Name of the release; by default the newest."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Show:
    """Show a release: what it pins and what it holds."""

    uri: Uri
    """Path or s3:// URI of the lake."""
    release: str | None = None
    """Name of the release; by default the newest."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Releases:
    """List the releases, oldest first."""

    uri: Uri
    """Path or s3:// URI of the lake."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantine:
    """List the rejected episodes with their reasons."""

    uri: Uri
    """Path or s3:// URI of the lake."""
    retry: str | None = None
    """Name of a source: take its episodes out, so that the next ingest tries them again."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """Show the statistics of state and action by source and embodiment."""

    uri: Uri
    """Path or s3:// URI of the lake."""
    release: str | None = None
    """Name of the release; by default the newest."""
    split: str = "train"
    """Episodes of this split; `all` for every one."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """Give a release one more name."""

    uri: Uri
    """Path or s3:// URI of the lake."""
    name: tyro.conf.Positional[str]
    """The new name."""
    release: str | None = None
    """Name of the release; by default the newest."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verify:
    """Check that the tables hold what the index says; exit with 1 where they do not."""

    uri: Uri
    """Path or s3:// URI of the lake."""
    quick: bool = False
    """Check counts and borders only; by default every byte is read."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleanup:
    """Remove old versions that no release pins, and staged files of old attempts."""

    uri: Uri
    """Path or s3:// URI of the lake."""
    older_than_days: float = 14.0
    """Must be longer than the longest job that reads or writes."""
    json: bool = False
    """Print JSON."""


Command = (
    Annotated[Ls, tyro.conf.subcommand("ls")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Quarantine, tyro.conf.subcommand("quarantine")]
    | Annotated[Releases, tyro.conf.subcommand("releases")]
    | Annotated[Stats, tyro.conf.subcommand("stats")]
    | Annotated[Tag, tyro.conf.subcommand("tag")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Cleanup, tyro.conf.subcommand("cleanup")]
)


def main() -> None:
    """Run a command; a failure that robolake foresees prints one line and exits with 1."""
    command = tyro.cli(Command, prog="python -m lake", description=__doc__)  # type: ignore[call-overload]
    try:
        code = _COMMANDS[type(command)](command)
        sys.stdout.flush()
    except BrokenPipeError:  # The reader, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (RobolakeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)


def _ls(command: Ls) -> int:
    release = Lake(command.uri).release(command.release)
    columns = ["source", "embodiment", "views", "num_frames", "fps", "state_dim", "action_dim", "split", "tasks"]
    groups: dict[tuple[str, str], Rows] = {}
    for row in release.episodes(columns=columns).to_pylist():
        groups.setdefault((row["source"], row["embodiment"]), []).append(row)
    rows = [
        {
            "source": source,
            "embodiment": embodiment,
            "episodes": len(members),
            "frames": sum(row["num_frames"] for row in members),
            "hours": round(sum(row["num_frames"] / row["fps"] for row in members) / 3600, 3),
            "views": sorted({view for row in members for view in row["views"]}),
            "state": sorted({row["state_dim"] for row in members}),
            "action": sorted({row["action_dim"] for row in members}),
            "tasks": len({task for row in members for task in row["tasks"]}),
        }
        for (source, embodiment), members in sorted(groups.items())
    ]
    return _print(rows, as_json=command.json)


def _show(command: Show) -> int:
    release = Lake(command.uri).release(command.release)
    return _print([_described(release) | {"versions": release.versions}], as_json=command.json)


def _releases(command: Releases) -> int:
    return _print([_described(release) for release in Lake(command.uri).releases()], as_json=command.json)


def _quarantine(command: Quarantine) -> int:
    lake = Lake(command.uri)
    if command.retry is not None:
        return _print([{"source": command.retry, "to_retry": lake.retry(command.retry)}], as_json=command.json)
    return _print(lake.quarantine().to_pylist(), as_json=command.json)


def _stats(command: Stats) -> int:
    split = None if command.split == "all" else command.split
    rows = Lake(command.uri).release(command.release).stats(split=split).to_pylist()
    if command.json:
        return _print(rows, as_json=True)
    flat = [
        {name: row[name] for name in ("source", "embodiment", "feature", "count")}
        | {"dim": dim}
        | {name: f"{row[name][dim]:.4g}" for name in ("mean", "std", "min", "q01", "q50", "q99", "max")}
        for row in rows
        for dim in range(len(row["mean"]))
    ]
    return _print(flat, as_json=False)


def _tag(command: Tag) -> int:
    lake = Lake(command.uri)
    return _print([_described(lake.tag(command.name, lake.release(command.release)))], as_json=command.json)


def _verify(command: Verify) -> int:
    lake = Lake(command.uri)
    problems = [
        {"episode_uid": p.episode_uid, "table": p.table, "problem": p.message}
        for p in lake.verify(contents=not command.quick)
    ]
    counts = {name: open_table(lake.storage, name).count_rows() for name in ("episodes", "frames")}
    visible = sum(open_table(lake.storage, "episodes").to_table(columns=["num_frames"]).column(0).to_pylist())
    summary = {"episodes": counts["episodes"], "frames": visible, "orphan_frames": counts["frames"] - visible}
    if command.json:
        _print([summary | {"problems": problems}], as_json=True)
    else:
        if problems:
            _print(problems, as_json=False)
        print(f"{len(problems)} problems; " + ", ".join(f"{count:,} {name}" for name, count in summary.items()))
    return 1 if problems else 0


def _cleanup(command: Cleanup) -> int:
    removed = Lake(command.uri).cleanup(older_than=timedelta(days=command.older_than_days))
    return _print([removed], as_json=command.json)


_COMMANDS: dict[type, Callable[[Any], int]] = {
    Ls: _ls,
    Show: _show,
    Quarantine: _quarantine,
    Releases: _releases,
    Stats: _stats,
    Tag: _tag,
    Verify: _verify,
    Cleanup: _cleanup,
}


def _described(release: Release) -> dict[str, Any]:
    return {
        "name": release.name,
        "id": release.id,
        "created": release.created_at.strftime("%Y-%m-%d %H:%M:%S UTC"),
        "episodes": release.num_episodes,
        "frames": release.num_frames,
    }


def _print(rows: Rows, *, as_json: bool) -> int:
    """Print rows as a JSON array, or as aligned columns; one row goes down the page."""
    if as_json:
        print(json.dumps(rows, default=str))
    elif not rows:
        print("nothing")
    elif len(rows) == 1 and len(rows[0]) > 5:
        width = max(len(name) for name in rows[0])
        for name, value in rows[0].items():
            print(f"{name:<{width}}  {_cell(value)}")
    else:
        table = pa.Table.from_pylist([{name: _cell(value) for name, value in row.items()} for row in rows])
        cells = [table.column_names, *zip(*(column.to_pylist() for column in table.columns), strict=True)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        for row in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
