"""Measure the order of training at a billion frames: start, memory, planning speed and shuffle quality."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from train.lanes import Costs, Stream
from train.memory import own_memory_mib
from train.order import SourceFrames, mixture, weights_by_size
from train.packing import Kind, budgets_for
from train.turns import Cursor, Position, Turns

Ints = npt.NDArray[np.int64]

_VIEW_TOKENS, _TEXT_TOKENS = 256, (40, 100)
_PROGRAM = "import json, sys; from jobs.bench.order import start; print(json.dumps(start(*sys.argv[1:])))"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Plan training over the metadata of many episodes; no frame exists.

    What a sample costs is made up: 1, 2 or 3 cameras by source, and texts of varied lengths.
    """

    lake: str = ""
    """A lake whose last release gives the lengths of episodes; empty makes them up."""
    episodes: int = 1_000_000
    """Episodes of the made metadata."""
    frames: int = 1_000_000_000
    """Frames of the made metadata, about."""
    sources: int = 12
    """Sources of the made metadata, of unequal sizes."""
    lanes: int = 64
    """Packs of a step."""
    tokens: int = 16_384
    """Of a pack."""
    windows: int = 256
    """Windows that are planned in each repeat."""
    repeats: int = 5
    """Of every measurement; the median counts, and of memory the most."""


def run(config: Config) -> dict[str, Any]:
    """Return {"what", "numbers", "rows"}."""
    with tempfile.TemporaryDirectory(prefix="bench-order-") as folder:
        path = Path(folder) / "metadata.npz"
        sources = _of_lake(config.lake) if config.lake else _made(config)
        np.savez(path, *sources)
        arguments = [sys.executable, "-c", _PROGRAM, str(path), str(config.lanes), str(config.tokens)]
        rows = [_started(arguments, repeat) for repeat in range(config.repeats)]
        stream = _stream(str(path), config.lanes, config.tokens)
    first = _middle(stream)
    rows += [row for repeat in range(config.repeats) for row in _speeds(stream, first, config, repeat)]
    shuffle = [row | {"side": "shuffle"} for row in _shuffle(stream, first, config)]
    return {
        "what": "planning of training over many episodes: start, memory, speed, shuffle",
        "numbers": {
            "episodes": sum(len(each) for each in sources),
            "frames": int(sum(each.sum() for each in sources)),
            "start_s": statistics.median(_all(rows, "start", "seconds")),
            "start_peak_mib": max(_all(rows, "start", "peak_mib")),
            "start_peak_above_imports_mib": max(_all(rows, "start", "above_imports_mib")),
            "order_samples_per_s": statistics.median(_all(rows, "order", "samples_per_s")),
            "planning_samples_per_s": statistics.median(_all(rows, "order and packing", "samples_per_s")),
            "planning_one_lane_samples_per_s": statistics.median(_all(rows, "one lane", "samples_per_s")),
            "shuffle": {row["of"]: {key: row[key] for key in row if key not in ("of", "side")} for row in shuffle},
        },
        "rows": rows + shuffle,
    }


def start(path: str, lanes: str, tokens: str) -> dict[str, float]:
    """Read the metadata and plan the first window after a cursor in the middle; return what that took."""
    before = own_memory_mib("VmRSS")
    since = time.perf_counter()
    stream = _stream(path, int(lanes), int(tokens))
    window = _middle(stream) // stream.num_lanes
    position = Position(steps=window * 100, window=window, packs=3)
    cursor = Cursor(fingerprint=stream.fingerprint, lanes=(position,) * stream.num_lanes)
    turn = Turns(stream, 0, stream.num_lanes, cursor).peek()
    assert turn is not None
    assert turn.window is not None
    pack = stream.window(turn.window)[turn.index]
    seconds = time.perf_counter() - since
    peak = own_memory_mib("VmHWM")
    assert pack.num_samples
    return {"seconds": seconds, "peak_mib": peak, "above_imports_mib": peak - before}


def _made(config: Config) -> list[Ints]:
    rng = np.random.default_rng(0)
    share = np.geomspace(1, 0.02, config.sources)
    counts = np.maximum(1, (config.episodes * share / share.sum()).astype(np.int64))
    counts[0] += config.episodes - counts.sum()
    lengths = rng.lognormal(0, 0.6, config.episodes)
    lengths = np.maximum(1, lengths * config.frames / lengths.sum()).astype(np.int64)
    return np.split(lengths, np.cumsum(counts)[:-1])


def _of_lake(uri: str) -> list[Ints]:
    # Here, for the process whose memory is measured opens no lake.
    from lake import Lake

    table = Lake(uri).release().episodes(columns=["source", "num_frames"])
    names, lengths = np.array(table.column("source").to_pylist()), table.column("num_frames").to_numpy()
    return [lengths[names == name].astype(np.int64) for name in sorted(set(names.tolist()))]


def _stream(path: str, num_lanes: int, tokens: int) -> Stream:
    rng = np.random.default_rng(1)
    sources: list[SourceFrames] = []
    costs: list[Costs] = []
    with np.load(path) as stored:
        lengths = [stored[name] for name in stored.files]
    weights = weights_by_size([int(each.sum()) for each in lengths], temperature=2.0)
    for at, (each, weight) in enumerate(zip(lengths, weights, strict=True)):
        views = 1 + at % 3
        sources.append(SourceFrames(name=f"source-{at}", lengths=each, weight=weight))
        text = rng.integers(*_TEXT_TOKENS, len(each))
        costs.append(Costs(tokens=_VIEW_TOKENS * views + text, images=np.full(len(each), views)))
    kinds = [
        Kind(share=weight, tokens=float(cost.tokens.mean()), images=1 + at % 3)
        for at, (weight, cost) in enumerate(zip(weights, costs, strict=True))
        if weight
    ]
    budgets = budgets_for(kinds, tokens=tokens)
    return Stream(order=mixture(sources, seed=1), costs=tuple(costs), budgets=budgets, num_lanes=num_lanes)


def _middle(stream: Stream) -> int:
    """Return the window at which about half of all frames have been drawn; of the first lane."""
    order = stream.order
    blocks = sum(int(source.lengths.sum()) for source in order.sources) // order.block_frames
    window = blocks // order.window_blocks // 2
    return window - window % stream.num_lanes


def _started(arguments: list[str], repeat: int) -> dict[str, Any]:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the process that plans one window failed: {done.stderr[-2000:]}")
    row = {"side": "start", "repeat": repeat} | json.loads(done.stdout)
    print(row, file=sys.stderr, flush=True)
    return row


def _speeds(stream: Stream, first: int, config: Config, repeat: int) -> Iterator[dict[str, Any]]:
    """Yield samples a second of one core's time, whatever else runs on the machine."""

    def order(window: int) -> int:
        return len(stream.order.window(window).samples()[0])

    def both(window: int) -> int:
        return sum(pack.num_samples for pack in stream.window(window))

    # No window twice, so nothing that is kept from the last time counts.
    at = first + repeat * config.windows
    apart = range(first + repeat, first + repeat + config.windows * config.lanes, config.lanes)
    sides: dict[str, tuple[Callable[[int], int], range]] = {
        "order": (order, range(at, at + config.windows)),
        "order and packing": (both, range(at, at + config.windows)),
        "one lane": (both, apart),
    }
    for side, (plan, windows) in sides.items():
        wall, cpu = time.perf_counter(), time.process_time()
        samples = sum(plan(window) for window in windows)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        row = {"side": side, "repeat": repeat, "samples": samples, "cpu_s": cpu, "wall_s": wall}
        yield row | {"samples_per_s": samples / cpu}


def _shuffle(stream: Stream, first: int, config: Config) -> Iterator[dict[str, Any]]:
    """Yield how well the order shuffles beside permutations of all its frames, and of all its blocks.

    Of a permutation of so many frames, any part is like draws of frames, each in its source's share.
    """
    order = stream.order
    offsets = np.cumsum([0, *(len(source.lengths) for source in order.sources)])
    windows = [stream.window(first + at) for at in range(min(config.windows, 4 * config.lanes))]
    packs = [offsets[pack.source] + pack.episode for window in windows for pack in window]
    sizes = [len(pack) for pack in packs]
    yield {"of": "order"} | _quality(packs)
    rng = np.random.default_rng(2)
    source = rng.choice(len(order.sources), sum(sizes), p=list(order.shares().values()))
    episode = np.empty_like(source)
    for at, each in enumerate(order.sources):
        mine = np.flatnonzero(source == at)
        ends = np.cumsum(each.lengths)
        if len(mine):
            frame = rng.integers(0, ends[-1], len(mine))
            episode[mine] = offsets[at] + np.searchsorted(ends, frame, side="right")
    yield {"of": "permutation of frames"} | _quality(_cut(episode, sizes))
    blocks = order.slots(first * order.window_blocks, (first + len(windows)) * order.window_blocks)
    episode = np.repeat(offsets[blocks.source] + blocks.episode, blocks.end - blocks.start)
    yield {"of": "permutation of blocks"} | _quality(_cut(episode, sizes))


def _quality(packs: list[Ints]) -> dict[str, float]:
    """Return correlations of neighbours, and how often samples of one episode follow each other or share a pack."""
    episodes, means = np.concatenate(packs), np.array([pack.mean() for pack in packs])
    pairs = sum(len(pack) * (len(pack) - 1) for pack in packs)
    alike = sum(int((np.unique(pack, return_counts=True)[1] ** 2).sum()) - len(pack) for pack in packs)
    return {
        "correlation_of_samples": float(np.corrcoef(episodes[:-1], episodes[1:])[0, 1]),
        "correlation_of_packs": float(np.corrcoef(means[:-1], means[1:])[0, 1]),
        "same_episode_next": float((np.diff(episodes) == 0).mean()),
        "same_episode_in_pack": alike / max(1, pairs),
    }


def _cut(episodes: Ints, sizes: list[int]) -> list[Ints]:
    return [episodes[start:end] for start, end in pairwise(np.cumsum([0, *sizes]).tolist())]


def _all(rows: list[dict[str, Any]], side: str, key: str) -> list[float]:
    return [row[key] for row in rows if row["side"] == side]
