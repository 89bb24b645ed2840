"""Tests of jobs/record.py."""

import json
from collections import Counter
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from support import last_json, run_module

from ingest.lerobot_writer import DatasetSpec
from jobs.record import CAMERAS, COLUMNS, CONTROL_HZ, INSTRUCTIONS, Config, MetaWorld, choose_gl, run, seed_of
from lake.errors import RobolakeError

pytestmark = pytest.mark.skipif(find_spec("metaworld") is None, reason="recording needs the extra sim")

SMALL = {"tasks": ("reach-v3", "drawer-open-v3"), "episodes": 2, "size": 32, "stride": 4, "seed": 5}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("recorded") / "out"
    flags = [f"--{name}={value}" for name, value in SMALL.items() if name != "tasks"]
    done = run_module("jobs.record", "--out", root, *flags, "--tasks", *SMALL["tasks"])
    assert done.returncode == 0, done.stderr
    assert "reach-v3 2/2:" in done.stderr
    return root, last_json(done.stdout)


def episodes(root: Path) -> list[dict[str, np.ndarray]]:
    table = pq.read_table(root / "data")
    columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    numbers = columns["episode_index"]
    return [{name: values[numbers == n] for name, values in columns.items()} for n in range(numbers.max() + 1)]


def test_the_last_line_says_what_was_recorded(recorded: tuple[Path, dict[str, Any]]) -> None:
    root, result = recorded
    assert result["episodes"] == 4
    assert result["tasks"] == 2
    assert result["frames"] == pq.read_table(root / "data").num_rows
    assert result["out"] == str(root)
    assert result["seconds"] > 0
    info = json.loads((root / "meta/info.json").read_text())
    assert info["fps"] == 20
    assert info["robolake"]["config"]["seed"] == 5


def test_every_task_has_its_episodes_and_all_succeed(recorded: tuple[Path, dict[str, Any]]) -> None:
    root, _ = recorded
    texts = dict(zip(*pq.read_table(root / "meta/tasks.parquet").to_pydict().values(), strict=True))
    done = Counter()
    for episode in episodes(root):
        (task,) = set(episode["task_index"].tolist())
        done[texts[task]] += 1
        assert episode["next.success"].any()
        assert episode["next.done"].tolist() == [False] * (len(episode["next.done"]) - 1) + [True]
    assert done == {INSTRUCTIONS[task]: 2 for task in SMALL["tasks"]}


def test_initial_states_differ(recorded: tuple[Path, dict[str, Any]]) -> None:
    first_rewards = {tuple(episode["next.reward"][:3].tolist()) for episode in episodes(recorded[0])}
    first_actions = {tuple(episode["action"][:3].ravel().tolist()) for episode in episodes(recorded[0])}
    assert len(first_rewards) == len(first_actions) == 4


def test_applying_the_recorded_actions_leads_to_the_recorded_states(recorded: tuple[Path, dict[str, Any]]) -> None:
    root, _ = recorded
    with closing(MetaWorld("reach-v3", cameras=(), size=16)) as world:
        for number, episode in enumerate(episodes(root)[::2]):
            world.reset(seed_of(SMALL["seed"], "reach-v3", number))
            for state, action, reward in zip(
                episode["observation.state"], episode["action"], episode["next.reward"], strict=True
            ):
                assert np.array_equal(world.state(), state.astype(np.float32))
                results = [world.step(action.astype(np.float32)) for _ in range(SMALL["stride"])]
                assert np.float32(results[-1][0]) == np.float32(reward)


def test_actions_are_within_what_metaworld_applies(recorded: tuple[Path, dict[str, Any]]) -> None:
    actions = np.concatenate([episode["action"] for episode in episodes(recorded[0])])
    assert np.abs(actions).max() == 1
    assert np.abs(actions).mean() < 1


def test_views_move_and_are_of_the_size(recorded: tuple[Path, dict[str, Any]]) -> None:
    root, result = recorded
    for camera in ("corner4", "gripperPOV"):
        path = root / f"videos/observation.images.{camera}/chunk-000/file-000.mp4"
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == CONTROL_HZ // SMALL["stride"]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == result["frames"]
        assert frames[0].shape == (32, 32, 3)
        assert np.abs(frames[0].astype(int) - frames[8]).max() > 50


def test_the_same_config_records_the_same_with_any_number_of_workers(
    recorded: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run(Config(out=str(tmp_path / "again"), num_workers=1, **SMALL))
    for path in ("data/chunk-000/file-000.parquet", "videos/observation.images.corner4/chunk-000/file-000.mp4"):
        assert (tmp_path / "again" / path).read_bytes() == (recorded[0] / path).read_bytes()


def test_another_seed_records_other_episodes(recorded: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run(Config(out=str(tmp_path / "other"), **(SMALL | {"seed": 6, "tasks": ("reach-v3",), "episodes": 1})))
    before = [episode["action"][0].tolist() for episode in episodes(recorded[0])]
    assert episodes(tmp_path / "other")[0]["action"][0].tolist() not in before


def test_failures_are_dropped_and_tried_again_or_kept(tmp_path: Path) -> None:
    # Asked so rarely, the expert loses the third of these balls.
    config = {"tasks": ("basketball-v3",), "episodes": 3, "stride": 10, "size": 16, "cameras": ("gripperPOV",)}
    run(Config(out=str(tmp_path / "all"), keep_failures=True, **config))
    run(Config(out=str(tmp_path / "good"), **config))
    everything, good = episodes(tmp_path / "all"), episodes(tmp_path / "good")
    assert [episode["next.success"].any() for episode in everything] == [True, True, False]
    assert [episode["next.success"].any() for episode in good] == [True, True, True]
    assert len(everything[2]["action"]) == 50
    for before, after in zip(everything[:2], good[:2], strict=True):
        assert np.array_equal(before["action"], after["action"])


def test_an_expert_that_always_fails_ends_the_job(tmp_path: Path) -> None:
    config = {"tasks": ("lever-pull-v3",), "episodes": 1, "stride": 10, "size": 16, "cameras": ("gripperPOV",)}
    with pytest.raises(RobolakeError, match="lever-pull-v3 succeeded in 0 of 7 attempts"):
        run(Config(out=str(tmp_path / "out"), **config))
    assert list(tmp_path.iterdir()) == []


def test_corner_cameras_have_nothing_above_and_the_floor_below() -> None:
    cameras = ("corner", "corner2", "corner4")
    with closing(MetaWorld("button-press-topdown-v3", cameras=cameras, size=64)) as world:
        world.reset(0)
        views = world.views()
    for camera in cameras:
        rows = np.argwhere((views[camera] == 0).all(axis=-1))[:, 0]
        assert len(rows) > 100
        assert rows.mean() < 24, f"{camera} is upside down"


def test_every_task_has_an_instruction_of_its_own() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    assert set(INSTRUCTIONS) == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)
    assert len(set(INSTRUCTIONS.values())) == len(INSTRUCTIONS)


def test_every_camera_is_metaworlds() -> None:
    with closing(MetaWorld("reach-v3", cameras=CAMERAS, size=16)) as world:
        world.reset(0)
        assert set(world.views()) == set(CAMERAS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("fly-v3",)}, "name each once, of: assembly-v3"),
        ({"tasks": ("reach-v3", "reach-v3")}, "name each once"),
        ({"tasks": ()}, "name each once"),
        ({"cameras": ("front",)}, "of: topview"),
        ({"episodes": 0}, "at least 1"),
        ({"size": 33}, "not an even number"),
    ],
)
def test_a_config_that_cannot_be_recorded_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Config(**({"out": str(tmp_path / "out")} | SMALL | change)))
    assert list(tmp_path.iterdir()) == []


def test_without_a_renderer_the_packages_to_install_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "none such")
    with pytest.raises(RobolakeError, match=r"libegl1 .*libosmesa6"):
        choose_gl()


def test_columns_make_a_dataset() -> None:
    spec = DatasetSpec(fps=CONTROL_HZ, robot_type="x", columns=COLUMNS)
    assert [len(column.names or "x") for column in spec.columns.values()] == [4, 4, 1, 1, 1]
