"""The process that scores responses for the pool in reward_workers.py. Imports no torch: it starts in a moment."""

from __future__ import annotations

import importlib
import logging
import os
import resource
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_hapo.reward.scorers import Scorer
from megatron_hapo.types import ScoringFailure

READY, STARTED = "ready", "started"
"""What a worker says besides its outcomes: it waits for a chunk; it has imported what the chunk needs."""

EXIT_OUT_OF_MEMORY = 77


@dataclass(frozen=True)
class Job:
    """What a scorer needs to know about one response."""

    response: str
    ground_truth: str
    data_source: str
    scorer: Scorer


@dataclass(frozen=True)
class Outcome:
    """How the scoring of one response went."""

    correctness: float
    """In [0, 1]; 0 after a failure."""
    failure: ScoringFailure | None = None
    reason: str = ""
    """Of the failure, for the log."""


def main() -> None:
    """Serve until the pool closes its end of the pipe. Arguments: see command_arguments."""
    descriptor, module, timeout_seconds, memory_bytes = sys.argv[1:]
    # Ctrl-C, and torchrun's SIGTERM to the process group, are for the driver, which then closes the pipe.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off; ours are on
    _serve(Connection(int(descriptor)), importlib.import_module(module), float(timeout_seconds))


def command_arguments(descriptor: int, *, module: str, timeout_seconds: float, memory_bytes: int) -> list[str]:
    """What main() reads.

    Args:
        descriptor: of the worker's end of the pipe.
        module: has `score`, `resolve_scorer` and `preload` as megatron_hapo.reward.scorers has them.
        timeout_seconds: for each response.
        memory_bytes: of address space.
    """
    return [str(descriptor), module, str(timeout_seconds), str(memory_bytes)]


def _serve(connection: Connection, scorers: Any, timeout_seconds: float) -> None:
    loaded: set[str] = set()
    connection.send(READY)
    while True:
        try:
            jobs: list[Job] = connection.recv()
        except (EOFError, ConnectionResetError):  # the pool closed its end, or was killed with an answer unread
            return
        needed = {scorers.resolve_scorer(job.scorer, job.data_source) for job in jobs}
        for scorer in needed - loaded:
            scorers.preload(scorer)
        loaded |= needed
        connection.send(STARTED)
        for job in jobs:
            # The pool kills a worker that is late. This timer is for the worker that hangs after its pool is gone:
            # its default action ends the process even inside C code that holds the interpreter lock.
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout_seconds + 10)
            connection.send(_outcome(job, scorers))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _outcome(job: Job, scorers: Any) -> Outcome:
    try:
        return Outcome(scorers.score(job.response, job.ground_truth, job.data_source, scorer=job.scorer))
    except MemoryError:
        os._exit(EXIT_OUT_OF_MEMORY)  # what is freed now may not come back to the next response
    except Exception as error:  # a scorer's bug on one response is that response's failure
        return Outcome(0.0, "crash", repr(error))
