"""Make a clean LeRobot v2.1 dataset from the real one of the Unitree G1, of which three videos are lost."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ingest.lerobot_stats import count_pixels, matrix_stats, pixel_stats
from ingest.video_writer import sample_frames, scan_video

GOOD = (1, 2, 4, 5, 7, 8)


def good_v21(source: Path, out: Path) -> Path:
    """Write the six good episodes to ``out``, numbered from 0 on, and return it.

    Only the numbering differs; statistics, which LeRobot's converter asks for, are computed where there are none.

    Args:
        source: the dataset as found, LeRobot v2.1.
        out: a directory that is not there yet.
    """
    info = json.loads((source / "meta/info.json").read_text())
    rows = _by_index(source / "meta/episodes.jsonl")
    stats = _by_index(source / "meta/episodes_stats.jsonl")
    views = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    (out / "meta").mkdir(parents=True)
    shutil.copyfile(source / "meta/tasks.jsonl", out / "meta/tasks.jsonl")
    begin = 0
    for new, old in enumerate(GOOD):
        table = pq.read_table(_file(source, info["data_path"], old))
        index = {"episode_index": np.full(len(table), new), "index": np.arange(begin, begin + len(table))}
        begin += len(table)
        for name, values in index.items():
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), pa.array(values))
        data = _file(out, info["data_path"], new)
        data.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, data)
        for key in views:
            video = _file(out, info["video_path"], new, key)
            video.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_file(source, info["video_path"], old, key), video)
        computed = _stats(table, {key: _file(out, info["video_path"], new, key) for key in views})
        kept = stats[old]["stats"] if old in stats else computed
        stats[old] = {"stats": kept | {name: computed[name] for name in index}}
    for name, by_index in (("episodes", rows), ("episodes_stats", stats)):
        _write_lines(out / f"meta/{name}.jsonl", (by_index[old] | {"episode_index": n} for n, old in enumerate(GOOD)))
    info |= {"total_episodes": len(GOOD), "total_videos": len(GOOD), "total_frames": begin}
    info["splits"] = {"train": f"0:{len(GOOD)}"}
    (out / "meta/info.json").write_text(json.dumps(info, indent=4))
    return out


def _file(root: Path, pattern: str, episode: int, key: str = "") -> Path:
    return root / pattern.format(episode_chunk=0, episode_index=episode, video_key=key)


def _by_index(path: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["episode_index"]: row for row in rows}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _stats(table: pa.Table, videos: dict[str, Path]) -> dict[str, dict[str, list]]:
    stats = {
        name: matrix_stats(np.array(table[name].to_pylist()).reshape(len(table), -1)) for name in table.column_names
    }
    for key, path in videos.items():
        counts = [count_pixels(image) for image in sample_frames(scan_video(path), range(0, len(table), 20))]
        stats[key] = pixel_stats(np.sum(counts, axis=0), num_images=len(counts))
    return {name: {stat: value.tolist() for stat, value in entry.items()} for name, entry in stats.items()}
