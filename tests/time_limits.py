"""Time limits of tests that follow the machine: a limit that is ample on an idle one may be short on a loaded one."""

from __future__ import annotations

import functools
import os
import time

_NOMINAL_SECONDS = 0.02
"""Time of `_work` on an idle core of the machine on which the limits were chosen."""
_LARGEST_FACTOR = 20.0


def patient(seconds: float) -> float:
    """This limit for an idle machine, longer on one that is slow or loaded."""
    return seconds * _factor()


@functools.cache
def _factor() -> float:
    """How much slower than an idle machine this one is, measured once in a process: at least 1.

    The load average looks back a minute, the measurement sees what is running now, and the speed of the cores. Other
    workers of pytest may be busy later.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    start = time.perf_counter()
    _work()
    slowness = (time.perf_counter() - start) / _NOMINAL_SECONDS
    return min(max(workers, load, slowness), _LARGEST_FACTOR)


def _work() -> int:
    return sum(number * number for number in range(300_000))
