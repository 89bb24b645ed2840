"""The lake: robot episodes in Lance tables on object storage, read by release."""

__version__ = "0.1.0"

from lake.errors import RobolakeError
from lake.lake import Lake
from lake.release import Release

__all__ = ["Lake", "Release", "RobolakeError", "__version__"]
