"""The formats that can be ingested, one file each."""

from collections.abc import Mapping

from ingest.files import SourceFiles
from ingest.formats import lerobot_v2, lerobot_v3
from ingest.source import Format, Source
from lake.errors import SourceMetadataError

FORMATS: Mapping[str, Format] = {
    "lerobot-v2": lerobot_v2,
    "lerobot-v3": lerobot_v3,
}


def open_source(files: SourceFiles, feature_map: Mapping[str, str]) -> Source:
    """Find out a source's format and read its metadata.

    Args:
        feature_map: see ``ingest.features.parse_map``.

    Raises:
        SourceMetadataError: missing or invalid metadata.
        SourceVersionError: a known format in a version that is not supported.
    """
    for module in FORMATS.values():
        if module.detect(files):
            return module.open_source(files, feature_map)
    raise SourceMetadataError(
        f"{files.uri}: no known format. A LeRobot dataset has meta/info.json with its codebase_version."
    )


def format_of(source: Source) -> Format:
    """Return the module that reads a source."""
    return FORMATS[source.format.split(".")[0]]
