"""Tests of lake/lake.py and lake/release.py."""

import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from lakes import TOY, add, add_orphans, make_sources, make_unreleased, uids
from s3_proxy import s3_proxy
from support import ROOT, VIDEO, Made, make_v21

from ingest.video import packets
from jobs.store import Store
from lake import Lake
from lake.errors import (
    LakeDamagedError,
    LakeExistsError,
    LakeNotFoundError,
    LakeTooNewError,
    ReleaseExistsError,
    ReleaseNotFoundError,
    StoreUnreachableError,
    StoreUnsafeError,
)
from lake.images import decode_jpeg
from lake.schema import FRAMES, TABLES
from lake.tables import open_table

RAY_USES_WHAT_LANCE_DEPRECATES = pytest.mark.filterwarnings("ignore:DataFile.path:DeprecationWarning")


def sorted_rows(table: pa.Table) -> list[dict[str, Any]]:
    return table.sort_by([("episode_uid", "ascending"), ("frame_index", "ascending")]).to_pylist()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def unreleased(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_unreleased(tmp_path_factory.mktemp("unreleased") / "lake", sources).uri)


@pytest.fixture(scope="module")
def released(unreleased: Path, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A copy of that lake, released; tests only read it."""
    root = tmp_path_factory.mktemp("released") / "lake"
    shutil.copytree(unreleased, root)
    lake = Lake(str(root))
    lake.make_release()
    return lake


@pytest.fixture
def fresh(unreleased: Path, tmp_path: Path) -> Lake:
    """A copy of the unreleased lake for one test."""
    shutil.copytree(unreleased, tmp_path / "lake")
    return Lake(str(tmp_path / "lake"))


@pytest.fixture
def lake(root: str, sources: Path) -> Lake:
    """A lake with one released source, on the file system, then in the store."""
    lake = Lake.create(root)
    add(lake, sources / "toy")
    lake.make_release()
    return lake


# Making and opening.


def test_a_new_lake_is_empty(root: str) -> None:
    lake = Lake.create(root)
    assert lake.uri == root
    assert repr(lake) == f"Lake({root!r})"
    assert lake.releases() == []
    assert lake.quarantine().num_rows == 0
    assert list(lake.verify()) == []
    for table in TABLES:
        assert open_table(lake.storage, table).count_rows() == 0
    with pytest.raises(ReleaseNotFoundError, match="has no release yet; ingest something"):
        lake.release()
    with pytest.raises(ReleaseNotFoundError, match=r"no release 'r1' in .*; the newest are: none"):
        lake.release("r1")


def test_a_lake_is_made_once(root: str) -> None:
    Lake.create(root)
    with pytest.raises(LakeExistsError, match=f"there is a lake at {root} already"):
        Lake.create(root)
    assert Lake.create(root, exist_ok=True).releases() == []


def test_a_lake_can_be_made_by_several_at_once(root: str, store: Store, sources: Path) -> None:
    code = (
        "import sys, time\nfrom lake import Lake\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\nLake.create(sys.argv[1], exist_ok=True)"
    )
    start = str(time.time() + 2.0)
    makers = [subprocess.Popen([sys.executable, "-c", code, root, start], cwd=ROOT) for _ in range(3)]
    assert [maker.wait(60) for maker in makers] == [0, 0, 0]
    lake = Lake(root)
    assert all(open_table(lake.storage, table).version == 1 for table in TABLES)
    add(lake, sources / "other")
    assert lake.make_release().num_episodes == 2


def test_a_store_that_ignores_conditions_is_refused(store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_proxy(store) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.strip_conditional()
        with pytest.raises(StoreUnsafeError, match=r"ignores conditional puts .*Use one that honours"):
            Lake.create(f"{bucket}/lake")
        proxy.behave()
        with pytest.raises(LakeNotFoundError):
            Lake(f"{bucket}/lake")
        assert Lake.create(f"{bucket}/lake").releases() == []


@pytest.mark.parametrize(
    ("uri", "error", "says"),
    [
        ("gs://bucket/lake", ValueError, "a lake lives at a path, file:// or s3://, not gs://"),
        ("http://127.0.0.1/lake", ValueError, "not http://"),
        ("s3://", ValueError, "no bucket in 's3://'; write s3://BUCKET/PATH"),
        ("", ValueError, "the lake's URI is empty"),
    ],
)
@pytest.mark.parametrize("make", [Lake, Lake.create], ids=["open", "create"])
def test_a_uri_that_can_be_no_lake_is_a_value_error(
    make: Callable[[str], Lake], uri: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        make(uri)


def test_where_no_lake_is_none_is_made(tmp_path: Path) -> None:
    for uri in (str(tmp_path / "typo"), f"file://{tmp_path}/typo", str(tmp_path)):
        with pytest.raises(LakeNotFoundError, match=r"no lake at .*; make one with Lake\.create\("):
            Lake(uri)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_place_for_a_lake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    for make in (Lake, Lake.create):
        with pytest.raises(StoreUnreachableError, match="Not a directory"):
            make(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "here"


def test_a_lake_can_be_named_as_a_file_uri_or_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = str(tmp_path / "lake")
    assert Lake.create("lake").uri == uri
    assert Lake(f"file://{uri}").uri == Lake(f"{uri}/").uri == uri


@pytest.mark.parametrize(
    ("marker", "error", "says"),
    [
        (b'{"format_version": 99}', LakeTooNewError, "has format 99; this robolake reads up to .* Upgrade robolake"),
        (b'{"format_version": "1"}', LakeDamagedError, "format_version='1', expected a number"),
        (b"{}", LakeDamagedError, "lake.json is not what a lake's is"),
        (b"[]", LakeDamagedError, "lake.json is not what a lake's is"),
        (b"", LakeDamagedError, "lake.json is not what a lake's is"),
        (b"\xff", LakeDamagedError, "lake.json is not what a lake's is"),
    ],
)
def test_a_marker_of_another_kind_is_refused(tmp_path: Path, marker: bytes, error: type[Exception], says: str) -> None:
    Lake.create(str(tmp_path))
    (tmp_path / "lake.json").write_bytes(marker)
    for exist_ok in (False, True):
        with pytest.raises((error, LakeExistsError) if not exist_ok else error):
            Lake.create(str(tmp_path), exist_ok=exist_ok)
    with pytest.raises(error, match=says):
        Lake(str(tmp_path))


# Releases and their names.


def test_releases_are_listed_and_found_by_name(root: str, sources: Path) -> None:
    lake = Lake.create(root)
    add(lake, sources / "toy")
    first = lake.make_release()
    assert (first.num_episodes, first.num_frames) == (3, 12 + 13 + 14)
    assert first.created_at <= datetime.now(UTC)
    assert lake.make_release().name == first.name, "the same state is the same release"
    add(lake, sources / "other")
    second = lake.make_release()
    assert second.id != first.id
    assert [release.name for release in lake.releases()] == [first.name, second.name]
    assert lake.release() == second
    assert lake.release(first.name) == first
    with pytest.raises(ReleaseNotFoundError, match=f'no release "it\'s" in .*: {first.name}, {second.name}$'):
        lake.release("it's")


def test_a_release_can_have_more_names(root: str, sources: Path) -> None:
    lake = Lake.create(root)
    add(lake, sources / "toy")
    first = lake.make_release("paper-v1")
    assert first.name == "paper-v1"
    assert lake.tag("paper-v1", first) == first
    also = lake.tag("best", first)
    assert (also.id, also.versions) == (first.id, first.versions)
    add(lake, sources / "other")
    second = lake.make_release()
    says = rf"release 'paper-v1' exists and holds other contents \({first.id} != {second.id}\)"
    for name_taken in (lambda: lake.tag("paper-v1", second), lambda: lake.make_release("paper-v1")):
        with pytest.raises(ReleaseExistsError, match=says):
            name_taken()
    assert lake.release("paper-v1").id == lake.release("best").id == first.id
    assert lake.release() == second, "a second name does not make an old state the newest"
    assert lake.tag("old", lake.release("best")).id == first.id
    assert lake.release().id == second.id


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a/b", "../x", ".hidden", "-dash", "naïve", "a'b", "x" * 101, "r7", "r7.2"]
)
def test_some_names_cannot_be_given(released: Lake, name: str) -> None:
    with pytest.raises(ValueError, match=f"release name {name!r}".replace("\\", "\\\\").replace(".", r"\.")):
        released.tag(name, released.release())
    assert len(released.releases()) == 1


def test_a_name_of_the_lake_itself_is_never_taken_by_hand(fresh: Lake, sources: Path) -> None:
    first = fresh.make_release()
    following = f"r{first.versions['episodes'] + 1}"
    with pytest.raises(ValueError, match="the lake itself gives names of this form"):
        fresh.tag(following, first)
    make_v21(sources / "third", [Made(seed=40)])
    add(fresh, sources / "third")
    assert fresh.make_release().num_episodes == first.num_episodes + 1


# Reading a release.


def test_episodes_are_ordered_and_chosen_by_condition_and_columns(released: Lake) -> None:
    release = released.release()
    table = release.episodes(columns=["source_index", "source", "num_frames"])
    assert table.column_names == ["source_index", "source", "num_frames"]
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert rows == [(0, "other", 12), (1, "other", 12), (0, "toy", 12), (1, "toy", 13), (2, "toy", 14)]
    assert release.episodes("num_frames > 12 AND source = 'toy'", ["source_index"]).column(0).to_pylist() == [1, 2]
    assert release.episodes("array_has(tasks, 'task 1')", ["source_index"]).column(0).to_pylist() == [1]
    assert release.episodes("source = 'none'").num_rows == 0
    whole = release.episodes("source = 'toy'").to_pylist()[0]
    assert whole["views"] == ["top", "wrist"]
    assert (whole["embodiment"], whole["split"], whole["fps"]) == ("toy", "train", 10.0)
    assert (whole["state_dim"], whole["action_dim"], whole["state_names"]) == (3, 2, ["x", "y", "z"])


def test_frames_are_those_of_the_episodes_and_nothing_else(released: Lake) -> None:
    release = released.release()
    frames = release.frames()
    assert frames.schema.equals(FRAMES)
    assert frames.num_rows == release.num_frames == 12 + 13 + 14 + 24
    assert set(frames.column("episode_uid").to_pylist()) == set(release.episodes().column("episode_uid").to_pylist())
    for made, uid in zip(TOY, uids(release), strict=True):
        own = release.frames(episodes=[uid])
        assert own.column("frame_index").to_pylist() == list(range(made.num_frames))
        rng = np.random.default_rng(made.seed)
        state = rng.normal(size=(made.num_frames, 3)).astype(np.float32)
        assert np.array_equal(np.array(own.column("state").to_pylist(), np.float32), state)
        assert all(
            [decode_jpeg(view).shape for view in views] == [(48, 64, 3)] * 2
            for views in own.column("views").to_pylist()
        )


def test_frames_are_chosen_by_condition_columns_and_episodes(released: Lake) -> None:
    release = released.release()
    some = release.frames("frame_index = 3 AND timestamp_s < 1", ["frame_index", "action"])
    assert some.column_names == ["frame_index", "action"]
    assert some.column(0).to_pylist() == [3] * 5
    backwards = list(reversed(uids(release)))
    chosen = release.frames(episodes=backwards, columns=["episode_uid"]).column(0).to_pylist()
    lengths = [made.num_frames for made in reversed(TOY)]
    assert chosen == [uid for uid, length in zip(backwards, lengths, strict=True) for _ in range(length)]
    assert release.frames("frame_index < 0").schema.equals(FRAMES)
    assert release.frames("frame_index < 0").num_rows == release.frames(episodes=[]).num_rows == 0
    with pytest.raises(KeyError, match="no such episode: nobody"):
        release.frames(episodes=["nobody"])
    with pytest.raises(ValueError, match="`where` or `episodes`, not both"):
        release.frames("frame_index = 1", episodes=backwards)


def test_a_scan_streams_batches(released: Lake) -> None:
    release = released.release()
    scan = release.scan(columns=["frame_index"], batch_rows=5)
    assert isinstance(scan, Iterator)
    assert 0 < next(scan).num_rows <= 5
    batches = list(release.scan(batch_rows=5))
    assert max(batch.num_rows for batch in batches) == 5
    assert pa.Table.from_batches(batches).equals(release.frames())
    by_episode = list(release.scan(episodes=uids(release), batch_rows=5))
    assert [batch.num_rows for batch in by_episode] == [5, 5, 2, 5, 5, 3, 5, 5, 4]


def test_frames_can_be_taken_by_row(released: Lake) -> None:
    release = released.release()
    row = release.episodes("source = 'toy' AND source_index = 1").to_pylist()[0]
    first = row["frames_first_row"]
    taken = release.take_frames([first + 7, first, first + 3], ["episode_uid", "frame_index"])
    assert taken.to_pylist() == [{"episode_uid": row["episode_uid"], "frame_index": i} for i in (7, 0, 3)]
    with pytest.raises(LakeDamagedError, match="1 of 2 rows are gone"):
        release.take_frames([first, 10**6])


@pytest.mark.parametrize("where", ["nonsense =", "nope = 1", "", "frame_index", "num_frames = 'x'", "a = 'it's'"])
@pytest.mark.parametrize("read", ["episodes", "frames", "scan", "dataset"])
def test_a_condition_that_makes_no_sense_is_named(released: Lake, ray: object, read: str, where: str) -> None:
    with pytest.raises(ValueError, match="cannot understand where=") as caught:
        list(getattr(released.release(), read)(where))
    assert repr(where) in str(caught.value)


@pytest.mark.parametrize("read", ["episodes", "frames", "scan", "dataset"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(released: Lake, ray: object, read: str) -> None:
    with pytest.raises(ValueError, match=r"unknown columns \['nope'\]; there are episode_uid, "):
        list(getattr(released.release(), read)(columns=["nope"]))


def test_a_column_that_is_not_there_is_named_for_chosen_rows_also(released: Lake) -> None:
    release = released.release()
    with pytest.raises(ValueError, match=r"unknown columns \['nope'\]; there are episode_uid, "):
        release.frames(episodes=uids(release), columns=["nope"])
    with pytest.raises(ValueError, match=r"unknown columns \['nope'\]; there are episode_uid, "):
        release.take_frames([0], ["nope"])


@pytest.mark.parametrize("read", ["frames", "scan", "dataset"])
def test_a_resolution_that_was_never_derived_is_named(released: Lake, ray: object, read: str) -> None:
    with pytest.raises(ValueError, match="has no table frames_448; it has derived, episodes, frames, "):
        list(getattr(released.release(), read)(resolution=448))


@RAY_USES_WHAT_LANCE_DEPRECATES
def test_a_ray_dataset_has_the_same_rows(lake: Lake, ray: Any) -> None:
    add_orphans(lake, 3)
    release = lake.release()
    dataset = release.dataset()
    assert isinstance(dataset, ray.data.Dataset)
    assert dataset.schema().names == FRAMES.names
    rows = pa.Table.from_pylist(dataset.take_all(), FRAMES)
    assert sorted_rows(rows) == sorted_rows(release.frames())
    chosen = release.dataset("frame_index < 2", ["episode_uid", "frame_index"]).take_all()
    assert chosen == release.frames("frame_index < 2", ["episode_uid", "frame_index"]).to_pylist()
    assert release.dataset("frame_index < 0").count() == 0


@RAY_USES_WHAT_LANCE_DEPRECATES
def test_a_ray_dataset_shows_no_orphans(released: Lake, ray: object) -> None:
    release = released.release()
    assert open_table(released.storage, "frames", release.versions["frames"]).count_rows() == release.num_frames + 12
    rows = pa.Table.from_pylist(release.dataset().take_all(), FRAMES)
    assert sorted_rows(rows) == sorted_rows(release.frames())


def test_a_video_has_the_packets_of_the_source(released: Lake, sources: Path, tmp_path: Path) -> None:
    release = released.release()
    for index, uid in enumerate(uids(release)):
        for view in ("top", "wrist"):
            (tmp_path / "copy.mp4").write_bytes(release.video(uid, view))
            source = sources / "toy" / VIDEO.format(view, index)
            assert list(packets(str(tmp_path / "copy.mp4"))) == list(packets(str(source)))
    described = [row for row, _ in release.open_videos(uids(release)[0])]
    assert [(row["view"], row["codec"], row["num_frames"]) for row in described] == [
        ("top", "h264", 12),
        ("wrist", "h264", 12),
    ]


def test_a_video_that_is_not_there_is_a_key_error(released: Lake) -> None:
    release = released.release()
    with pytest.raises(KeyError, match=f"episode {uids(release)[0]} has no view 'side' in release {release.name}"):
        release.video(uids(release)[0], "side")
    for uid in ("nobody", "x' OR '1'='1"):
        with pytest.raises(KeyError, match=f"release {release.name} has no episode"):
            release.video(uid, "top")


def test_statistics_are_by_source_and_embodiment(released: Lake) -> None:
    release = released.release()
    rows = {(row["source"], row["embodiment"], row["feature"]): row for row in release.stats(split=None).to_pylist()}
    assert set(rows) == {
        *(("toy", "toy", feature) for feature in ("action", "state", "view.top", "view.wrist")),
        *(("other", "arm", feature) for feature in ("action", "state", "view.top")),
    }
    for (source, _, feature), row in rows.items():
        if feature in ("state", "action"):
            values = np.array(release.frames(episodes=uids(release, source)).column(feature).to_pylist(), np.float64)
            assert row["count"] == len(values)
            np.testing.assert_allclose(row["mean"], values.mean(0), rtol=1e-9)
            np.testing.assert_allclose(row["std"], values.std(0), rtol=1e-9)
            assert (row["min"], row["max"]) == (values.min(0).tolist(), values.max(0).tolist())
        else:
            assert all(
                0 <= low <= mean <= high <= 1
                for low, mean, high in zip(row["min"], row["mean"], row["max"], strict=True)
            )


def test_statistics_can_be_of_one_split(released: Lake) -> None:
    release = released.release()
    counts = {
        split: {(row["source"], row["feature"]): row["count"] for row in release.stats(split=split).to_pylist()}
        for split in ("train", "val", "test", "it's")
    }
    assert counts["train"]["toy", "state"] == 12 + 13 + 14
    assert counts["train"]["other", "state"] == counts["val"]["other", "state"] == 12
    assert ("toy", "state") not in counts["val"]
    assert counts["test"] == counts["it's"] == {}


def test_a_release_pickles_small_and_reads_in_another_process(lake: Lake, tmp_path: Path) -> None:
    release = lake.release()
    release.frames(columns=["frame_index"])  # Fills what it keeps for itself, which must not travel.
    pickled = pickle.dumps(release)
    assert len(pickled) < 2000
    assert b"SECRET" not in pickled.upper()
    (tmp_path / "release.pickle").write_bytes(pickled)
    code = (
        "import pickle, sys\nfrom pathlib import Path\nrelease = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "print(release.name, release.frames(columns=['action']).num_rows, len(release.video(sys.argv[2], 'top')))"
    )
    uid = uids(release)[0]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "release.pickle"), uid],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout == f"{release.name} {release.num_frames} {len(release.video(uid, 'top'))}\n", done.stderr


def test_a_release_stays_as_it_is(lake: Lake, sources: Path) -> None:
    release = lake.release()
    frames, episodes, stats = release.frames(), release.episodes(), release.stats()
    add(lake, sources / "other")
    add_orphans(lake, 7)
    newer = lake.make_release()
    assert newer.num_episodes == 5
    again = Lake(lake.uri).release(release.name)
    assert again == release
    assert again.frames().equals(frames)
    assert again.episodes().equals(episodes)
    assert again.stats().equals(stats)


# Quarantine.


def test_quarantine_says_what_is_wrong_and_retry_forgets_it(fresh: Lake) -> None:
    [row] = fresh.quarantine().to_pylist()
    assert list(row) == ["source", "source_index", "reason", "message"]
    assert (row["source"], row["source_index"], row["reason"]) == ("other", 2, "video-missing")
    assert fresh.retry("toy") == fresh.retry("it's") == 0
    assert fresh.retry("other") == 1
    assert fresh.quarantine().num_rows == fresh.retry("other") == 0


# Cleaning up.


def test_cleanup_keeps_what_a_release_pins(lake: Lake, sources: Path) -> None:
    first = lake.release()
    frames = first.frames()
    lake.tag("keep", first)
    add(lake, sources / "other")
    open_table(lake.storage, "frames").optimize.compact_files()
    add_orphans(lake, 2)
    open_table(lake.storage, "frames").optimize.compact_files()
    lake.make_release()
    removed = lake.cleanup(older_than=timedelta(0))
    assert removed["versions"] > 0
    assert removed["bytes"] > 0
    for release in (first, Lake(lake.uri).release("keep")):
        again = replace(release)
        assert again.frames().equals(frames)
        assert again.video(uids(again)[0], "wrist")
        assert again.stats().num_rows == 4
    assert list(lake.verify()) == []
    assert lake.cleanup(older_than=timedelta(0))["bytes"] == 0, "nothing is left to remove"


def test_cleanup_does_not_accept_a_negative_age(released: Lake) -> None:
    with pytest.raises(ValueError, match="is negative"):
        released.cleanup(older_than=timedelta(seconds=-1))
