"""Flags of a flat configuration, on machines where tyro is not installed.

They are a part of those that tyro takes, so a command that works here works there.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

C = TypeVar("C")


def parse(config: type[C], arguments: Sequence[str], *, prog: str) -> C:
    """Return a configuration from flags.

    Fields are texts, numbers, truths (``--flag``, ``--no-flag``), one of a few texts, or tuples of these.

    Raises:
        SystemExit: a flag is unknown, or its value wrong.
    """
    parser = argparse.ArgumentParser(prog=prog, description=config.__doc__)
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, dest=field.name, default=field.default, **_options(hints[field.name]))
    found = vars(parser.parse_args(arguments))
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


def _options(kind: Any) -> dict[str, Any]:
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        return _options(get_args(kind)[0]) | {"nargs": "*"}
    return {"type": kind}
