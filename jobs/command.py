"""The command line of a job: TOML files and flags in, one line of JSON out."""

import dataclasses
import json
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lake.errors import RobolakeError

C = TypeVar("C")


def main_of(config: type[C], run: Callable[[C], dict[str, Any]]) -> Callable[[], None]:
    """Return the ``main`` of a job.

    Arguments that end in .toml are replaced by the flags that they hold; flags after
    them win. The last line of output is the result as JSON. A failure that robolake
    foresees prints one line and exits with 1.
    """

    def main() -> None:
        import tyro

        parsed = tyro.cli(config, args=expand(sys.argv[1:]), prog=f"python -m {_module(config)}")
        try:
            result = run(parsed)
        except (RobolakeError, ValueError, OSError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(1)
        sys.stderr.flush()
        print(json.dumps(result | {"config": dataclasses.asdict(parsed)}, default=str), flush=True)  # type: ignore[call-overload]

    return main


def expand(arguments: Sequence[str]) -> list[str]:
    """Put the flags of TOML files in place of their names.

    Raises:
        SystemExit: a file is missing or is no TOML.
    """
    flags: list[str] = []
    for argument in arguments:
        if argument.endswith(".toml") and not argument.startswith("-"):
            try:
                flags += _flags(tomllib.loads(Path(argument).read_text(encoding="utf-8")))
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                sys.exit(f"{argument}: {error}")
        else:
            flags.append(argument)
    return flags


def _flags(table: dict[str, Any], prefix: str = "") -> list[str]:
    flags: list[str] = []
    for key, value in table.items():
        name = f"{prefix}{key.replace('_', '-')}"
        if isinstance(value, dict):
            flags += _flags(value, f"{name}.")
        elif isinstance(value, bool):
            head, _, last = name.rpartition(".")
            flags.append(f"--{name}" if value else f"--{head + '.' if head else ''}no-{last}")
        elif isinstance(value, list):
            flags += [f"--{name}", *(str(item) for item in value)]
        else:
            flags.append(f"--{name}={value}")
    return flags


def _module(config: type) -> str:
    """Return the name by which the job is run."""
    if config.__module__ != "__main__":
        return config.__module__
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else "jobs"
