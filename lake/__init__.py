"""The lake: robot episodes in Lance tables on object storage, read by release."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lake.errors import RobolakeError

if TYPE_CHECKING:
    from lake.lake import Lake
    from lake.release import Release

__version__ = "0.1.0"

__all__ = ["Lake", "Release", "RobolakeError", "__version__"]

_HOMES = {"Lake": "lake.lake", "Release": "lake.release"}


def __getattr__(name: str) -> Any:
    """Import what needs Lance when it is asked for: models and benchmarks run on machines without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
