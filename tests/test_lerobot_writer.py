"""Tests of ingest/lerobot_writer.py."""

import json
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.lerobot_files import FileLimits
from ingest.lerobot_writer import Column, DatasetSpec, LeRobotWriter, ViewFile
from ingest.video_writer import encode_video

FPS = 20
TOP, WRIST = "observation.images.top", "observation.images.wrist"
COLUMNS = {
    "observation.state": Column(size=3, names=("x", "y", "z")),
    "action": Column(size=2),
    "next.reward": Column(),
    "next.done": Column(dtype="bool"),
}


@dataclass(frozen=True)
class Episode:
    columns: dict[str, np.ndarray]
    tasks: str | list[str]
    views: dict[str, Path]

    @property
    def num_frames(self) -> int:
        return len(self.columns["action"])


def spec(**changes: Any) -> DatasetSpec:
    return DatasetSpec(**({"fps": FPS, "robot_type": "arm", "columns": COLUMNS, "views": (TOP, WRIST)} | changes))


def pictures(num_frames: int, seed: int, size: int = 32) -> list[np.ndarray]:
    coarse = np.random.default_rng(seed).integers(0, 256, (num_frames, 4, 4, 3), np.uint8)
    return list(coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2))


def columns(num_frames: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "observation.state": rng.normal(size=(num_frames, 3)).astype(np.float32),
        "action": rng.uniform(-1, 1, (num_frames, 2)).astype(np.float32),
        "next.reward": rng.normal(size=num_frames).astype(np.float32),
        "next.done": np.arange(num_frames) == num_frames - 1,
    }


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> list[Episode]:
    """Seven episodes of 11 to 29 frames; the wrist's codec changes after the third."""
    folder = tmp_path_factory.mktemp("episodes")
    made = []
    for number in range(7):
        num_frames = 11 + 3 * number
        views = {view: folder / f"{number}-{view}.mp4" for view in (TOP, WRIST)}
        encode_video(pictures(num_frames, number), views[TOP], fps=FPS)
        codec = "h264" if number < 3 else "av1"
        encode_video(pictures(num_frames, 100 + number, 64), views[WRIST], fps=FPS, codec=codec, gop=4)
        tasks = "open it" if number % 2 else ["open it"] * 4 + ["close it"] * (num_frames - 4)
        made.append(Episode(columns(num_frames, number), tasks, views))
    return made


def write(uri: str | Path, episodes: list[Episode], **options: Any) -> None:
    with LeRobotWriter(uri, spec=spec(), **options) as writer:
        for number, episode in enumerate(episodes):
            assert writer.add_episode(episode.columns, tasks=episode.tasks, views=episode.views) == number


@pytest.fixture(scope="module")
def dataset(episodes: list[Episode], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset") / "out"
    write(root, episodes, limits=FileLimits(data_bytes=4000, video_bytes=6_000, files_per_chunk=2))
    return root


def rows(root: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(root.glob("meta/episodes/*/*")) for row in pq.read_table(path).to_pylist()]


def file_of(root: Path, row: dict[str, Any], kind: str) -> Path:
    ending = "parquet" if kind == "data" else "mp4"
    chunk, file = row[f"{kind}/chunk_index"], row[f"{kind}/file_index"]
    return root / kind / f"chunk-{chunk:03d}" / f"file-{file:03d}.{ending}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.dts is not None]


def images(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.array([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_values_are_stored_bit_for_bit(dataset: Path, episodes: list[Episode]) -> None:
    begin = 0
    for number, (row, episode) in enumerate(zip(rows(dataset), episodes, strict=True)):
        table = pq.read_table(file_of(dataset, row, "data"), filters=[("episode_index", "=", number)])
        assert len(table) == row["length"] == episode.num_frames
        for name, values in episode.columns.items():
            stored = np.array(table[name].to_pylist(), values.dtype)
            assert stored.tobytes() == values.tobytes()
        assert table["timestamp"].to_numpy().tobytes() == (np.arange(len(table)) / FPS).astype(np.float32).tobytes()
        assert table["frame_index"].to_pylist() == list(range(len(table)))
        assert table["index"].to_pylist() == list(range(begin, begin + len(table)))
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (begin, begin + len(table))
        begin += len(table)


def test_every_frame_has_its_task(dataset: Path, episodes: list[Episode]) -> None:
    texts = dict(zip(*pq.read_table(dataset / "meta/tasks.parquet").to_pydict().values(), strict=True))
    for row, episode in zip(rows(dataset), episodes, strict=True):
        table = pq.read_table(file_of(dataset, row, "data"), filters=[("episode_index", "=", row["episode_index"])])
        expected = [episode.tasks] * len(table) if isinstance(episode.tasks, str) else episode.tasks
        assert [texts[index] for index in table["task_index"].to_pylist()] == expected
        assert row["tasks"] == list(dict.fromkeys(expected))


@pytest.mark.parametrize("view", [TOP, WRIST])
def test_packets_are_copied(dataset: Path, episodes: list[Episode], view: str) -> None:
    for row, episode in zip(rows(dataset), episodes, strict=True):
        begin, end = (round(row[f"videos/{view}/{side}_timestamp"] * FPS) for side in ("from", "to"))
        assert end - begin == episode.num_frames
        joined = file_of(dataset, row, f"videos/{view}")
        assert packets(joined)[begin:end] == packets(episode.views[view])
        assert np.array_equal(images(joined)[begin:end], images(episode.views[view]))


def test_small_limits_make_several_files(dataset: Path) -> None:
    for kind in ("data", f"videos/{TOP}"):
        places = [(row[f"{kind}/chunk_index"], row[f"{kind}/file_index"]) for row in rows(dataset)]
        assert len(set(places)) > 2
        assert places == sorted(places)
        assert max(file for _, file in places) == 1
        assert len(list((dataset / kind).rglob("file-*"))) == len(set(places))
    for path in (dataset / "videos" / TOP).rglob("*.mp4"):
        assert sum(map(len, packets(path))) <= 6_000


def test_other_codecs_begin_a_new_file(tmp_path: Path, episodes: list[Episode]) -> None:
    write(tmp_path / "out", episodes)
    made = rows(tmp_path / "out")
    assert [row[f"videos/{WRIST}/file_index"] for row in made] == [0, 0, 0, 1, 1, 1, 1]
    assert [row[f"videos/{TOP}/file_index"] for row in made] == [0] * 7
    assert {row["data/file_index"] for row in made} == {0}


def test_videos_do_not_outgrow_the_precision_of_lerobots_clock(tmp_path: Path, episodes: list[Episode]) -> None:
    write(tmp_path / "out", episodes, limits=FileLimits(video_s=32 / FPS))
    assert [row[f"videos/{TOP}/file_index"] for row in rows(tmp_path / "out")] == [0, 0, 1, 2, 3, 4, 5]


def test_statistics_of_an_episode_are_numpys(dataset: Path, episodes: list[Episode]) -> None:
    for row, episode in zip(rows(dataset), episodes, strict=True):
        for name, values in episode.columns.items():
            matrix = values.reshape(len(values), -1).astype(np.float64)
            for stat in ("min", "max", "mean", "std"):
                assert row[f"stats/{name}/{stat}"] == pytest.approx(getattr(matrix, stat)(axis=0))
            assert row[f"stats/{name}/q10"] == pytest.approx(np.quantile(matrix, 0.1, axis=0))
            assert row[f"stats/{name}/count"] == [len(matrix)]


def test_statistics_of_the_dataset_are_of_all_frames(dataset: Path, episodes: list[Episode]) -> None:
    stats = json.loads((dataset / "meta/stats.json").read_text())
    num_frames = sum(episode.num_frames for episode in episodes)
    for name in COLUMNS:
        matrix = np.concatenate([episode.columns[name].reshape(episode.num_frames, -1) for episode in episodes])
        matrix = matrix.astype(np.float64)
        for stat in ("min", "max", "mean", "std"):
            assert stats[name][stat] == pytest.approx(getattr(matrix, stat)(axis=0))
        for stat, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
            assert stats[name][stat] == pytest.approx(np.quantile(matrix, q, axis=0, method="inverted_cdf"), rel=0.004)
        assert stats[name]["count"] == [num_frames]
    assert stats["index"]["max"] == [num_frames - 1]
    for view in (TOP, WRIST):
        pixels = np.concatenate([images(episode.views[view]).reshape(-1, 3) for episode in episodes]) / 255
        for stat in ("min", "max", "mean", "std"):
            assert np.shape(stats[view][stat]) == (3, 1, 1)
            assert np.ravel(stats[view][stat]) == pytest.approx(getattr(pixels, stat)(axis=0))
        assert stats[view]["count"] == [num_frames]


def test_info_describes_the_dataset(dataset: Path, episodes: list[Episode]) -> None:
    info = json.loads((dataset / "meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["robot_type"]) == ("v3.0", FPS, "arm")
    assert (info["total_episodes"], info["total_tasks"], info["chunks_size"]) == (7, 2, 2)
    assert info["total_frames"] == sum(episode.num_frames for episode in episodes)
    features = info["features"]
    assert features["observation.state"] == {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]}
    assert features["action"] == {"dtype": "float32", "shape": [2], "names": None}
    assert features["next.done"]["dtype"] == "bool"
    assert features[TOP]["shape"] == [32, 32, 3]
    assert features[WRIST]["shape"] == [64, 64, 3]
    assert (features[TOP]["dtype"], features[TOP]["info"]["video.codec"]) == ("video", "h264")
    stored = pq.read_schema(next((dataset / "data").rglob("*.parquet"))).names
    assert stored == [name for name, feature in features.items() if feature["dtype"] != "video"]


def test_frames_before_and_behind_an_episode_are_copied_but_not_its_own(tmp_path: Path) -> None:
    encode_video(pictures(20, 0), tmp_path / "long.mp4", fps=FPS, gop=100)
    only_top = spec(views=(TOP,))
    with LeRobotWriter(tmp_path / "out", spec=only_top) as writer:
        for seed in range(2):
            file = ViewFile(tmp_path / "long.mp4", num_lead_frames=5)
            writer.add_episode(columns(12, seed), tasks="go", views={TOP: file})
    first, second = rows(tmp_path / "out")
    assert [first[f"videos/{TOP}/{side}_timestamp"] for side in ("from", "to")] == [5 / FPS, 17 / FPS]
    assert [second[f"videos/{TOP}/{side}_timestamp"] for side in ("from", "to")] == [25 / FPS, 37 / FPS]
    assert packets(file_of(tmp_path / "out", first, f"videos/{TOP}")) == 2 * packets(tmp_path / "long.mp4")
    own = images(tmp_path / "long.mp4")[5:17].reshape(-1, 3) / 255
    assert np.ravel(first[f"stats/{TOP}/mean"]) == pytest.approx(own.mean(axis=0))


def test_a_dataset_needs_no_views(tmp_path: Path) -> None:
    with LeRobotWriter(tmp_path / "out", spec=spec(views=())) as writer:
        writer.add_episode(columns(5, 0), tasks="go", timestamp=np.array([0, 1, 3, 7, 8], np.float32))
    assert json.loads((tmp_path / "out/meta/info.json").read_text())["video_path"] is None
    assert not (tmp_path / "out/videos").exists()


def test_an_exception_leaves_nothing(tmp_path: Path, episodes: list[Episode]) -> None:
    def write_two() -> None:
        with LeRobotWriter(tmp_path / "out", spec=spec()) as writer:
            writer.add_episode(episodes[0].columns, tasks="go", views=episodes[0].views)
            assert names(tmp_path) != []
            raise InterruptedError("the robot fell over")

    with pytest.raises(InterruptedError):
        write_two()
    assert names(tmp_path) == []


def test_a_dataset_without_episodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one episode"), LeRobotWriter(tmp_path / "out", spec=spec()):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"action": np.zeros((11, 2), np.float32)}}, "the dataset has"),
        ({"action": np.zeros((11, 2), np.float64)}, "action is float64"),
        ({"action": np.zeros((11, 3), np.float32)}, r"it must be float32 \(11, 2\)"),
        ({"action": np.full((11, 2), np.nan, np.float32)}, "not finite in frame 0"),
        ({"next.reward": np.zeros(10, np.float32)}, "next.reward is"),
        ({"num_frames": 12}, "has 11 frames; the episode needs 12"),
        ({"num_frames": 10}, "has 11 frames; the episode needs 10"),
        ({"num_frames": 0}, "no frames"),
        ({"tasks": ["go"] * 3}, "3 tasks for 11 frames"),
        ({"views": {TOP: "0"}}, "views are"),
        ({"timestamp": (np.arange(11) / FPS + 0.01).astype(np.float32)}, "up to 0.01"),
        ({"timestamp": np.arange(11) / FPS}, "timestamp is float64"),
        ({"size": 64}, "is 64 x 64; observation.images.top began as 32 x 32"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused_and_leaves_no_trace(
    tmp_path: Path, episodes: list[Episode], change: dict[str, Any], message: str
) -> None:
    good = episodes[0]
    bad = {"tasks": "never seen", "views": dict(good.views)}
    values = columns(change.get("num_frames", 11), 1)
    bad |= {name: change[name] for name in ("tasks", "views", "timestamp") if name in change}
    values |= {name: change[name] for name in COLUMNS if name in change}
    if "size" in change:
        encode_video(pictures(11, 0, change["size"]), tmp_path / "large.mp4", fps=FPS)
        bad["views"][TOP] = tmp_path / "large.mp4"
    with LeRobotWriter(tmp_path / "out", spec=spec()) as writer:
        writer.add_episode(good.columns, tasks="go", views=good.views)
        with pytest.raises(ValueError, match=message):
            writer.add_episode(change.get("columns", values), **bad)
        writer.add_episode(good.columns, tasks="go", views=good.views)
    table = pq.read_table(tmp_path / "out/data")
    assert table["episode_index"].to_pylist() == [0] * 11 + [1] * 11
    assert pq.read_table(tmp_path / "out/meta/tasks.parquet")["task"].to_pylist() == ["go"]
    assert len(packets(tmp_path / f"out/videos/{TOP}/chunk-000/file-000.mp4")) == 22


def test_a_writer_that_failed_half_way_finishes_nothing(tmp_path: Path, episodes: list[Episode]) -> None:
    def write_around_a_failure() -> None:
        with LeRobotWriter(tmp_path / "out", spec=spec(), limits=FileLimits(data_bytes=1)) as writer:
            writer.add_episode(episodes[0].columns, tasks="go", views=episodes[0].views)
            (scratch,) = tmp_path.iterdir()
            (scratch / "dataset/data/chunk-000/file-001.parquet").mkdir()
            with pytest.raises(OSError, match="file-001"):
                writer.add_episode(episodes[1].columns, tasks="go", views=episodes[1].views)
            with pytest.raises(ValueError, match="written half"):
                writer.add_episode(episodes[1].columns, tasks="go", views=episodes[1].views)

    with pytest.raises(ValueError, match="all of them whole"):
        write_around_a_failure()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        {"fps": 0},
        {"columns": {}},
        {"columns": {"index": Column()}},
        {"columns": {"a/b": Column()}},
        {"views": (TOP, TOP)},
        {"views": ("action",)},
    ],
)
def test_a_spec_that_lerobot_could_not_read_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs both|LeRobot's own"):
        spec(**change)


def test_names_must_fit_the_size() -> None:
    with pytest.raises(ValueError, match="2 names for 3 dimensions"):
        Column(size=3, names=("x", "y"))


def test_memory_does_not_grow_with_the_number_of_episodes(tmp_path: Path) -> None:
    wide = spec(columns={"observation.state": Column(size=40)}, views=())
    rng = np.random.default_rng(0)
    used = []
    with LeRobotWriter(tmp_path / "out", spec=wide) as writer:
        tracemalloc.start()
        for number in range(6 * 64):
            writer.add_episode({"observation.state": rng.normal(size=(20, 40)).astype(np.float32)}, tasks="go")
            if number % 64 == 63:
                used.append(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes())
        tracemalloc.stop()
    assert used[5] < 1.25 * used[2]
    assert len(rows(tmp_path / "out")) == 384


def test_an_object_store_gets_the_same_dataset(tmp_path: Path, episodes: list[Episode], bucket: str) -> None:
    uri = f"{bucket}/some/dataset"
    write(tmp_path / "here", episodes)
    write(uri, episodes)
    fs, root = fsspec.core.url_to_fs(uri)
    fs.invalidate_cache()
    there = {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}
    files = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert there == {str(path.relative_to(tmp_path / "here")): path.read_bytes() for path in files}
    with pytest.raises(ValueError, match="is not empty"):
        LeRobotWriter(uri, spec=spec())


def test_after_a_failed_upload_an_object_store_can_be_written_to_again(episodes: list[Episode], bucket: str) -> None:
    uri = f"{bucket}/failed"
    fs, root = fsspec.core.url_to_fs(uri)

    def write_some() -> None:
        with LeRobotWriter(uri, spec=spec(), limits=FileLimits(data_bytes=1)) as writer:
            for episode in episodes:
                writer.add_episode(episode.columns, tasks="go", views=episode.views)
            fs.invalidate_cache()
            assert fs.find(root) != []
            raise InterruptedError("stopped by hand")

    with pytest.raises(InterruptedError):
        write_some()
    write(uri, episodes)
    fs.invalidate_cache()
    assert f"{root}/meta/info.json" in fs.find(root)
    assert f"{root}/data/chunk-000/file-001.parquet" not in fs.find(root)
