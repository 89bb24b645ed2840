"""Checksums of episodes, independent of how their frames were split into batches."""

import hashlib

import numpy as np
import pyarrow as pa


class FramesDigest:
    """A running SHA-256 over the frames of one episode, in order.

    Every column is hashed as its own stream (values, then lengths for lists), so
    neither batch borders nor Arrow's buffer layout show in the result.
    """

    _STREAMS = ("index", "time", "task", "state", "state_lengths", "action", "action_lengths", "views")

    def __init__(self) -> None:
        self._streams = {name: hashlib.sha256() for name in self._STREAMS}
        self.num_frames = 0

    def update(self, batch: pa.RecordBatch) -> None:
        """Add frames.

        Args:
            batch: rows of the frames schema, all of one episode.
        """
        self.num_frames += batch.num_rows
        self._streams["index"].update(_little(batch.column("frame_index"), "<i4"))
        self._streams["time"].update(_little(batch.column("timestamp_s"), "<f8"))
        self._streams["task"].update(_little(batch.column("task_index"), "<i4"))
        for name in ("state", "action"):
            column = batch.column(name)
            self._streams[f"{name}_lengths"].update(_little(column.value_lengths(), "<i4"))
            self._streams[name].update(_little(column.flatten(), "<f4"))
        for views in batch.column("views"):
            for view in views.values or ():
                data = view.as_buffer()
                self._streams["views"].update(data.size.to_bytes(8, "little"))
                self._streams["views"].update(data)
            self._streams["views"].update(b"|")

    def hexdigest(self) -> str:
        """Return the checksum of all frames so far."""
        total = hashlib.sha256()
        for name, stream in sorted(self._streams.items()):
            total.update(name.encode() + stream.digest())
        return total.hexdigest()


def fold_digests(digests: list[str]) -> str:
    """Return the sum of hex digests modulo 2**256: independent of their order."""
    return f"{sum(int(digest, 16) for digest in digests) % (1 << 256):064x}"


def _little(column: pa.Array, dtype: str) -> bytes:
    """Return a column's values as little-endian bytes."""
    return np.asarray(column.to_numpy(zero_copy_only=False)).astype(dtype, copy=False).tobytes()
