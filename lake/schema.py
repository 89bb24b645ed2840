"""The Arrow schemas of a lake's tables.

One schema serves every embodiment: ``state`` and ``action`` are float32 lists
whose meaning stands on the episode, and views are named per episode.
"""

import pyarrow as pa
from lance import blob_field

FORMAT_VERSION = 1
"""Version of the layout. A lake with a higher one is refused."""

STORAGE_VERSION = "2.2"
"""Lance file format: the first with blob v2."""

ROW_TABLES = ("frames", "videos", "stats")
"""Tables of rows that the index of episodes makes visible."""

_KEY = {"lance-schema:unenforced-primary-key": "true"}


def _key(name: str) -> pa.Field:
    """Return a primary key column; the mark makes concurrent merges exact."""
    return pa.field(name, pa.string(), nullable=False, metadata=_KEY)


FRAMES = pa.schema(
    [
        pa.field("episode_uid", pa.string(), nullable=False),
        pa.field("frame_index", pa.int32(), nullable=False),
        pa.field("timestamp_s", pa.float64(), nullable=False),
        pa.field("state", pa.list_(pa.float32())),
        pa.field("action", pa.list_(pa.float32())),
        pa.field("task_index", pa.int32()),
        pa.field("views", pa.list_(pa.binary())),
    ]
)

VIDEOS = pa.schema(
    [
        pa.field("episode_uid", pa.string(), nullable=False),
        pa.field("view", pa.string(), nullable=False),
        pa.field("codec", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("num_frames", pa.int64()),
        pa.field("num_lead_frames", pa.int32()),
        pa.field("num_bytes", pa.int64()),
        pa.field("packets_sha256", pa.string()),
        pa.field("sha256", pa.string()),
        blob_field("video"),
    ]
)

STATS = pa.schema(
    [
        pa.field("episode_uid", pa.string(), nullable=False),
        pa.field("feature", pa.string(), nullable=False),
        pa.field("count", pa.int64()),
        pa.field("mean", pa.list_(pa.float64())),
        pa.field("m2", pa.list_(pa.float64())),
        pa.field("min", pa.list_(pa.float64())),
        pa.field("max", pa.list_(pa.float64())),
        pa.field("bucket_offsets", pa.list_(pa.int32())),
        pa.field("bucket_keys", pa.list_(pa.int32())),
        pa.field("bucket_counts", pa.list_(pa.int64())),
    ]
)

_RANGES = [
    field
    for table in ROW_TABLES
    for field in (
        pa.field(f"{table}_first_row", pa.int64()),
        pa.field(f"{table}_rows", pa.int64()),
    )
]

EPISODES = pa.schema(
    [
        _key("episode_uid"),
        pa.field("source", pa.string()),
        pa.field("source_index", pa.int64()),
        pa.field("source_uri", pa.string()),
        pa.field("source_format", pa.string()),
        pa.field("content_digest", pa.string()),
        pa.field("ordinal", pa.int32()),
        pa.field("fingerprint", pa.string()),
        pa.field("embodiment", pa.string()),
        pa.field("tasks", pa.list_(pa.string())),
        pa.field("num_frames", pa.int64()),
        pa.field("fps", pa.float64()),
        pa.field("views", pa.list_(pa.string())),
        pa.field("state_dim", pa.int32()),
        pa.field("action_dim", pa.int32()),
        pa.field("state_names", pa.list_(pa.string())),
        pa.field("action_names", pa.list_(pa.string())),
        pa.field("success", pa.bool_()),
        pa.field("split", pa.string()),
        pa.field("resolution", pa.int32()),
        pa.field("unmapped", pa.list_(pa.string())),
        *_RANGES,
        pa.field("frames_sha256", pa.string()),
        pa.field("attempt_id", pa.string()),
        pa.field("commit_id", pa.string()),
        pa.field("writer", pa.string()),
        pa.field("ingested_at", pa.timestamp("us", tz="UTC")),
    ]
)

DERIVED = pa.schema(
    [
        _key("key"),
        pa.field("episode_uid", pa.string()),
        pa.field("table", pa.string()),
        pa.field("resolution", pa.int32()),
        pa.field("first_row", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("attempt_id", pa.string()),
    ]
)

SIGHTINGS = pa.schema(
    [
        _key("fingerprint"),
        pa.field("source", pa.string()),
        pa.field("episode_uid", pa.string()),
    ]
)

QUARANTINE = pa.schema(
    [
        _key("episode_uid"),
        pa.field("source", pa.string()),
        pa.field("source_index", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("fingerprint", pa.string()),
        pa.field("attempt_id", pa.string()),
        pa.field("quarantined_at", pa.timestamp("us", tz="UTC")),
    ]
)

RELEASES = pa.schema(
    [
        _key("name"),
        pa.field("id", pa.string()),
        pa.field("created_at", pa.timestamp("us", tz="UTC")),
        pa.field("versions", pa.map_(pa.string(), pa.int64())),
        pa.field("digests", pa.map_(pa.string(), pa.string())),
        pa.field("num_episodes", pa.int64()),
        pa.field("num_frames", pa.int64()),
        pa.field("note", pa.string()),
    ]
)

TABLES = {
    "episodes": EPISODES,
    "frames": FRAMES,
    "videos": VIDEOS,
    "stats": STATS,
    "derived": DERIVED,
    "quarantine": QUARANTINE,
    "sightings": SIGHTINGS,
    "releases": RELEASES,
}
"""The tables that every lake has. ``frames_<resolution>`` tables come on demand."""


def frames_table(resolution: int) -> str:
    """Return the name of the derived frames table of a resolution."""
    return f"frames_{resolution}"
