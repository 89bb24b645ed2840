"""The loader: one rank's packs of a release, read ahead, with a cursor after any of them."""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Protocol

import numpy as np

from lake import Release
from lake.errors import LoaderClosedError
from train.audit import Tally, tally
from train.augment import Augmentation
from train.batch import Batch, empty, to_torch
from train.blocks import BlockCache, BlockReader
from train.plan import OrderConfig, PackConfig, Plan, make_plan
from train.samples import Assembler, SampleConfig, Window, make_normaliser
from train.state import LoaderState
from train.statistics import Statistics
from train.turns import Cursor, Position, Turn, Turns, lanes_of_rank

_READERS = 2
"""Threads that read windows."""
_FEW_LANES = 4
"""Whose windows a rank holds in its own memory: at most two each, of about 40 MB a view."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadConfig:
    """How a loader reads. None of it changes what it yields."""

    threads: int = 0
    """Threads that make packs; 0 takes one for each core that this process may use."""
    ahead: int = 2
    """Packs that are made ahead of those that the threads and actors are at."""
    cache_dir: str | None = ""
    """Folder of the blocks that the processes of a node share. Empty takes one among the system's temporary files where
    the lake is in an object store, or where a rank has more than 4 lanes, whose windows it would have to hold in its
    own memory; else none, for a file system keeps files in memory by itself. None takes none."""
    cache_bytes: int = 8 << 30
    """Most that this folder holds."""
    pin: bool | None = None
    """Whether tensors are in pinned memory; None means where there is a GPU."""
    actors: int = 0
    """Ray actors that make a share of the packs, each with a core of any node."""
    actor_resources: dict[str, float] = field(default_factory=dict[str, float])
    """What an actor needs beside its core: a custom resource keeps actors on the nodes that have it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """What a loader yields, and how it reads."""

    order: OrderConfig = field(default_factory=OrderConfig)
    """Which samples, in which order."""
    packs: PackConfig = field(default_factory=PackConfig)
    """How large packs are, for which model."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """What a sample is made of."""
    augment: Augmentation | None = None
    """How pictures are changed at random; None leaves them as they are."""
    read: ReadConfig = field(default_factory=ReadConfig)
    """Threads, memory, cache."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "LoaderConfig":
        """Read back what ``dataclasses.asdict`` and JSON made of it.

        Raises:
            TypeError: an unknown setting.
            KeyError: a part is missing.
        """
        sample = _tuples(data["sample"])
        sample["relative_dims"] = {name: tuple(dims) for name, dims in sample["relative_dims"].items()}
        return cls(
            order=OrderConfig(**data["order"]),
            packs=PackConfig(**_tuples(data["packs"])),
            sample=SampleConfig(**sample),
            augment=None if data["augment"] is None else Augmentation(**_tuples(data["augment"])),
            read=ReadConfig(**data["read"]),
        )


class PackPool(Protocol):
    """Makes packs elsewhere."""

    def submit(self, turn: Turn, own: Callable[[], Batch]) -> "Future[Batch] | None":
        """Have a pack made elsewhere; None where it is the rank's to make.

        Args:
            own: makes it in the rank.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


def open_loader(
    release: Release,
    config: LoaderConfig,
    rank: int = 0,
    world_size: int = 1,
    cursor: Cursor | None = None,
    statistics: Statistics | None = None,
) -> "Loader":
    """Open the packs of one rank.

    Args:
        cursor: where to begin, of the same order at any world size; None means at the start.
        statistics: None takes those of the release.

    Raises:
        ValueError: a configuration that makes no sense for this release; the message says which part.
        CursorMismatchError: the cursor belongs to another order.
    """
    assembler, reader = open_parts(release, config, statistics, world_size=world_size)
    turns = Turns(assembler.plan.stream, rank, world_size, cursor)
    pool: PackPool | None = None
    if config.read.actors:
        from train.overflow import OverflowPool

        pool = OverflowPool(
            partial(open_parts, release, config, statistics),
            lanes_of_rank(rank, world_size, config.order.lanes),
            actors=config.read.actors,
            threads=_threads(config.read),
            resources=config.read.actor_resources,
        )
    return Loader((assembler, reader), config.read, turns, pool)


def plan_of(release: Release, config: LoaderConfig) -> Plan:
    """Return the plan of a configuration."""
    times = config.sample.times if config.sample.past_views else 1
    return make_plan(release, config.order, config.packs, times=times, resolution=config.sample.resolution)


def open_parts(
    release: Release, config: LoaderConfig, statistics: Statistics | None = None, *, world_size: int | None = None
) -> tuple[Assembler, BlockReader]:
    """Return what makes the packs of a configuration, and what reads their blocks; errors as of ``open_loader``.

    Args:
        world_size: how many ranks share the lanes; None means that no lane's windows are held for long.
    """
    plan = plan_of(release, config)
    assembler = Assembler(plan, config.sample, make_normaliser(plan, config.sample, statistics), config.augment)
    folder = config.read.cache_dir
    has_many_lanes = world_size is not None and config.order.lanes > _FEW_LANES * world_size
    if folder == "" and (has_many_lanes or not release.storage.is_local):
        folder = str(Path(tempfile.gettempdir()) / f"robolake-blocks-{os.getuid()}")
    cache = BlockCache(folder, config.read.cache_bytes) if folder else None
    return assembler, BlockReader(release, resolution=config.sample.resolution, cache=cache)


_Ahead = tuple[Turn, "Future[Batch] | None"]
"""A turn with its pack, which is being made; None for a micro-step without one."""


class Loader:
    """An iterator over one rank's packs: one a micro-step, ``micro_steps`` of them a step.

    ``share_lost`` is the part of all ranks' micro-steps that have no pack, since the ranks do not divide the lanes.

    Threads read and decode ahead. Use it as a context manager, or close it. It is made where it is used: it cannot be
    pickled, nor used in a process that was forked.
    """

    def __init__(
        self, parts: tuple[Assembler, BlockReader], config: ReadConfig, turns: Turns, pool: PackPool | None = None
    ) -> None:
        assembler, self._reader = parts
        self.plan: Plan = assembler.plan
        self.sizes = assembler.sizes
        self.micro_steps = turns.micro_steps
        self.share_lost = turns.share_lost
        self._assembler = assembler
        self._turns = turns
        self._positions: dict[int, Position] = turns.own_positions()
        self._pool = pool
        self._tally = Tally()
        self._left_out: list[tuple[int, int, int, int]] = []
        threads = _threads(config)
        self._pin = _has_gpu() if config.pin is None else config.pin
        self._makers = ThreadPoolExecutor(threads, thread_name_prefix="packs")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="windows")
        self._windows: dict[int, Future[Window]] = {}
        self._queue: Queue[_Ahead | BaseException | None] = Queue(threads + config.actors + config.ahead)
        self._over: BaseException | None = None
        self._stop = threading.Event()
        self._pid = os.getpid()
        self._scheduler = threading.Thread(target=self._read_ahead, name="turns", daemon=True)
        self._scheduler.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next pack.

        Raises:
            BadSampleError: a sample cannot be made.
            LakeDamagedError: frames of the release are gone.
            LoaderClosedError: it was closed, or belongs to another process.
        """
        if self._pid != os.getpid():
            raise LoaderClosedError(
                "this loader belongs to another process; open one there: Lance cannot be used in a process that was "
                "forked"
            )
        if self._stop.is_set():
            raise LoaderClosedError("this loader is closed")
        if self._over is not None:
            raise self._over
        found = self._next_ahead()
        if found is None or isinstance(found, BaseException):
            self._over = StopIteration() if found is None else found
            raise self._over
        turn, making = found
        self._over = None if making is None else making.exception()
        if self._over is not None:
            raise self._over
        made = empty(self.sizes) if making is None else making.result()
        if turn.lane is not None and turn.after is not None:
            self._positions[turn.lane] = turn.after
        self._count(made)
        return to_torch(replace(made, step=turn.step, lane=turn.lane), pin=self._pin)

    def cursor(self) -> Cursor:
        """Return where to go on behind the pack that was returned last; merge it with those of the other ranks."""
        return self._turns.cursor(self._positions)

    def state(self) -> LoaderState:
        """Return the cursor, with the samples that were handed out since the loader was opened."""
        return LoaderState(cursor=self.cursor(), tally=self._tally, left_out=tuple(self._left_out))

    def close(self) -> None:
        """Stop reading ahead; what is being made is finished and dropped."""
        if self._stop.is_set():
            return
        self._stop.set()
        for executor in (self._readers, self._makers):
            executor.shutdown(wait=True, cancel_futures=True)
        self._scheduler.join()
        self._windows.clear()
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        """Have packs made in the order of the turns, as many ahead as the queue holds."""
        while (turn := self._turns.peek()) is not None:
            if turn.window is None:
                self._put((self._turns.take(0), None))
            else:
                reading = self._window(turn.window)
                for number in self._turns.ahead(_READERS + 1):
                    self._window(number)
                try:
                    error = reading.exception()
                except CancelledError:  # By close.
                    return
                if error is not None:
                    self._put(error)
                    return
                window = reading.result()
                turn = self._turns.take(len(window.packs))
                self._put((turn, self._make(window, turn)))
                self._look_ahead(turn, len(window.packs))
            if self._stop.is_set():
                return
        self._put(None)

    def _next_ahead(self) -> "_Ahead | BaseException | None":
        while True:
            with suppress(Empty):
                return self._queue.get(timeout=1)
            if not self._scheduler.is_alive() and self._queue.empty():
                return RuntimeError("the thread that reads ahead has died; its error is in the log")

    def _put(self, item: "_Ahead | BaseException | None") -> None:
        while not self._stop.is_set():
            with suppress(Full):
                self._queue.put(item, timeout=0.05)
                return

    def _look_ahead(self, turn: Turn, num_packs: int) -> None:
        """Read a lane's next window when half of this one is done; let go of this one behind its last pack."""
        if 2 * (turn.index + 1) >= num_packs and turn.next_window is not None:
            self._window(turn.next_window)
        if turn.index + 1 == num_packs and turn.window is not None:
            del self._windows[turn.window]

    def _count(self, made: Batch) -> None:
        ids = np.stack([made.source_B, made.epoch_B, made.episode_B, made.frame_B])[:, : made.num_samples]
        is_bad = made.weight_B[: made.num_samples] == 0
        self._tally = self._tally + tally(*ids[:, ~is_bad])
        self._left_out += [(int(s), int(k), int(e), int(f)) for s, k, e, f in ids[:, is_bad].T]

    def _make(self, window: Window, turn: Turn) -> "Future[Batch] | None":
        own = partial(self._assembler.pack, window, turn.index)
        try:
            making = None if self._pool is None else self._pool.submit(turn, own)
            return self._makers.submit(own) if making is None else making
        except RuntimeError:
            if not self._stop.is_set():
                raise
            return None  # An executor that is closing takes nothing more.

    def _window(self, number: int) -> "Future[Window]":
        if number not in self._windows:
            try:
                self._windows[number] = self._readers.submit(self._load, number)
            except RuntimeError:  # Likewise.
                self._windows[number] = Future()
                self._windows[number].cancel()
        return self._windows[number]

    def _load(self, number: int) -> Window:
        return self._assembler.read(number, self._reader)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _threads(config: ReadConfig) -> int:
    return config.threads or len(os.sched_getaffinity(0))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
