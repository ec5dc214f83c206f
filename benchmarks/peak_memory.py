"""Measures by how much the memory of this process and its descendants increases."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import psutil


class PeakMemory:
    """Samples the proportional set size (PSS) of this process and its descendants while the context is open.

    Args:
        every_seconds: interval between samples.
    """

    def __init__(self, *, every_seconds: float):
        self._every_seconds = every_seconds

    def __enter__(self) -> PeakMemory:
        self._before = self._peak = _total()
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._sampler.join()

    @property
    def rise(self) -> int:
        """The highest sample minus the memory at the start, bytes. A peak between two samples is missed."""
        return self._peak - self._before

    def _sample(self) -> None:
        while not self._ended.wait(self._every_seconds):
            self._peak = max(self._peak, _total())


def _total() -> int:
    """Current PSS of all these processes, bytes."""
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("Pss:")).split()[1]) << 10
    return total
