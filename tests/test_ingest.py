"""Ingestion as a whole: real episodes in, exactly once, equal to their source."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from support import DATA, VIDEO, Made, ingest, last_json, make_v21, run_module

from ingest.video import packets
from lake import Lake
from lake.images import decode_jpeg, encode_jpeg, fitted_size

pytestmark = pytest.mark.usefixtures("ray")

GOOD = [1, 2, 4, 5, 7, 8]
VIEW = "cam_high"


@pytest.fixture(scope="module")
def g1_lake(g1: Path, ray: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, dict]:
    root = tmp_path_factory.mktemp("g1") / "lake"
    result = ingest(g1, root)
    return Lake(str(root)), result


def lengths(g1: Path) -> dict[int, int]:
    records = (json.loads(line) for line in (g1 / "meta/episodes.jsonl").read_text().splitlines())
    return {record["episode_index"]: record["length"] for record in records}


def test_good_episodes_are_committed_and_the_others_quarantined(g1: Path, g1_lake: tuple[Lake, dict]) -> None:
    lake, result = g1_lake
    assert (result["committed"], result["skipped"], result["quarantined"]) == (6, 0, 3)
    assert result["frames"] == sum(lengths(g1)[i] for i in GOOD)
    episodes = lake.release().episodes(
        columns=["source_index", "num_frames", "fps", "views", "state_dim", "action_dim"]
    )
    assert episodes.column("source_index").to_pylist() == GOOD
    assert episodes.column("num_frames").to_pylist() == [lengths(g1)[i] for i in GOOD]
    assert episodes.to_pylist()[0] | {"num_frames": 0} == {
        "source_index": 1,
        "num_frames": 0,
        "fps": 30.0,
        "views": [VIEW],
        "state_dim": 26,
        "action_dim": 26,
    }
    bad = lake.quarantine().to_pylist()
    assert [(row["source_index"], row["reason"]) for row in bad] == [(i, "video-missing") for i in (0, 3, 6)]
    assert all("episode_00000" in row["message"] for row in bad)
    assert list(lake.verify()) == []


def test_ingesting_again_commits_nothing(g1: Path, g1_lake: tuple[Lake, dict]) -> None:
    lake, first = g1_lake
    again = ingest(g1, lake.uri)
    assert (again["committed"], again["skipped"], again["quarantined"], again["quarantined_new"]) == (0, 6, 3, 0)
    assert again["frames"] == 0
    assert again["release"] == first["release"]


def test_columns_are_bit_equal_to_the_source(g1: Path, g1_lake: tuple[Lake, dict]) -> None:
    release = g1_lake[0].release()
    for row in release.episodes(columns=["episode_uid", "source_index"]).to_pylist():
        source = pq.read_table(g1 / DATA.format(row["source_index"]))
        frames = release.frames(episodes=[row["episode_uid"]])
        for ours, theirs in (("state", "observation.state"), ("action", "action")):
            there = np.stack(source.column(theirs).to_pylist()).astype(np.float32)
            assert np.array_equal(np.stack(frames.column(ours).to_pylist()).astype(np.float32), there)
        times = frames.column("timestamp_s").to_numpy().astype(np.float32)
        assert times.tobytes() == source.column("timestamp").to_numpy().tobytes()
        assert frames.column("frame_index").to_pylist() == list(range(source.num_rows))


def test_video_packets_are_bit_equal_to_the_source(g1: Path, g1_lake: tuple[Lake, dict], tmp_path: Path) -> None:
    release = g1_lake[0].release()
    for row in release.episodes(columns=["episode_uid", "source_index"]).to_pylist():
        copy = tmp_path / "copy.mp4"
        copy.write_bytes(release.video(row["episode_uid"], VIEW))
        source = g1 / VIDEO.format(VIEW, row["source_index"])
        assert list(packets(str(copy))) == list(packets(str(source)))


def test_views_are_the_decoded_frames_resized(g1: Path, g1_lake: tuple[Lake, dict]) -> None:
    release = g1_lake[0].release()
    row = release.episodes("source_index = 4", ["episode_uid"]).to_pylist()[0]
    stored = release.frames(episodes=[row["episode_uid"]], columns=["views"]).column("views").to_pylist()
    errors = []
    with av.open(str(g1 / VIDEO.format(VIEW, 4))) as container:
        for frame, views in zip(container.decode(video=0), stored, strict=True):
            width, height = fitted_size(frame.width, frame.height, 224)
            rgb = frame.reformat(width, height, format="rgb24", interpolation="AREA").to_ndarray()
            expected = decode_jpeg(encode_jpeg(rgb)).astype(int)
            errors.append(np.abs(decode_jpeg(views[0]).astype(int) - expected).mean())
    assert decode_jpeg(stored[0][0]).shape == (168, 224, 3)
    assert max(errors) <= 1.0


def test_statistics_are_those_of_the_frames(g1_lake: tuple[Lake, dict]) -> None:
    release = g1_lake[0].release()
    frames = release.frames(columns=["state", "action"])
    stats = {row["feature"]: row for row in release.stats().to_pylist()}
    for feature in ("state", "action"):
        values = np.stack(frames.column(feature).to_pylist()).astype(np.float64)
        row = stats[feature]
        assert row["count"] == len(values)
        np.testing.assert_allclose(row["mean"], values.mean(0), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(row["std"], values.std(0), rtol=1e-6, atol=1e-9)
        assert row["min"] == values.min(0).tolist()
        assert row["max"] == values.max(0).tolist()
        exact = np.quantile(values, 0.99, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(row["q99"], exact, rtol=0.01, atol=1e-9)


def test_from_and_to_the_object_store(g1: Path, g1_lake: tuple[Lake, dict], bucket: str) -> None:
    import s3fs

    s3fs.S3FileSystem(use_listings_cache=False).put(str(g1), f"{bucket}/g1_bottle", recursive=True)
    result = ingest(f"{bucket}/g1_bottle", f"{bucket}/lake")
    assert (result["committed"], result["quarantined"]) == (6, 3)
    here, there = g1_lake[0].release(), Lake(f"{bucket}/lake").release()
    assert there.id == here.id
    assert ingest(f"{bucket}/g1_bottle", f"{bucket}/lake")["skipped"] == 6
    assert list(Lake(f"{bucket}/lake").verify()) == []


def test_the_command_line_ends_in_one_json_line(tmp_path: Path, g1: Path) -> None:
    done = run_module("jobs.ingest", "--source", g1, "--lake", tmp_path / "lake", "--limit", 3, "--resolution", 64)
    assert done.returncode == 0, done.stderr
    result = last_json(done.stdout)
    assert {"committed", "skipped", "quarantined", "frames", "release", "seconds"} <= result.keys()
    assert (result["committed"], result["quarantined"]) == (2, 1)
    assert "episodes committed" in done.stderr
    release = Lake(str(tmp_path / "lake")).release(result["release"])
    view = release.frames(columns=["views"]).column("views")[0].as_py()[0]
    assert decode_jpeg(view).shape == (48, 64, 3)


def test_a_source_that_grew_gives_only_what_is_new(tmp_path: Path) -> None:
    episodes = [Made(seed=i) for i in range(4)]
    source = make_v21(tmp_path / "toy", episodes[:3])
    lake = tmp_path / "lake"
    first = ingest(source, lake)
    old = Lake(str(lake)).release(first["release"]).frames()
    make_v21(source, episodes)
    second = ingest(source, lake)
    assert (second["committed"], second["skipped"]) == (1, 3)
    assert Lake(str(lake)).release(first["release"]).frames().equals(old)
    assert Lake(str(lake)).release().num_episodes == 4


def test_a_renumbered_source_gives_nothing(tmp_path: Path) -> None:
    episodes = [Made(seed=i) for i in range(4)]
    source = make_v21(tmp_path / "toy", episodes)
    ingest(source, tmp_path / "lake")
    shutil.rmtree(source)
    make_v21(source, [episodes[3], episodes[1], episodes[0]])
    again = ingest(source, tmp_path / "lake")
    assert (again["committed"], again["skipped"]) == (0, 3)
    third = ingest(source, tmp_path / "lake")
    assert (third["committed"], third["skipped"]) == (0, 3)
    assert "decode" not in third["phases_s"], "what was seen under a new index is not read again"


def test_equal_episodes_are_episodes_of_their_own(tmp_path: Path) -> None:
    source = make_v21(tmp_path / "toy", [Made(seed=1), Made(seed=2), Made(seed=1)])
    assert ingest(source, tmp_path / "lake")["committed"] == 3
    make_v21(source, [Made(seed=1), Made(seed=2), Made(seed=1), Made(seed=1)])
    assert ingest(source, tmp_path / "lake")["committed"] == 1
    ordinals = Lake(str(tmp_path / "lake")).release().episodes(columns=["ordinal"]).column(0).to_pylist()
    assert sorted(ordinals) == [0, 0, 1, 2]


def test_a_changed_episode_is_a_new_one(tmp_path: Path) -> None:
    source = make_v21(tmp_path / "toy", [Made(seed=1), Made(seed=2)])
    first = ingest(source, tmp_path / "lake")
    make_v21(source, [Made(seed=1), Made(seed=3)])
    assert ingest(source, tmp_path / "lake")["committed"] == 1
    lake = Lake(str(tmp_path / "lake"))
    assert lake.release(first["release"]).num_episodes == 2
    assert lake.release().num_episodes == 3


def test_two_sources_of_one_name_part_do_not_mix(tmp_path: Path) -> None:
    one = make_v21(tmp_path / "one", [Made(seed=1)])
    assert ingest(one, tmp_path / "lake")["committed"] == 1
    assert ingest(one, tmp_path / "lake", name="other")["committed"] == 1
    sources = Lake(str(tmp_path / "lake")).release().episodes(columns=["source"]).column(0).to_pylist()
    assert sorted(sources) == ["one", "other"]


def test_a_mended_episode_leaves_the_quarantine(tmp_path: Path) -> None:
    source = make_v21(tmp_path / "toy", [Made(seed=1), Made(seed=2)])
    video = source / VIDEO.format("top", 1)
    video.rename(tmp_path / "away.mp4")
    assert ingest(source, tmp_path / "lake")["quarantined"] == 1
    (tmp_path / "away.mp4").rename(video)
    assert ingest(source, tmp_path / "lake")["committed"] == 1
    assert Lake(str(tmp_path / "lake")).quarantine().num_rows == 0


def test_views_of_several_cameras_are_in_one_order(tmp_path: Path) -> None:
    source = make_v21(tmp_path / "toy", [Made(seed=1)], views=("wrist", "front"))
    ingest(source, tmp_path / "lake", map=("view.hand=observation.images.wrist",))
    release = Lake(str(tmp_path / "lake")).release()
    episode = release.episodes(columns=["episode_uid", "views"]).to_pylist()[0]
    assert sorted(episode["views"]) == ["front", "hand"]
    assert all(len(views) == 2 for views in release.frames(columns=["views"]).column(0).to_pylist())
    assert all(release.video(episode["episode_uid"], view) for view in episode["views"])
