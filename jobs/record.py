"""Record demonstrations by MetaWorld's scripted experts as a LeRobot v3.0 dataset."""

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ingest.lerobot_writer import Column, DatasetSpec, LeRobotWriter
from ingest.video_writer import encode_video
from jobs.command import main_of
from lake.errors import RobolakeError

CONTROL_HZ = 80
"""MetaWorld's control rate: 5 physics steps of 2.5 ms for each action."""
NUM_FRAMES_AFTER_SUCCESS = 5
CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
COLUMNS = {
    "observation.state": Column(size=4, names=("hand_x", "hand_y", "hand_z", "gripper_opening")),
    "action": Column(size=4, names=("delta_x", "delta_y", "delta_z", "gripper_effort")),
    "next.reward": Column(),
    "next.success": Column(dtype="bool"),
    "next.done": Column(dtype="bool"),
}
INSTRUCTIONS = {
    "assembly-v3": "put the ring over the peg",
    "basketball-v3": "drop the basketball into the hoop",
    "bin-picking-v3": "move the block from one bin to the other",
    "box-close-v3": "put the lid on the box",
    "button-press-topdown-v3": "press the red button down from above",
    "button-press-topdown-wall-v3": "reach over the wall and press the red button down from above",
    "button-press-v3": "push the red button in",
    "button-press-wall-v3": "reach over the wall and push the red button in",
    "coffee-button-v3": "push the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "lift the ring off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "turn the lock of the door to lock it",
    "door-open-v3": "open the door",
    "door-unlock-v3": "turn the lock of the door to unlock it",
    "drawer-close-v3": "push the drawer shut",
    "drawer-open-v3": "pull the drawer open",
    "faucet-close-v3": "turn the faucet clockwise",
    "faucet-open-v3": "turn the faucet counter-clockwise",
    "hammer-v3": "hit the nail with the hammer",
    "hand-insert-v3": "put the gripper into the hole",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "peg-insert-side-v3": "put the peg into the hole in the side of the box",
    "peg-unplug-side-v3": "pull the peg out of the side of the box",
    "pick-out-of-hole-v3": "take the puck out of the hole and bring it to the goal",
    "pick-place-v3": "pick up the puck and bring it to the goal",
    "pick-place-wall-v3": "pick up the puck and bring it over the wall to the goal",
    "plate-slide-back-side-v3": "slide the plate out of the cabinet to the side",
    "plate-slide-back-v3": "slide the plate back out of the cabinet",
    "plate-slide-side-v3": "slide the plate sideways into the cabinet",
    "plate-slide-v3": "slide the plate into the cabinet",
    "push-back-v3": "pull the puck back to the goal",
    "push-v3": "push the puck to the goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "reach-v3": "move the gripper to the bright red ball",
    "reach-wall-v3": "move the gripper over the wall to the bright red ball",
    "shelf-place-v3": "put the block on the shelf",
    "soccer-v3": "push the ball into the net",
    "stick-pull-v3": "pull the thermos with the stick",
    "stick-push-v3": "push the thermos with the stick",
    "sweep-into-v3": "sweep the block into the hole",
    "sweep-v3": "sweep the block off the table",
    "window-close-v3": "slide the window shut",
    "window-open-v3": "slide the window open",
}
_GL_PROBE = "import mujoco; context = mujoco.GLContext(16, 16); context.make_current(); context.free()"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Record demonstrations by MetaWorld's scripted experts as a LeRobot v3.0 dataset.

    A frame holds what was seen before its action, and that action is applied, unchanged, until the next frame. Where
    ``stride`` is above 1 the expert is asked once per frame and its action repeated: nothing is recorded that was not
    done. An episode ends a few frames after its first success. The same config gives the same episodes.
    """

    out: str
    """Directory or URI of the dataset; nothing may be there yet."""
    tasks: tuple[str, ...] = ("reach-v3", "button-press-topdown-v3", "drawer-open-v3")
    """MetaWorld's names of the tasks."""
    episodes: int = 6
    """Episodes of each task."""
    seed: int = 0
    """Decides the initial states, which all differ."""
    size: int = 128
    """Width and height of the views in pixels, an even number."""
    stride: Literal[1, 2, 4, 5, 8, 10] = 2
    """Control steps per frame; frames per second are 80 / stride."""
    cameras: tuple[str, ...] = ("corner4", "gripperPOV")
    """MetaWorld's names of the cameras; the corners, which it mounts upside down, are turned upright."""
    codec: Literal["h264", "av1"] = "h264"
    """Of the videos; av1 is what LeRobot itself records."""
    keep_failures: bool = False
    """Also keep episodes in which the expert fails."""
    num_workers: int = 2
    """Processes that simulate and render."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One episode to be recorded."""

    task: str
    number: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.task}-{self.number:04d}"


class MetaWorld:
    """A MetaWorld task with its expert and its cameras; a renderer and a physics state live as long as it does.

    Raises:
        RobolakeError: there is nothing to render with.
        KeyError: no such task, or no such camera.
    """

    def __init__(self, task: str, *, cameras: tuple[str, ...], size: int) -> None:
        os.environ["MUJOCO_GL"] = choose_gl()  # MuJoCo reads it when it is imported.
        import mujoco as untyped
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        from metaworld.policies import ENV_POLICY_MAP

        make: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"]
        self._env = make(seed=0)
        self._env.seeded_rand_vec = True  # Draw initial states by the seed,
        self._env._freeze_rand_vec = False  # noqa: SLF001  # and at each reset, not only at the first.
        self._expert = ENV_POLICY_MAP[task]()
        assert round(1 / self._env.dt) == CONTROL_HZ
        mujoco: Any = untyped
        model = self._env.model
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        model.vis.quality.shadowsize = 0
        self._renderer = mujoco.Renderer(model, size, size)
        # Without a GPU these three cost three quarters of the time.
        for flag in ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX"):
            self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, flag)] = 0
        self._cameras = {camera: self._is_upside_down(camera) for camera in cameras}

    @property
    def max_steps(self) -> int:
        """Control steps after which MetaWorld wants a reset."""
        return self._env.max_path_length

    def reset(self, seed: int) -> None:
        """Begin an episode in the initial state that belongs to ``seed``."""
        self._env.seed(seed)
        self._observation, _ = self._env.reset()

    def state(self) -> np.ndarray:
        """Return where the hand is in metres and how far the gripper is open, from 0 to 1; float32 [4]."""
        return self._observation[:4].astype(np.float32)

    def views(self) -> dict[str, np.ndarray]:
        """Render an uint8 image [size, size, 3] per camera."""
        images = {}
        for camera, is_upside_down in self._cameras.items():
            self._renderer.update_scene(self._env.data, camera=camera)
            image = self._renderer.render()
            images[camera] = image[::-1, ::-1].copy() if is_upside_down else image
        return images

    def expert_action(self) -> np.ndarray:
        """Ask the expert, who also sees where things are; float32 [4] in [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # It warns of each action that MetaWorld would clip.
            action = self._expert.get_action(self._observation)
        return np.clip(action, -1, 1).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Apply an action for one control step; return the reward and whether the task is done."""
        self._observation, reward, _, _, info = self._env.step(action)
        return float(reward), bool(info["success"])

    def close(self) -> None:
        """Give back what the renderer holds."""
        self._renderer.close()

    def _is_upside_down(self, camera: str) -> bool:
        model, data = self._env.model, self._env.data
        number = model.camera(camera).id
        up_z = data.cam_xmat[number].reshape(3, 3)[2, 1]
        return bool(model.cam_bodyid[number] == 0 and up_z < 0)


def choose_gl() -> str:
    """Return the library with which MuJoCo can render here, for the variable MUJOCO_GL; one already set is kept.

    Raises:
        RobolakeError: there is none.
    """
    if os.environ.get("MUJOCO_GL"):
        return os.environ["MUJOCO_GL"]
    problems = []
    for name in ("egl", "osmesa"):
        command, environment = [sys.executable, "-c", _GL_PROBE], os.environ | {"MUJOCO_GL": name}
        probe = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if probe.returncode == 0:
            return name
        problems.append(f"{name}: {(probe.stderr.strip().splitlines() or ['crashed'])[-1]}")
    raise RobolakeError(
        f"MuJoCo cannot render without a screen here ({'; '.join(problems)}). On Debian or Ubuntu install libegl1 "
        "libegl-mesa0 libgl1 libgl1-mesa-dri libgles2, or libosmesa6"
    )


def seed_of(seed: int, task: str, number: int) -> int:
    """Return the seed of the initial state of one attempt at a task."""
    return int(np.random.SeedSequence((seed, zlib.crc32(task.encode()), number)).generate_state(1)[0])


def run(config: Config) -> dict[str, Any]:
    """Record; return what the job's last line says."""
    _check(config)
    began = time.perf_counter()
    spec = DatasetSpec(
        fps=CONTROL_HZ / config.stride,
        robot_type="metaworld_sawyer",
        columns=COLUMNS,
        views=tuple(_view(camera) for camera in config.cameras),
        provenance={"job": "record", "config": asdict(config)},
    )
    gl = choose_gl()
    with LeRobotWriter(config.out, spec=spec) as writer, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kept = _record_all(config, folder, gl)
        for attempt in (attempt for together in zip(*kept, strict=True) for attempt in together):
            with np.load(folder / f"{attempt.name}.npz") as columns:
                views = {_view(camera): folder / f"{attempt.name}.{camera}.mp4" for camera in config.cameras}
                writer.add_episode(dict(columns), tasks=INSTRUCTIONS[attempt.task], views=views)
    return {
        "episodes": writer.num_episodes,
        "frames": writer.num_frames,
        "tasks": len(config.tasks),
        "seconds": round(time.perf_counter() - began, 1),
        "out": config.out,
    }


def _check(config: Config) -> None:
    unknown = [name for name in config.tasks if name not in INSTRUCTIONS]
    if unknown or not config.tasks or len(set(config.tasks)) != len(config.tasks):
        raise ValueError(f"tasks are {config.tasks}; name each once, of: {', '.join(INSTRUCTIONS)}")
    unknown = [name for name in config.cameras if name not in CAMERAS]
    if unknown or not config.cameras or len(set(config.cameras)) != len(config.cameras):
        raise ValueError(f"cameras are {config.cameras}; name each once, of: {', '.join(CAMERAS)}")
    if config.episodes < 1 or config.num_workers < 1 or config.seed < 0:
        raise ValueError("episodes and num_workers must be at least 1, and seed at least 0")
    if config.size < 16 or config.size % 2:
        raise ValueError(f"size={config.size} is not an even number from 16 on")
    if importlib.util.find_spec("metaworld") is None:
        raise RobolakeError("recording needs MetaWorld: pip install 'robolake[sim]'")


def _view(camera: str) -> str:
    return f"observation.images.{camera}"


def _record_all(config: Config, folder: Path, gl: str) -> list[list[Attempt]]:
    """Record until every task has its episodes; return for each task the attempts to keep, in their order."""
    # MuJoCo's rendering contexts and a forked process do not go together.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(config.num_workers, mp_context=spawn, initializer=_start_worker, initargs=(gl,))
    try:
        begun = {
            task: [_begin(pool, config, folder, task, number) for number in range(config.episodes)]
            for task in config.tasks
        }
        return [list(_kept(pool, config, folder, begun[task])) for task in config.tasks]
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(
    pool: ProcessPoolExecutor, config: Config, folder: Path, task: str, number: int
) -> tuple[Attempt, "Future[tuple[int, bool]]"]:
    attempt = Attempt(task=task, number=number, seed=seed_of(config.seed, task, number))
    return attempt, pool.submit(_record, attempt, config, folder)


def _kept(
    pool: ProcessPoolExecutor, config: Config, folder: Path, begun: list[tuple[Attempt, "Future[tuple[int, bool]]"]]
) -> Iterator[Attempt]:
    """Yield the attempts of one task that are to be kept, trying again for each that is not."""
    num_kept = 0
    for attempt, future in begun:  # It grows meanwhile.
        num_frames, is_success = future.result()
        is_kept = is_success or config.keep_failures
        num_kept += is_kept
        said = f"{num_frames} frames, {'success' if is_success else 'failure'}{'' if is_kept else ', dropped'}"
        print(f"{attempt.task} {num_kept}/{config.episodes}: {said}", file=sys.stderr, flush=True)
        if is_kept:
            yield attempt
            continue
        if len(begun) >= 2 * config.episodes + 5:
            raise RobolakeError(
                f"the expert of {attempt.task} succeeded in {num_kept} of {len(begun)} attempts, which is too rarely; "
                "choose another task, a smaller --stride, or --keep-failures"
            )
        begun.append(_begin(pool, config, folder, attempt.task, len(begun)))


def _start_worker(gl: str) -> None:
    os.environ["MUJOCO_GL"] = gl
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's renderer would use every core for each worker.


@lru_cache(maxsize=2)
def _world(task: str, cameras: tuple[str, ...], size: int) -> MetaWorld:
    return MetaWorld(task, cameras=cameras, size=size)


def _record(attempt: Attempt, config: Config, folder: Path) -> tuple[int, bool]:
    """Record one episode into ``folder``; return its number of frames, and whether the expert succeeded."""
    world = _world(attempt.task, config.cameras, config.size)
    world.reset(attempt.seed)
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    images: dict[str, list[np.ndarray]] = {camera: [] for camera in config.cameras}
    num_left = world.max_steps // config.stride
    while num_left:
        action = world.expert_action()
        columns["observation.state"].append(world.state())
        columns["action"].append(action)
        for camera, image in world.views().items():
            images[camera].append(image)
        results = [world.step(action) for _ in range(config.stride)]
        is_success = any(success for _, success in results)
        if is_success and not any(columns["next.success"]):
            num_left = min(num_left, NUM_FRAMES_AFTER_SUCCESS + 1)
        columns["next.reward"].append(results[-1][0])
        columns["next.success"].append(is_success)
        num_left -= 1
        columns["next.done"].append(num_left == 0)
    arrays: dict[str, Any] = {name: np.array(columns[name], COLUMNS[name].dtype) for name in COLUMNS}
    np.savez(folder / f"{attempt.name}.npz", **arrays)
    for camera, frames in images.items():
        encode_video(
            frames, folder / f"{attempt.name}.{camera}.mp4", fps=CONTROL_HZ / config.stride, codec=config.codec
        )
    return len(arrays["action"]), any(columns["next.success"])


main = main_of(Config, run)

if __name__ == "__main__":
    main()
