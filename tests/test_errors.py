"""Tests of lake/errors.py."""

import inspect
import pickle
import re

import pytest

from ingest.validate import REASONS
from lake import RobolakeError, errors

CLASSES = [one for _, one in inspect.getmembers(errors, inspect.isclass) if one.__module__ == errors.__name__]
TREE = [one for one in CLASSES if issubclass(one, RobolakeError)]


def drawn() -> dict[str, str | None]:
    """Return the parent of each class in the tree that the docstring draws."""
    parents: dict[str, str | None] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"((?:\|   |    )*(?:[|`]-- )?)(\w+Error)\b", line)
        if found and (found[1] or found[2] == "RobolakeError"):
            depth = len(found[1]) // 4
            parents[found[2]] = above[depth - 1] if depth else None
            above[depth:] = [found[2]]
    return parents


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    real = {one.__name__: None if one is RobolakeError else one.__base__.__name__ for one in TREE}
    assert drawn() == real
    assert len(real) > 15


def test_the_errors_are_drawn_in_the_order_of_the_file() -> None:
    in_file = sorted(TREE, key=lambda one: inspect.getsourcelines(one)[1])
    assert list(drawn()) == [one.__name__ for one in in_file]


def test_only_a_bad_episode_stands_beside_the_tree() -> None:
    assert [one for one in CLASSES if one not in TREE] == [errors.EpisodeError]
    assert errors.EpisodeError.__bases__ == (Exception,)


@pytest.mark.parametrize("one", TREE, ids=lambda one: one.__name__)
def test_every_error_survives_pickling(one: type[RobolakeError]) -> None:
    error = one("what, which value, and the remedy")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is one
    assert again.args == error.args
    assert str(again) == "what, which value, and the remedy"


@pytest.mark.parametrize("reason", REASONS)
def test_a_bad_episode_survives_pickling_with_its_reason(reason: str) -> None:
    error = pickle.loads(pickle.dumps(errors.EpisodeError(reason, "file.mp4 is bad")))
    assert type(error) is errors.EpisodeError
    assert (error.reason, error.message, str(error)) == (reason, "file.mp4 is bad", f"{reason}: file.mp4 is bad")
