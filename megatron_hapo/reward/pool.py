"""Rewards from worker processes: a response whose scoring hangs, dies or eats memory costs its own reward alone.

The pool sends chunks of responses to idle workers over pipes; a worker answers each response as soon as it is scored,
so the first unanswered response of a chunk is the one to blame. No library fits: pebble and concurrent.futures measure
the time and the crash of a whole chunk, or are too slow response by response, and multiprocessing's spawn imports the
program's main module again, which may hold torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from megatron_hapo.config import RewardConfig
from megatron_hapo.data.prompts import load_tokenizer
from megatron_hapo.errors import RewardError
from megatron_hapo.observe.spans import SpanRecorder, Timeline
from megatron_hapo.reward import scorers
from megatron_hapo.reward.worker import EXIT_OUT_OF_MEMORY, READY, STARTED, Job, Outcome, command_arguments
from megatron_hapo.types import Rollout, Score, ScoringFailure

logger = logging.getLogger(__name__)

MAX_CHUNK = 64
START_SECONDS = 120.0
"""Limit for a worker's start, and for its imports: both are slow on a loaded machine."""
MAX_FAILED_STARTS = 3
"""In a row, before the run fails: one may be bad luck, e.g. an idle worker that the system's memory killer chose."""


class ProcessRewardPool:
    """Rewards of rollouts by the config's rules; a context manager that ends its worker processes."""

    def __init__(self, config: RewardConfig, tokenizer_path: Path | str, max_response_tokens: int):
        self._config = config
        self._max_response_tokens = max_response_tokens
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._lock = threading.Lock()  # a step generated ahead is scored beside an evaluation
        self._pool = WorkerPool(
            num_workers=config.workers, timeout_seconds=config.timeout_seconds, memory_bytes=config.memory_bytes
        )

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """A score for each rollout, in their order."""
        texts = self._tokenizer.batch_decode([r.response_ids.tolist() for r in rollouts], skip_special_tokens=True)
        jobs = [
            Job(text, rollout.prompt.ground_truth, rollout.prompt.data_source, self._config.scorer)
            for text, rollout in zip(texts, rollouts, strict=True)
        ]
        with self._lock:
            outcomes = self._pool.run(jobs)
        _log_failures(rollouts, outcomes)
        return [self._score(rollout, outcome) for rollout, outcome in zip(rollouts, outcomes, strict=True)]

    def start_profile(self) -> None:
        """Begin to record what each worker does."""
        for row in self._pool.rows:
            row.start()

    def finish_profile(self) -> list[Timeline]:
        """What each worker did."""
        return [row.finish() for row in self._pool.rows]

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> ProcessRewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score(self, rollout: Rollout, outcome: Outcome) -> Score:
        config = self._config
        penalty = scorers.overlong_penalty(
            len(rollout.response_ids),
            max_response_tokens=self._max_response_tokens,
            buffer_tokens=config.overlong.buffer_tokens,
            factor=config.overlong.factor,
        )
        earned = config.wrong + outcome.correctness * (config.correct - config.wrong)
        return Score(reward=earned + penalty, correctness=outcome.correctness, failure=outcome.failure)


def _log_failures(rollouts: Sequence[Rollout], outcomes: Sequence[Outcome]) -> None:
    failed = [(rollout, outcome) for rollout, outcome in zip(rollouts, outcomes, strict=True) if outcome.failure]
    if failed:
        rollout, outcome = failed[0]
        logger.warning(
            "%d of %d responses could not be scored and count as wrong; the first, to %s: %s (%s)",
            len(failed),
            len(rollouts),
            rollout.prompt.uid,
            outcome.failure,
            outcome.reason,
        )


class WorkerPool:
    """Scores jobs on worker processes, each response within its limits."""

    def __init__(
        self,
        *,
        num_workers: int,
        timeout_seconds: float,
        memory_bytes: int,
        module: str = "megatron_hapo.reward.scorers",
    ):
        """
        Args:
            timeout_seconds: for each response; what takes longer is killed.
            memory_bytes: address space of a worker.
            module: see reward_worker.command_arguments.
        """
        self._timeout_seconds = timeout_seconds
        self._spawn: Callable[[], _Worker] = lambda: _Worker(
            module=module, timeout_seconds=timeout_seconds, memory_bytes=memory_bytes
        )
        self._workers = [self._spawn() for _ in range(num_workers)]
        self.rows = [SpanRecorder(f"reward worker {index}") for index in range(num_workers)]
        """Each place's, whichever process has it: a chunk from its dispatch to its last outcome."""
        self._failed_starts = 0

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcome of each job, in their order.

        Raises:
            RewardError: workers do not start, or cannot import what the jobs need.
        """
        outcomes: dict[int, Outcome] = {}
        waiting = deque(range(len(jobs)))
        chunk_size = max(1, min(MAX_CHUNK, len(jobs) // (8 * len(self._workers))))
        for worker in self._workers:
            worker.renew_deadline(START_SECONDS)  # one that boots has not been watched since the last call
        while len(outcomes) < len(jobs):
            for worker in self._workers:
                if worker.idle and waiting:
                    rows = [waiting.popleft() for _ in range(min(chunk_size, len(waiting)))]
                    worker.send(rows, [jobs[row] for row in rows])
            self._receive(outcomes)
            for index, worker in enumerate(self._workers):
                failure = worker.failure()
                if failure is not None:
                    self._bury(worker, failure, outcomes, waiting)
                    self._workers[index] = self._spawn()
        return [outcomes[row] for row in range(len(jobs))]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _receive(self, outcomes: dict[int, Outcome]) -> None:
        """Take what busy workers have said; wait for it until the first deadline."""
        places = zip(self._workers, self.rows, strict=True)
        busy = {worker.connection: (worker, row) for worker, row in places if not worker.idle}
        patience = min(worker.deadline for worker, _ in busy.values()) - time.monotonic()
        for connection in wait(list(busy), timeout=max(patience, 0.0)):
            assert isinstance(connection, Connection)
            worker, row = busy[connection]
            outcomes |= worker.receive(self._timeout_seconds)
            if worker.scoring:
                self._failed_starts = 0
                if worker.idle:
                    row.add("score", worker.sent_ns)

    def _bury(
        self, worker: _Worker, failure: ScoringFailure, outcomes: dict[int, Outcome], waiting: deque[int]
    ) -> None:
        """Kill a worker that failed; the response to blame gets its outcome, those behind it wait again."""
        exit_code = worker.kill()
        if worker.scoring and worker.rows:
            reason = {
                "timeout": f"no result within {self._timeout_seconds:g} s",
                "crash": "out of memory" if exit_code == EXIT_OUT_OF_MEMORY else f"exit code {exit_code}",
            }[failure]
            outcomes[worker.rows.popleft()] = Outcome(0.0, failure, reason)
        else:
            self._failed_starts += 1
            if self._failed_starts > MAX_FAILED_STARTS:
                raise RewardError(
                    f"reward workers do not start (the last: {failure}, exit code {exit_code}); if they run out of "
                    "memory while they import, raise reward.memory_bytes"
                )
        waiting.extendleft(reversed(worker.rows))


class _Worker:
    """The pool's side of one process: booting, idle, importing, scoring, idle; from any of them dead."""

    def __init__(self, *, module: str, timeout_seconds: float, memory_bytes: int):
        self.connection, theirs = Pipe()
        arguments = command_arguments(
            theirs.fileno(), module=module, timeout_seconds=timeout_seconds, memory_bytes=memory_bytes
        )
        # One thread, because numeric libraries reserve address space for each; the parent's module path, which a
        # script or a test may have extended.
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **single, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # -c and not -m, which would give the worker's classes another module name than the pool's.
        command = [sys.executable, "-W", "ignore", "-c", "from megatron_hapo.reward.worker import main; main()"]
        with theirs:
            self._process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
            )
        self.idle = False
        self.scoring = False
        """It has begun to score its chunk, or has finished it."""
        self.rows: deque[int] = deque()
        """Of the chunk, those without an outcome; the first is in work."""
        self.sent_ns = 0
        """When it was given its chunk."""
        self._dead = False
        self.renew_deadline(START_SECONDS)

    @property
    def pid(self) -> int:
        return self._process.pid

    def renew_deadline(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def send(self, rows: Sequence[int], jobs: Sequence[Job]) -> None:
        """Give an idle worker a chunk. It is reading, so this does not block."""
        self.idle = self.scoring = False
        self.sent_ns = time.time_ns()
        self.rows = deque(rows)
        self.renew_deadline(START_SECONDS)
        try:
            self.connection.send(jobs)
        except OSError:
            self._dead = True

    def receive(self, timeout_seconds: float) -> dict[int, Outcome]:
        """The outcomes that have come, by row; its next word may take `timeout_seconds`."""
        outcomes = {}
        try:
            while not self.idle and self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, Outcome):
                    outcomes[self.rows.popleft()] = message
                    self.idle = not self.rows
                elif message == READY:
                    self.idle = True
                elif message == STARTED:
                    self.scoring = True
                self.renew_deadline(timeout_seconds)
        except (EOFError, OSError):
            self._dead = True
        return outcomes

    def failure(self) -> ScoringFailure | None:
        """Why the worker has to be replaced, if it has to."""
        if self._dead:
            return "crash"
        return "timeout" if not self.idle and time.monotonic() > self.deadline else None

    def kill(self) -> int:
        """End the process; its exit code, its own if it died by itself."""
        if self._dead:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1.0)
        self._process.kill()
        self.connection.close()
        return self._process.wait()
