"""Statistics of a real lake are those of numpy over its training frames, and refuse to be what they are not."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lakes import add, add_orphans, make_sources, make_unreleased
from support import DATA, Made, make_v21

from lake import Lake, Release
from lake.errors import LakeDamagedError
from lake.sketch import RELATIVE_ERROR
from train import statistics
from train.statistics import Actions, FeatureStats, Statistics, StatisticsMissingError

any_speed = settings(deadline=None)
VECTORS = ("mean", "std", "min", "max", "q01", "q99")
HORIZON = 5
ARM = {"toy": (1, 0), "big": (0, 1, 3)}
"""Relative dimensions by embodiment; those of ``toy`` in no order. The big arm's dimension 2 is a gripper."""


def widen(root: Path, state_dim: int, action_dim: int) -> Path:
    """Give the episodes of a source that ``make_v21`` wrote other numbers of dimensions; 0 takes the state away."""
    info = json.loads((root / "meta/info.json").read_text())
    for index in range(info["total_episodes"]):
        path = root / DATA.format(index)
        table = pq.read_table(path).drop_columns(["observation.state", "action"])
        rng = np.random.default_rng(100 + index)
        for name, dim in (("observation.state", state_dim), ("action", action_dim)):
            if dim:
                values_TD = np.cumsum(rng.normal(size=(table.num_rows, dim)), axis=0).astype(np.float32)
                table = table.append_column(name, pa.array(values_TD.tolist(), pa.list_(pa.float32(), dim)))
        pq.write_table(table, path)
    for name, dim in (("observation.state", state_dim), ("action", action_dim)):
        del info["features"][name]
        if dim:
            info["features"][name] = {"dtype": "float32", "shape": [dim], "names": None}
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Four sources of four embodiments with orphans between them.

    toy: all train. other: one train, one validation. big: 5 states, 4 actions. blind: no state; its episodes are
    shorter than a chunk.
    """
    root = make_sources(tmp_path_factory.mktemp("sources"))
    widen(make_v21(root / "wide", [Made(seed=30), Made(seed=31, num_frames=40)], robot_type="big"), 5, 4)
    widen(make_v21(root / "dark", [Made(seed=40, num_frames=HORIZON - 2)], robot_type="blind"), 0, 3)
    lake = Lake.create(str(tmp_path_factory.mktemp("statistics") / "lake"))
    for name in ("toy", "other", "wide", "dark"):
        add_orphans(lake, 3)
        add(lake, root / name)
    return lake.make_release()


@pytest.fixture(scope="module")
def absolute(release: Release) -> Statistics:
    return Statistics.of_release(release)


def frames_of(release: Release, where: str) -> dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]]:
    """Return (state, action) of each episode, by source and embodiment."""
    found: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for row in release.episodes(where).to_pylist():
        frames = release.frames(episodes=[row["episode_uid"]], columns=["frame_index", "state", "action"]).to_pylist()
        assert [frame["frame_index"] for frame in frames] == list(range(row["num_frames"]))
        state, action = (np.array([frame[name] for frame in frames], np.float64) for name in ("state", "action"))
        found.setdefault((row["source"], row["embodiment"]), []).append((state, action))
    return found


def chunk_actions(state: np.ndarray, action: np.ndarray, dims: tuple[int, ...], horizon: int) -> np.ndarray:
    rows = []
    for t in range(len(action)):
        for h in range(horizon):
            if t + h < len(action):
                row = action[t + h].copy()
                for dim in dims:
                    row[dim] -= state[t, dim]
                rows.append(row)
    return np.array(rows)


def assert_like_numpy(stats: FeatureStats, values: np.ndarray) -> None:
    assert stats.count == len(values)
    np.testing.assert_allclose(stats.mean, values.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats.std, values.std(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats.min, values.min(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats.max, values.max(axis=0), atol=1e-6)
    for name, q in (("q01", 0.01), ("q99", 0.99)):
        exact = np.quantile(values, q, axis=0, method="inverted_cdf")
        assert (np.abs(getattr(stats, name) - exact) <= RELATIVE_ERROR * np.abs(exact) + 1e-6).all()


def assert_same(one: FeatureStats, other: FeatureStats) -> None:
    assert one.count == other.count
    for name in VECTORS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


# Absolute actions.


def test_statistics_are_those_of_numpy_over_the_training_frames(release: Release, absolute: Statistics) -> None:
    frames = frames_of(release, "split = 'train'")
    assert absolute.release_id == release.id
    assert absolute.actions == Actions()
    expected = {(*key, feature) for key in frames for feature in ("state", "action")} - {("dark", "blind", "state")}
    assert set(absolute.features) == expected
    for key, episodes in frames.items():
        assert_like_numpy(absolute.get(*key, "action"), np.concatenate([action for _, action in episodes]))
        if key[0] != "dark":
            assert_like_numpy(absolute.get(*key, "state"), np.concatenate([state for state, _ in episodes]))


def test_validation_episodes_do_not_leak_in(release: Release, absolute: Statistics) -> None:
    (_, action), (_, held_out) = frames_of(release, "source = 'other'")["other", "arm"]
    assert release.episodes("source = 'other'", ["split"]).column(0).to_pylist() == ["train", "val"]
    moved = Statistics.of_relative_actions(release, relative_dims={"arm": (0,)}, horizon=2, where="source = 'other'")
    assert absolute.get("other", "arm", "action").count == moved.get("other", "arm", "state").count == len(action)
    wider = np.concatenate([action, held_out])
    assert (wider.max(axis=0) != action.max(axis=0)).any() or (wider.min(axis=0) != action.min(axis=0)).any()
    assert_like_numpy(absolute.get("other", "arm", "action"), action)


# Relative actions.


@pytest.mark.parametrize("batch_rows", [1, 7, 4096])
def test_relative_statistics_are_those_of_every_chunk(
    release: Release, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_BLOCK_VALUES", 30)  # Several blocks and merges even of few frames.
    found = Statistics.of_relative_actions(release, relative_dims=ARM, horizon=HORIZON, batch_rows=batch_rows)
    assert found.actions == Actions(relative_dims={"big": (0, 1, 3), "toy": (0, 1)}, horizon=HORIZON)
    for (source, embodiment), episodes in frames_of(release, "split = 'train'").items():
        dims = ARM.get(embodiment, ())
        chunks = [chunk_actions(s, a, dims, HORIZON) if dims else a for s, a in episodes]
        assert_like_numpy(found.get(source, embodiment, "action"), np.concatenate(chunks))
        if source != "dark":
            assert_like_numpy(found.get(source, embodiment, "state"), np.concatenate([s for s, _ in episodes]))
    assert ("dark", "blind", "state") not in found.features


def test_relative_statistics_differ_from_absolute_ones(release: Release, absolute: Statistics) -> None:
    found = Statistics.of_relative_actions(release, relative_dims=ARM, horizon=HORIZON)
    one, other = found.get("wide", "big", "action"), absolute.get("wide", "big", "action")
    assert (np.abs(one.std - other.std)[[0, 1, 3]] > 0.1).all()
    assert one.max[2] == other.max[2]
    # What is not relative is counted as of_release counts it.
    assert_same(found.get("dark", "blind", "action"), absolute.get("dark", "blind", "action"))


@pytest.mark.parametrize("horizon", [1, 12, 100])
def test_chunks_end_with_their_episode(release: Release, horizon: int) -> None:
    found = Statistics.of_relative_actions(release, relative_dims={"toy": (0,)}, horizon=horizon)
    lengths = [12, 13, 14]
    assert found.get("toy", "toy", "action").count == sum(min(horizon, n - t) for n in lengths for t in range(n))


@any_speed
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 40), st.data())
def test_rows_of_chunks_are_those_of_brute_force(frames: int, horizon: int, block: int, data: st.DataObject) -> None:
    numbers = st.floats(-100, 100, width=32)
    state = data.draw(hnp.arrays(np.float32, (frames, 3), elements=numbers))
    action = data.draw(hnp.arrays(np.float32, (frames, 2), elements=numbers))
    before = action.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_BLOCK_VALUES", block)
        rows = np.concatenate(list(statistics._chunk_rows(state, action, (1,), horizon)))
    np.testing.assert_allclose(rows, chunk_actions(state, action, (1,), horizon), atol=1e-4)
    np.testing.assert_array_equal(action, before)


def test_a_condition_selects_episodes(release: Release) -> None:
    where = "source = 'wide' OR source = 'dark'"
    found = Statistics.of_relative_actions(release, relative_dims={"big": (0,)}, horizon=2, where=where)
    assert {key[0] for key in found.features} == {"wide", "dark"}
    short = Statistics.of_relative_actions(release, relative_dims={"big": (0,)}, horizon=2, where="num_frames < 20")
    assert short.get("wide", "big", "state").count == 12
    with pytest.raises(ValueError, match="nonsense"):
        Statistics.of_relative_actions(release, relative_dims={"big": (0,)}, horizon=2, where="nonsense = 1")


def test_no_pictures_are_read(release: Release) -> None:
    fresh = pickle.loads(pickle.dumps(release))
    frames = fresh._open("frames")
    frames.io_stats_incremental()
    Statistics.of_relative_actions(fresh, relative_dims=ARM, horizon=HORIZON)
    without_pictures = frames.io_stats_incremental().read_bytes
    fresh.frames()
    assert 0 < without_pictures < frames.io_stats_incremental().read_bytes / 3


@pytest.mark.parametrize(
    ("relative_dims", "says"),
    [
        ({"toys": (0,)}, "names 'toys'; the embodiments of the training episodes are 'arm', 'big', 'blind', 'toy'"),
        ({"toy": (2,)}, r"relative_dims has \[2\], which the state or the action of .*toy.* does not have"),
        ({"blind": (0,)}, r"relative_dims has \[0\]"),
        ({"toy": (0, 0)}, r"relative_dims of 'toy' is \[0, 0\]; list each dimension once"),
        ({"toy": (-1,)}, r"relative_dims of 'toy' is \[-1\]"),
    ],
)
def test_dimensions_that_are_not_there_are_refused(
    release: Release, relative_dims: dict[str, tuple[int, ...]], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Statistics.of_relative_actions(release, relative_dims=relative_dims, horizon=2)


def test_nothing_relative_is_refused(release: Release) -> None:
    with pytest.raises(ValueError, match="horizon=2 says nothing of absolute actions; leave it out"):
        Statistics.of_relative_actions(release, relative_dims={"toy": ()}, horizon=2)
    with pytest.raises(ValueError, match="horizon=0; relative actions need the chunk's length, 1 or more"):
        Statistics.of_relative_actions(release, relative_dims={"toy": (0,)}, horizon=0)


def test_frames_that_are_gone_are_no_statistics(release: Release) -> None:
    wanted = statistics._wanted(release, None)
    uid = min(wanted)
    group, num_frames = wanted[uid]
    wanted[uid] = (group, num_frames + 1)
    with pytest.raises(LakeDamagedError, match=f"frames of 1 episodes are gone, first of {uid}"):
        list(statistics._episodes(release, wanted, 16))


def test_episodes_without_frames_are_passed_over(release: Release) -> None:
    wanted = statistics._wanted(release, None)
    group = next(iter(wanted.values()))[0]
    assert len(list(statistics._episodes(release, wanted | {"0" * 32: (group, 0)}, 16))) == len(wanted)


def test_sizes_that_differ_within_an_embodiment_are_refused(tmp_path: Path) -> None:
    lake = Lake.create(str(tmp_path / "lake"))
    for folder, dim in (("first", 3), ("second", 4)):
        add(lake, widen(make_v21(tmp_path / folder / "same", [Made(seed=dim)]), dim, 2))
    with pytest.raises(ValueError, match=r"state_dim=3.*state_dim=4.*cannot be counted together; select .* by `where`"):
        Statistics.of_relative_actions(lake.make_release(), relative_dims={"toy": (0,)}, horizon=2)
    found = Statistics.of_relative_actions(
        lake.release(), relative_dims={"toy": (0,)}, horizon=2, where="state_dim = 4"
    )
    assert len(found.get("same", "toy", "state").mean) == 4


# What is missing.


def test_missing_statistics_say_what_exists_and_what_to_do(absolute: Statistics) -> None:
    with pytest.raises(StatisticsMissingError) as caught:
        absolute.get("toy", "robot", "action")
    message = str(caught.value)
    assert "no statistics of toy/robot/action" in message
    assert "there are dark/blind/action, other/arm/action, other/arm/state, toy/toy/action" in message
    assert "give some of its episodes the split train" in message
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (StatisticsMissingError, message)


def test_an_empty_release_has_no_statistics(tmp_path: Path) -> None:
    found = Statistics.of_release(Lake.create(str(tmp_path / "lake")).make_release())
    assert found.features == {}
    with pytest.raises(StatisticsMissingError, match="there are none at all"):
        found.get("toy", "toy", "state")


# JSON.


def test_json_comes_back_exactly(release: Release, absolute: Statistics) -> None:
    for before in (absolute, Statistics.of_relative_actions(release, relative_dims=ARM, horizon=HORIZON)):
        after = Statistics.from_json(before.to_json())
        assert (after.release_id, after.actions) == (before.release_id, before.actions)
        assert after.features.keys() == before.features.keys()
        for key, stats in before.features.items():
            assert_same(after.features[key], stats)
        assert after.to_json() == before.to_json()


@any_speed
@given(hnp.arrays(np.float64, (6, 3), elements=st.floats(-1e300, 1e300)), st.integers(1, 2**60))
def test_any_numbers_survive_json(values: np.ndarray, count: int) -> None:
    low, first, last, high = np.sort(values[:4], axis=0)
    stats = FeatureStats(count=count, mean=values[4], std=np.abs(values[5]), min=low, max=high, q01=first, q99=last)
    before = Statistics(features={("a/b", "", "state"): stats}, actions=Actions(), release_id="r")
    assert_same(Statistics.from_json(before.to_json()).features["a/b", "", "state"], stats)


def edited(path: str, value: Any = None) -> str:
    """Return good JSON in which the value at a path is another one, or is gone."""
    stats = FeatureStats(count=3, **{name: np.zeros(2) for name in VECTORS})
    actions = Actions(relative_dims={"toy": (1,)}, horizon=4)
    good = Statistics(features={("toy", "toy", "action"): stats}, actions=actions, release_id="r")
    stored = json.loads(good.to_json())
    *parents, last = path.split(".")
    place: Any = stored
    for name in parents:
        place = place[int(name) if name.isdecimal() else name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(stored)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("version", None, r"\['version'\] are missing"),
        ("version", 2, "have version 2, and this robolake reads 1; compute them again"),
        ("release_id", None, r"\['release_id'\] are missing"),
        ("release_id", 7, "release_id is 7"),
        ("more", 7, r"\['more'\] are unknown"),
        ("actions", [], "actions is"),
        ("actions.horizon", None, r"\['horizon'\] are missing"),
        ("actions.horizon", True, "horizon is True"),
        ("actions.horizon", 0, "horizon=0"),
        ("actions.relative_dims.toy", 1, "toy is 1"),
        ("actions.relative_dims.toy", ["x"], r"relative_dims of 'toy' is \['x'\]"),
        ("features", {}, "features is {}"),
        ("features.0.q99", None, r"entry 0 of features: \['q99'\] are missing"),
        ("features.0.feature", "view.top", "of the feature 'view.top'; it is one of state, action"),
        ("features.0.source", 1, "source is 1"),
        ("features.0.count", 0, "count=0 is no number of rows"),
        ("features.0.count", 1.5, "count is 1.5"),
        ("features.0.mean", ["1", "2"], "mean are lists of numbers"),
        ("features.0.mean", [1.0], "vectors of one length"),
        ("features.0.mean", [1.0, float("nan")], "mean is not finite"),
        ("features.0.mean", [1, 10**400], "entry 0 of features"),
        ("features.0.min", [1.0, 0.0], "do not ascend"),
        ("features.0.std", [-1.0, 0.0], "std is below 0"),
    ],
)
def test_json_with_a_fault_is_refused_by_its_name(path: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Statistics.from_json(edited(path, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_what_is_no_json_of_statistics_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"the statistics|JSON"):
        Statistics.from_json(text)


def test_json_with_one_feature_twice_is_refused() -> None:
    stored = json.loads(edited("release_id", "r"))
    stored["features"] *= 2
    with pytest.raises(ValueError, match="entry 1 of features is of toy/toy/action, as one before it is"):
        Statistics.from_json(json.dumps(stored))


# Representations.


def test_equal_representations_are_equal_however_written() -> None:
    one = Actions(relative_dims={"b": [2, 0], "a": (), "c": (1,)}, horizon=8)
    other = Actions(relative_dims={"c": [1], "b": (0, 2)}, horizon=8)
    assert (one, hash(one), str(one)) == (other, hash(other), str(other))
    assert str(one) == "relative in b [0, 2], c [1] over 8 actions"
    assert (one.dims("b"), one.dims("a"), one.dims("elsewhere")) == ((0, 2), (), ())
    assert one != Actions(relative_dims={"c": [1], "b": (0, 2)}, horizon=9)
    assert pickle.loads(pickle.dumps(one)) == one


def test_memory_of_many_frames_is_that_of_a_block() -> None:
    # Four million values come in, and a block of them is held.
    fold = statistics._Fold()
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(1000, 10)).astype(np.float32) for _ in range(8)]
    for number in range(400):
        fold.add(parts[number % 8])
        assert sum(rows.size for rows in fold._pending) < statistics._BLOCK_VALUES
    assert fold.sketch().count == 400_000


def test_statistics_of_a_release_are_folded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = make_unreleased(tmp_path / "lake", make_sources(tmp_path / "sources")).make_release()
    first = Statistics.of_release(release)
    (kept,) = (tmp_path / "lake/_statistics").iterdir()
    assert release.id in kept.name
    monkeypatch.setattr(type(release), "sketches", None)
    again = Statistics.of_release(release)
    assert again.to_json() == first.to_json()


@pytest.mark.parametrize("content", [b"", b"{}", b"no JSON", b"\xff\xfe"])
def test_damaged_statistics_are_folded_again(tmp_path: Path, content: bytes) -> None:
    release = make_unreleased(tmp_path / "lake", make_sources(tmp_path / "sources")).make_release()
    first = Statistics.of_release(release)
    (kept,) = (tmp_path / "lake/_statistics").iterdir()
    kept.write_bytes(content)
    assert Statistics.of_release(release).to_json() == first.to_json()


def test_a_lake_that_cannot_be_written_to_has_statistics(tmp_path: Path) -> None:
    release = make_unreleased(tmp_path / "lake", make_sources(tmp_path / "sources")).make_release()
    (tmp_path / "lake/_statistics").symlink_to(tmp_path / "not mounted" / "folder")
    assert Statistics.of_release(release).features
