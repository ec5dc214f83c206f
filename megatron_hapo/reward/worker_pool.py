"""Computes rewards in worker processes, where a response can affect only its own reward.

The pool sends chunks of responses to idle workers over sockets, as JSON. A worker parses answers in sandboxed forks,
one per different answer (worker.py, sandbox.py), and sends each outcome at once, so if a worker itself fails, the first
unanswered response of its chunk is at fault. No library fits: pebble and concurrent.futures use pickle, and either time
out and crash by whole chunks or are too slow for single responses; multiprocessing's spawn imports the program's main
module again, which may import torch.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_hapo.errors import RewardError
from megatron_hapo.observe import running_stages
from megatron_hapo.observe.spans import SpanRecorder
from megatron_hapo.reward.frames import FrameReader, encode_frame
from megatron_hapo.reward.sandbox import EXIT_OUT_OF_MEMORY, Isolation
from megatron_hapo.reward.worker import Job, Outcome, WorkerSettings, encode_jobs, parse_outcome
from megatron_hapo.types import ScoringFailure

logger = logging.getLogger(__name__)

MAX_CHUNK = 64
START_SECONDS = 120.0
"""Limit for a worker's start, and for its imports: both are slow on a loaded machine."""
GRACE_SECONDS = 10.0
"""How long after the response's limit, which the worker enforces, the pool still waits for an outcome."""
MAX_FAILED_STARTS = 3
"""Consecutive failed starts that are tolerated: one may be bad luck, e.g. an idle worker that the OOM killer chose."""
MAX_MESSAGE_BYTES = 1 << 14

_KEPT_ENVIRONMENT = ("LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "TZ")
"""The only variables that a worker inherits: none is secret, and loading libraries and decoding text need them."""


def unisolated_message(refused: str, isolation: Isolation) -> str:
    """The error message for a system that offers no isolation."""
    return (
        f"{refused} would be passed to parsers that may run them as code, and this system offers no isolation: "
        f"{isolation}. Enable user namespaces, Landlock (Linux 5.13 or newer) or seccomp, or set "
        "reward.allow_unisolated=true to accept that a response can run code with this user's rights"
    )


class WorkerPool:
    """Scores jobs on worker processes, each response within its limits."""

    def __init__(
        self,
        *,
        num_workers: int,
        timeout_seconds: float,
        memory_bytes: int,
        allow_unisolated: bool = False,
        module: str = "megatron_hapo.reward.scorers",
        readable: tuple[Path, ...] = (),
    ):
        """
        Args:
            timeout_seconds: limit for each response; scoring that takes longer is killed.
            memory_bytes: limit of a worker's address space.
            module: see worker.WorkerSettings.
            readable: folders that scorers may read, in addition to those that Python needs.
        """
        settings = WorkerSettings(
            module=module,
            timeout_seconds=timeout_seconds,
            memory_bytes=memory_bytes,
            allow_unisolated=allow_unisolated,
            readable=readable,
        )
        self._timeout_seconds = timeout_seconds
        self._spawn: Callable[[], _Worker] = lambda: _Worker(settings)
        self._workers = [self._spawn() for _ in range(num_workers)]
        self.rows = [SpanRecorder(f"reward worker {index}") for index in range(num_workers)]
        """One row per slot, whichever process occupies it; a span is a chunk, from its dispatch to its last outcome."""
        self._failed_starts = 0
        self._suspects: set[int] = set()
        """Rows of this call on which a worker has already died once."""

    def isolation(self) -> Isolation:
        """The isolation that the system offers; waits until a worker has probed it.

        Raises:
            RewardError: workers do not start.
        """
        while True:
            for worker in self._workers:
                if worker.isolation is not None:
                    return worker.isolation
            self._advance({}, deque())

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcome of each job, in their order.

        Raises:
            RewardError: workers do not start, or cannot import what the jobs need, or refuse to evaluate answers
                without isolation.
        """
        outcomes: dict[int, Outcome] = {}
        self._suspects = set()
        waiting = deque(range(len(jobs)))
        chunk_size = max(1, min(MAX_CHUNK, len(jobs) // (8 * len(self._workers))))
        for worker in self._workers:
            worker.renew_deadline(START_SECONDS)  # a starting worker was not monitored between calls
        while len(outcomes) < len(jobs):
            for worker in self._workers:
                if worker.idle and waiting:
                    rows = [waiting.popleft() for _ in range(min(chunk_size, len(waiting)))]
                    worker.send(rows, [jobs[row] for row in rows])
            before = len(outcomes)
            self._advance(outcomes, waiting)
            running_stages.advance(len(outcomes) - before)
        return [outcomes[row] for row in range(len(jobs))]

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _advance(self, outcomes: dict[int, Outcome], waiting: deque[int]) -> None:
        """Receive what busy workers send next, and replace those that failed."""
        self._receive(outcomes)
        for index, worker in enumerate(self._workers):
            if worker.unusable:
                raise RewardError(worker.unusable)
            if worker.refused:
                assert worker.isolation is not None, "a worker refuses after it has reported its isolation"
                raise RewardError(unisolated_message(worker.refused, worker.isolation))
            failure = worker.failure()
            if failure is not None:
                self._blame(worker, failure, outcomes, waiting)
                self._workers[index] = self._spawn()

    def _receive(self, outcomes: dict[int, Outcome]) -> None:
        """Receive the messages of busy workers; waits until the earliest deadline."""
        places = zip(self._workers, self.rows, strict=True)
        busy = {worker.fileno(): (worker, row) for worker, row in places if not worker.idle}
        poller = select.poll()
        for descriptor in busy:
            poller.register(descriptor, select.POLLIN)
        patience = min(worker.deadline for worker, _ in busy.values()) - time.monotonic()
        for descriptor, _ in poller.poll(max(patience, 0.0) * 1000):
            worker, row = busy[descriptor]
            outcomes |= worker.receive(self._timeout_seconds + GRACE_SECONDS)
            if worker.scoring:
                self._failed_starts = 0
                if worker.idle:
                    row.add("score", worker.sent_ns)

    def _blame(
        self, worker: _Worker, failure: ScoringFailure, outcomes: dict[int, Outcome], waiting: deque[int]
    ) -> None:
        """Kill a failed worker; the response at fault gets its outcome, and the rest of the chunk is queued again."""
        exit_code = worker.kill()
        if worker.scoring and worker.rows and failure == "crash" and worker.rows[0] not in self._suspects:
            # Responses crash in forks, not in the worker, so something else may have killed it: try once more.
            self._suspects.add(worker.rows[0])
            logger.warning(
                "a reward worker ended while it scored (exit code %s) and is replaced; its response is scored again",
                exit_code,
            )
        elif worker.scoring and worker.rows:
            reason = {
                "timeout": f"no result within {self._timeout_seconds:g} s",
                "crash": "out of memory" if exit_code == EXIT_OUT_OF_MEMORY else f"exit code {exit_code}",
            }[failure]
            outcomes[worker.rows.popleft()] = Outcome(0.0, failure, reason)
        else:
            self._failed_starts += 1
            logger.warning(
                "a reward worker ended outside scoring (%s, exit code %s) and is replaced", failure, exit_code
            )
            if self._failed_starts > MAX_FAILED_STARTS:
                raise RewardError(
                    f"reward workers do not start (last failure: {failure}, exit code {exit_code}); if they run out "
                    "of memory during their imports, raise reward.memory_bytes"
                )
        waiting.extendleft(reversed(worker.rows))


class _Worker:
    """The pool's side of one process. States: booting, idle, importing, scoring, idle again; dead from any of them."""

    def __init__(self, settings: WorkerSettings):
        self._socket, theirs = socket.socketpair()
        # One thread, because numeric libraries reserve address space for each; the parent's module path, which a
        # script or a test may have extended.
        environment = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment |= {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        # -c and not -m, which would give the worker's classes another module name than the pool's; -P keeps the
        # folder it starts in off its module path.
        command = [sys.executable, "-P", "-W", "ignore", "-c", "from megatron_hapo.reward.worker import main; main()"]
        with theirs:
            self._process = subprocess.Popen(
                [*command, *settings.arguments(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
                cwd="/",
            )
        self._reader = FrameReader(MAX_MESSAGE_BYTES)
        self.isolation: Isolation | None = None
        self.refused = ""
        """Which responses it refused to evaluate without isolation; empty if none."""
        self.unusable = ""
        """Which scorer cannot be used, and why; empty if none."""
        self.idle = False
        self.scoring = False
        """Whether it has begun to score its chunk; stays True when the chunk is finished."""
        self.rows: deque[int] = deque()
        """The rows of its chunk without an outcome; it is working on the first."""
        self.sent_ns = 0
        """When its chunk was sent."""
        self._dead = False
        self.renew_deadline(START_SECONDS)

    @property
    def pid(self) -> int:
        """Process id of the worker's outer process; see sandbox.enter_sandbox."""
        return self._process.pid

    def fileno(self) -> int:
        """Descriptor of the socket to the worker."""
        return self._socket.fileno()

    def renew_deadline(self, seconds: float) -> None:
        """Set the deadline of its next message, from now."""
        self.deadline = time.monotonic() + seconds

    def send(self, rows: Sequence[int], jobs: Sequence[Job]) -> None:
        """Give an idle worker a chunk. It is reading, so this does not block."""
        self.idle = self.scoring = False
        self.sent_ns = time.time_ns()
        self.rows = deque(rows)
        self.renew_deadline(START_SECONDS)
        try:
            self._socket.sendall(encode_frame(encode_jobs(jobs)))
        except OSError:
            self._dead = True

    def receive(self, timeout_seconds: float) -> dict[int, Outcome]:
        """The outcomes received, by row; sets the deadline of the next message."""
        outcomes = {}
        try:
            received = self._socket.recv(1 << 16)
            messages = self._reader.feed(received)
            self._dead = not received
            for message in messages:
                self._take(message, outcomes)
                self.renew_deadline(timeout_seconds)
        except (OSError, ValueError, TypeError, LookupError):  # the connection failed, or the message is malformed
            self._dead = True
        return outcomes

    def failure(self) -> ScoringFailure | None:
        """Why the worker must be replaced; None if it need not be."""
        if self._dead:
            return "crash"
        return "timeout" if not self.idle and time.monotonic() > self.deadline else None

    def kill(self) -> int:
        """Stop the process; returns its exit code."""
        self._socket.close()  # the worker then exits together with its children
        try:
            return self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _take(self, message: Any, outcomes: dict[int, Outcome]) -> None:
        if isinstance(message, list):
            outcomes[self.rows[0]] = parse_outcome(message)
            self.rows.popleft()
            self.idle = not self.rows
        elif "ready" in message:
            self.isolation = Isolation(**message["ready"])
            self.idle = True
        elif "started" in message:
            self.scoring = True
        elif "refused" in message:
            self.refused = str(message["refused"])
        elif "unusable" in message:
            self.unusable = str(message["unusable"])
