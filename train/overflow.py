"""Packs made by Ray actors on other nodes, where the cores beside the GPUs are too few to decode for them."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from lake.errors import LoaderClosedError
from train.batch import Batch
from train.keyed import key_of, mix
from train.samples import Window
from train.turns import Turn

if TYPE_CHECKING:
    from train.blocks import BlockReader
    from train.samples import Assembler

Opened = Callable[[], "tuple[Assembler, BlockReader]"]

_KEY = key_of("overflow")
_LOOK_S = 0.1
_MOST_FAILURES = 3
_log = logging.getLogger(__name__)


class PackMaker:
    """The actor: makes packs as the pure function of (window, index) that they are.

    It keeps the windows that its lanes are at, as the rank itself does, and reads the next one of a lane ahead.
    """

    def __init__(self, opened: Opened) -> None:
        self._assembler, self._reader = opened()
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="windows")
        self._windows: dict[int, Future[Window]] = {}

    def pack(self, number: int, index: int) -> Batch:
        """Return a pack, of arrays; errors as of ``Assembler``."""
        order, lanes = self._assembler.plan.stream.order, self._assembler.plan.stream.num_lanes
        for each in [each for each in self._windows if each < number and (number - each) % lanes == 0]:
            del self._windows[each]
        window = self._window(number).result()
        following = number + lanes
        if 2 * (index + 1) >= len(window.packs) and (order.num_windows is None or following < order.num_windows):
            self._window(following)
        return self._assembler.pack(window, index)

    def _window(self, number: int) -> Future[Window]:
        if number not in self._windows:
            self._windows[number] = self._readers.submit(self._load, number)
        return self._windows[number]

    def _load(self, number: int) -> Window:
        return self._assembler.read(number, self._reader)


@dataclass(kw_only=True, slots=True, eq=False)
class _Actor:
    """An actor, with what is known of it."""

    handle: Any
    ready: Any
    """Answers once it can make packs; None behind that answer."""
    failures: int
    """How many in its place were lost in a row without a pack."""
    heard: float = 0.0
    """When it last answered."""


class OverflowPool:
    """Actors that take their share of a rank's packs; what they lose is made by the rank itself.

    Which of them makes a pack changes nothing in it. Only those that have come up are asked, so those that wait for a
    node keep nobody waiting. One that is lost is replaced, wherever there is room for it, until three in a row were
    lost without a pack.
    """

    def __init__(
        self,
        opened: Opened,
        lanes: Sequence[int],
        *,
        actors: int,
        threads: int,
        resources: dict[str, float],
        timeout_s: float = 60.0,
    ) -> None:
        """Start the actors.

        Args:
            opened: opens an assembler and a reader; it is called in each actor.
            lanes: of the rank.
            actors: how many; each takes a core.
            threads: of the rank itself, which keeps its share of the packs.
            resources: what an actor needs beside a core; a custom resource keeps it on the nodes that have it.
            timeout_s: an actor that answers nothing for so long is given up.
        """
        # DEFAULT, or they would have to fit into the placement group of the worker that starts them.
        options = {"num_cpus": 1, "resources": resources, "scheduling_strategy": "DEFAULT"}
        self._make = ray.remote(**options)(PackMaker)
        self._opened = opened
        self._places = {lane: at for at, lane in enumerate(lanes)}
        self._threads = threads
        self._timeout_s = timeout_s
        self._lock = threading.RLock()
        self._is_closed = False
        self._next_look = 0.0
        self._actors = [self._start(0) for _ in range(actors)]
        # Threads that wait; what is asked of an actor is asked before.
        self._waiters = ThreadPoolExecutor(actors + 2, thread_name_prefix="overflow")
        self.num_made = 0
        self.num_lost = 0

    def submit(self, turn: Turn, own: Callable[[], Batch]) -> Future[Batch] | None:
        """Have a pack made by an actor; None where it is the rank's to make.

        Args:
            own: makes it in the rank.
        """
        with self._lock:
            self._look()
            ready = [actor for actor in self._actors if actor.ready is None]
            if self._is_closed or not self._takes(turn, len(ready)):
                return None
            assert turn.lane is not None
            at = actor_of(self._places[turn.lane], turn.index, num_lanes=len(self._places), num_actors=len(ready))
            actor = ready[at]
            answer = actor.handle.pack.remote(turn.window, turn.index)
        return self._waiters.submit(self._wait, actor, answer, own)

    def close(self) -> None:
        """End the actors; packs that they were asked for are dropped."""
        with self._lock:
            self._is_closed = True
            actors, self._actors = self._actors, []
        self._waiters.shutdown(wait=False, cancel_futures=True)
        if ray.is_initialized():
            for actor in actors:
                ray.kill(actor.handle)
        self._waiters.shutdown()

    def _start(self, failures: int) -> _Actor:
        handle: Any = self._make.remote(self._opened)
        return _Actor(handle=handle, ready=handle.__ray_ready__.remote(), failures=failures)

    def _look(self) -> None:
        """See which actors have come up since, or could not."""
        now = time.monotonic()
        coming = [actor for actor in self._actors if actor.ready is not None]
        if not coming or now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        answered, _ = ray.wait([actor.ready for actor in coming], num_returns=len(coming), timeout=0)
        for actor in coming:
            if actor.ready in answered:
                try:
                    ray.get(actor.ready)
                except RayError as error:
                    self._lose(actor, error)
                else:
                    actor.ready, actor.heard = None, now

    def _takes(self, turn: Turn, num_ready: int) -> bool:
        """Whether a pack is the actors' share; by chance, for a pattern would meet that of the lanes."""
        assert turn.window is not None
        word = mix(_KEY, np.array([turn.window], np.uint64))
        word = mix(word, np.array([turn.index], np.uint64))
        return int(word[0]) < int(num_ready / (num_ready + self._threads) * 2**64)

    def _wait(self, actor: _Actor, answer: Any, own: Callable[[], Batch]) -> Batch:
        try:
            made = self._answer(actor, answer)
        except RayError as error:
            with self._lock:
                if self._is_closed:
                    raise LoaderClosedError("the loader was closed before this pack was made") from error
                self._lose(actor, error)
            # Where the pack itself is bad, it is so here, too: that error is the one to raise.
            return own()
        with self._lock:
            self.num_made += 1
            actor.failures = 0
        return made

    def _answer(self, actor: _Actor, answer: Any) -> Batch:
        """Wait for an answer, as long as the actor gives any; errors as of ``ray.get``."""
        began = time.monotonic()
        while True:
            until = max(began, actor.heard) + self._timeout_s
            try:
                made: Any = ray.get(answer, timeout=max(0.0, until - time.monotonic()))
            except GetTimeoutError:
                if actor.heard + self._timeout_s <= time.monotonic():
                    raise
            else:
                actor.heard = time.monotonic()
                return made

    def _lose(self, actor: _Actor, error: RayError) -> None:
        """Give an actor up, and start another in its place unless that has been of no use before."""
        if actor not in self._actors:
            return
        at = self._actors.index(actor)
        self.num_lost += 1
        ray.kill(actor.handle)
        is_last = actor.failures + 1 >= _MOST_FAILURES
        self._actors[at : at + 1] = [] if is_last else [self._start(actor.failures + 1)]
        then = "is not replaced, as those before it were of no use either" if is_last else "is replaced"
        _log.warning("an actor that makes packs was lost and %s: %s", then, str(error).strip()[-1000:])


def actor_of(place: int, index: int, *, num_lanes: int, num_actors: int) -> int:
    """Return which actor makes a pack of a lane: one of as few as keep all busy, since each reads the lane's windows.

    Args:
        place: of the lane among those of the rank.
        index: of the pack within its window.
    """
    each = ceil(num_actors / num_lanes)
    return (place * each + index % each) % num_actors
