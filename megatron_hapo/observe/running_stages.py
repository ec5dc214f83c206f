"""How far the running stages are: reported from where the work is done, shown in one place.

Stages are known to the whole process, as loggers are: what works does not know whether anyone looks. A report sets a
few numbers, and only an open display reads them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np

_TITLES = {
    "log_probs": "log-probs",
    "weight_sync": "sync",
    "memory_turn": "memory turn",
    "rollout_wait": "waiting for rollouts",
}


class Stage:
    """A stage that is running; written by the threads that work, read by the one that shows it."""

    def __init__(self, name: str, parent: Stage | None):
        self.parent = parent
        self._name, self._begin = name, time.monotonic()
        self._expected_seconds = _seconds.get(name)
        self._lock = threading.Lock()
        self._done, self._total, self._unit = 0, 0, ""
        self._followed: Callable[[], tuple[int, int]] | None = None

    @property
    def title(self) -> str:
        """Its name after those of the stages around it."""
        own = _TITLES.get(self._name, self._name)
        return own if self.parent is None else f"{self.parent.title}, {own}"

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._begin

    def position(self) -> tuple[float, float] | None:
        """How much is done, and of how much; None if nothing is known but the time."""
        done, total = self._done, self._total
        part, parts = (0, 0) if self._followed is None else self._followed()
        if not total:
            return (part, parts) if parts else None
        return min(total, done + (part / parts if parts else 0.0)), total

    def counts(self) -> str:
        """What is done of what, in words; empty if nothing is counted."""
        position = self.position()
        if position is None:
            return ""
        return f"{int(position[0])}/{int(position[1])} {self._unit or 'micro-batches'}"

    def remaining_seconds(self) -> float | None:
        """By its speed so far or, where nothing is counted, by how long it took the last time; None if unknown."""
        position, seconds = self.position(), self.seconds()
        if position is not None:
            done, total = position
            return seconds * (total - done) / done if done else None
        return None if self._expected_seconds is None else max(0.0, self._expected_seconds - seconds)

    def share(self) -> float | None:
        """The part of it that is done, in [0, 1]; None if unknown."""
        position = self.position()
        if position is not None:
            return position[0] / position[1]
        return min(1.0, self.seconds() / self._expected_seconds) if self._expected_seconds else None

    def report(self, done: int, total: int, unit: str) -> None:
        """See the function of this name."""
        self._done, self._total, self._unit = done, total, unit

    def advance(self, count: int) -> None:
        """See the function of this name."""
        with self._lock:
            self._done += count

    def follow(self, source: Callable[[], tuple[int, int]]) -> None:
        """See the function of this name."""
        self._followed = source


_current: ContextVar[Stage | None] = ContextVar("stage", default=None)
_running: list[Stage] = []
_seconds: dict[str, float] = {}
"""How long each stage within another one took the last time."""


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Runs a stage, within the one that this thread is in."""
    own = Stage(name, _current.get())
    token = _current.set(own)
    _running.append(own)
    try:
        yield
    finally:
        _running.remove(own)
        if own.parent is not None:  # the outermost, such as `step 3`, do not come again
            _seconds[name] = own.seconds()
        _current.reset(token)


def running() -> list[Stage]:
    """The stages of all threads that are running and have none running within them, in the order of their begin."""
    stages = list(_running)
    outer = {each.parent for each in stages}
    return [each for each in stages if each not in outer]


def report(done: int, total: int, unit: str) -> None:
    """Says how far the stage of this thread is.

    Args:
        unit: what is counted, in the plural.
    """
    if (own := _current.get()) is not None:
        own.report(done, total, unit)


def advance(count: int = 1) -> None:
    """Counts more of the stage of this thread as done."""
    if (own := _current.get()) is not None:
        own.advance(count)


def follow(source: Callable[[], tuple[int, int]]) -> None:
    """Says where to read how many micro-batches of the present part of the stage are done, and of how many."""
    if (own := _current.get()) is not None:
        own.follow(source)


class WorkCount:
    """How many micro-batches are done, of how many: written by a trainer rank, read by whoever shows it.

    Args:
        file: holds the numbers if another process reads or writes them; created if missing. None: they are in memory.
    """

    def __init__(self, file: Path | None = None):
        self._values = np.zeros(2, np.int64)
        if file is not None:
            if not file.exists():
                file.write_bytes(bytes(self._values.nbytes))
            self._values = np.memmap(file, np.int64, mode="r+", shape=(2,))

    def start(self, total: int) -> None:
        """Nothing is done yet."""
        self._values[:] = -1, total

    def begin_next(self) -> None:
        """The next one begins, which ends the one before."""
        self._values[0] += 1

    def end(self) -> None:
        """There is nothing more to count."""
        self._values[:] = 0

    def read(self) -> tuple[int, int]:
        """Done, and of how many; both 0 if nothing is being counted."""
        done, total = map(int, self._values)
        return max(0, done), total
