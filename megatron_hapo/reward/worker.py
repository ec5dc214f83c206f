"""The process that scores responses for worker_pool.py, parsing answers in sandboxed forks. Imports no torch."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import math
import os
import secrets
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hapo.config.scorer_names import is_own
from megatron_hapo.reward.frames import encode_frame, receive_frame
from megatron_hapo.reward.own_scorer import OwnScorerError, load_own_scorer, own_reward, read_result
from megatron_hapo.reward.programs import MAX_OUTPUT_BYTES, MAX_TESTS, digest_of_output, program_of, run_test
from megatron_hapo.reward.sandbox import (
    EXIT_OUT_OF_MEMORY,
    Ending,
    Policy,
    Sandbox,
    enter_sandbox,
    num_threads,
    python_paths,
)

if TYPE_CHECKING:  # it imports numpy, which the outer process does not need
    from megatron_hapo.types import Asked, ScoringFailure

MAX_REASON_CHARACTERS = 300
MAX_REMEMBERED = 1024
"""Outcomes that a worker keeps for further responses with the same answer."""

_SCORED, _OWN, _FAILED = b"s", b"o", b"f"
_SCORE = struct.Struct("!d")


@dataclass(frozen=True)
class Job:
    """One response, with what its scorer needs."""

    response: str
    ground_truth: str
    data_source: str
    scorer: str
    row: Mapping[str, Any] = field(default_factory=dict)
    """The columns of its row for a scorer of the user's own; the tests, without their results, for `code`."""


@dataclass(frozen=True)
class Outcome:
    """The result of scoring one response."""

    correctness: float
    """In [0, 1]; 0 after a failure."""
    failure: ScoringFailure | None = None
    reason: str = ""
    """Why it failed, for the log."""
    total: float | None = None
    """The reward, if a scorer of the user's own gave it."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Its named parts."""
    digests: tuple[str | None, ...] = ()
    """Of what a program gave in each of its tests; the driver compares them."""
    asked: Asked | None = None
    """What it took, if a server scored it."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings of a worker."""

    module: str
    """Has `score`, `settle`, `answer_of`, `evaluates`, `resolve_scorer` and `preload`, as megatron_hapo.reward.scorers
    does."""
    timeout_seconds: float
    """Limit for each response."""
    memory_bytes: int
    """Limit of the address space."""
    allow_unisolated: bool
    readable: tuple[Path, ...] = ()
    """Folders that scorers may read, in addition to those that Python needs."""

    def arguments(self, descriptor: int) -> list[str]:
        """The command line of `main`, with the descriptor of the worker's socket."""
        return [
            str(descriptor),
            self.module,
            str(self.timeout_seconds),
            str(self.memory_bytes),
            str(int(self.allow_unisolated)),
            *map(str, self.readable),
        ]

    @staticmethod
    def parse(arguments: list[str]) -> tuple[int, WorkerSettings]:
        """The descriptor and the settings in a command line made by `arguments`."""
        descriptor, module, timeout_seconds, memory_bytes, allow_unisolated, *readable = arguments
        return int(descriptor), WorkerSettings(
            module=module,
            timeout_seconds=float(timeout_seconds),
            memory_bytes=int(memory_bytes),
            allow_unisolated=bool(int(allow_unisolated)),
            readable=tuple(map(Path, readable)),
        )


def main() -> None:
    """Serve until the pool closes its end of the socket."""
    descriptor, settings = WorkerSettings.parse(sys.argv[1:])
    # Ctrl-C, and torchrun's SIGTERM to the process group, are for the driver, which then closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    policy = Policy(readable=(*python_paths(), *settings.readable), memory_bytes=settings.memory_bytes)
    sandbox = enter_sandbox(policy, lifeline=descriptor)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off; ours is on
    _Server(socket.socket(fileno=descriptor), importlib.import_module(settings.module), sandbox, settings).serve()


def parse_outcome(message: Any) -> Outcome:
    """The outcome that a worker sent.

    Raises:
        ValueError: the message is not a valid outcome.
    """
    if not isinstance(message, list) or len(message) != 6:
        raise ValueError("an outcome must have six fields")
    correctness, failure, reason, total, parts, digests = message
    if not isinstance(reason, str) or len(reason) > MAX_REASON_CHARACTERS or failure not in (None, "timeout", "crash"):
        raise ValueError("an outcome's failure must be None, timeout or crash, and its reason a short string")
    if len(digests) > MAX_TESTS or not all(digest is None or isinstance(digest, str) for digest in digests):
        raise ValueError("digests must be strings or None, at most one for each test")
    if total is None:
        return Outcome(_checked_score(correctness), failure, reason, digests=tuple(digests))
    reward = read_result({**parts, "total": total})
    return Outcome(_checked_score(correctness), failure, reason, reward.total, reward.parts)


def encode_jobs(jobs: Sequence[Job]) -> dict[str, Any]:
    """The message that hands these jobs to a worker; a row that several of them share is in it once."""
    rows = {id(job.row): job.row for job in jobs}
    places = {key: place for place, key in enumerate(rows)}
    return {
        "rows": [dict(row) for row in rows.values()],
        "jobs": [[job.response, job.ground_truth, job.data_source, job.scorer, places[id(job.row)]] for job in jobs],
    }


def _decode_jobs(message: Mapping[str, Any]) -> list[Job]:
    return [Job(*fields, row=message["rows"][place]) for *fields, place in message["jobs"]]


class _Server:
    def __init__(self, connection: socket.socket, scorers: Any, sandbox: Sandbox, settings: WorkerSettings):
        self._connection = connection
        self._scorers = scorers
        self._sandbox = sandbox
        self._settings = settings
        self._scored: dict[tuple[str, str, str, str], Outcome] = {}
        """Outcomes by answer, ground truth, data source and scorer, the oldest first."""

    def serve(self) -> None:
        loaded: set[str] = set()
        self._send({"ready": asdict(self._sandbox.isolation)})
        while (chunk := receive_frame(self._connection)) is not None:
            jobs = _decode_jobs(chunk)
            refusal = self._refusal(jobs)
            if refusal:
                self._send({"refused": refusal})
                return
            needed = {self._resolved(job) for job in jobs}
            for scorer in needed - loaded:
                try:
                    if is_own(scorer):
                        load_own_scorer(scorer)
                    elif not _is_here(scorer):
                        self._scorers.preload(scorer)
                except OwnScorerError as error:
                    self._send({"unusable": f"{scorer}: {_printable(str(error))}"})
                    return
                gc.collect()
                gc.freeze()  # garbage collection in a child then leaves the pages shared with this process untouched
            loaded |= needed
            if num_threads() > 1:
                raise RuntimeError("a scorer's imports started threads, whose locks a fork would copy")
            self._send({"started": True})
            for job in jobs:
                outcome = self._outcome(job)
                judged = [outcome.correctness, outcome.failure, outcome.reason, outcome.total, outcome.parts]
                self._send([*judged, outcome.digests])

    def _resolved(self, job: Job) -> str:
        return job.scorer if _is_here(job.scorer) else self._scorers.resolve_scorer(job.scorer, job.data_source)

    def _send(self, message: Any) -> None:
        self._connection.sendall(encode_frame(message))

    def _refusal(self, jobs: list[Job]) -> str:
        """Which of these responses must not be scored without isolation; empty if all may be scored."""
        if self._settings.allow_unisolated:
            return ""
        programs = next((job for job in jobs if job.scorer == "code"), None)
        if programs is not None and not self._sandbox.isolation.confines_programs:
            return f"Programs of {programs.data_source} (scorer code)"
        if self._sandbox.isolation.any:
            return ""
        built_in = (job for job in jobs if not _is_here(job.scorer))
        evaluated = next((job for job in built_in if self._scorers.evaluates(job.scorer, job.data_source)), None)
        return "" if evaluated is None else f"Answers to {evaluated.data_source} (scorer {evaluated.scorer})"

    def _outcome(self, job: Job) -> Outcome:
        if is_own(job.scorer):
            return self._own_outcome(job)
        if job.scorer == "code":
            return self._code_outcome(job)
        fields = (job.response, job.ground_truth, job.data_source)
        try:
            settled = self._scorers.settle(*fields, scorer=job.scorer)
        except MemoryError:
            os._exit(EXIT_OUT_OF_MEMORY)  # memory freed now may not be available to the next response
        except Exception as error:  # a scorer's bug on one response is that response's failure
            return Outcome(0.0, "crash", _printable(repr(error)))
        if settled is not None:
            return Outcome(settled)
        # Responses with the same answer to the same row run the same computation, whatever they try in it.
        same = (self._scorers.answer_of(job.response, job.data_source, scorer=job.scorer), *fields[1:], job.scorer)
        if same not in self._scored:
            outcome = self._parsed_outcome(job)
            if outcome.failure is not None:
                return outcome  # perhaps of the moment
            if len(self._scored) >= MAX_REMEMBERED:
                self._scored.pop(next(iter(self._scored)))
            self._scored[same] = outcome
        return self._scored[same]

    def _parsed_outcome(self, job: Job) -> Outcome:
        fields = (job.response, job.ground_truth, job.data_source)

        def judge() -> bytes:
            try:
                return _SCORED + _SCORE.pack(self._scorers.score(*fields, scorer=job.scorer))
            except MemoryError:
                raise
            except Exception as error:
                return _FAILED + _printable(repr(error)).encode()

        seconds = self._settings.timeout_seconds
        return _read(self._sandbox.run(judge, timeout_seconds=seconds, max_bytes=2048), seconds)

    def _code_outcome(self, job: Job) -> Outcome:
        """The digest of each test's result. A program that is wrong, slow or hostile fails tests, which is no failure
        of the scoring."""
        if "fault" in job.row:
            return Outcome(0.0, "crash", _printable(job.row["fault"]))
        program = program_of(job.response)
        if program is None:
            return Outcome(0.0)
        row, digests = job.row, []
        deadline = time.monotonic() + self._settings.timeout_seconds
        for test in row["inputs"]:
            remaining = min(row["test_seconds"], deadline - time.monotonic())
            if remaining <= 0:
                break
            digests.append(self._test(program, test, row, remaining))
            if digests[-1] is None and row["stop_at_failure"]:
                break
        return Outcome(0.0, digests=tuple(digests))

    def _test(self, program: str, test: str, row: Mapping[str, Any], seconds: float) -> str | None:
        nonce, kind = secrets.token_bytes(16), row["kind"]

        def execute() -> bytes:
            return run_test(program, kind, test, function=row["function"], prompt=row["prompt"], nonce=nonce)

        stdin = test.encode(errors="replace") if kind == "stdin" else b""
        ending = self._sandbox.run(execute, timeout_seconds=seconds, max_bytes=MAX_OUTPUT_BYTES, stdin=stdin)
        if ending.late or ending.exit_code != 0 or len(ending.output) >= MAX_OUTPUT_BYTES:
            return None
        return digest_of_output(kind, ending.output, nonce)

    def _own_outcome(self, job: Job) -> Outcome:
        row = {**job.row, "ground_truth": job.ground_truth, "data_source": job.data_source}

        def judge() -> bytes:
            try:
                reward = own_reward(job.scorer, job.response, row)
                return _OWN + json.dumps({**reward.parts, "total": reward.total}).encode()
            except OwnScorerError as error:
                return _FAILED + _printable(str(error)).encode()

        seconds = self._settings.timeout_seconds
        return _read(self._sandbox.run(judge, timeout_seconds=seconds, max_bytes=8192), seconds)


def _is_here(scorer: str) -> bool:
    """Whether the worker calls the scorer itself, and not the module of built-in scorers."""
    return is_own(scorer) or scorer == "code"


def _read(ending: Ending, timeout_seconds: float) -> Outcome:
    """The outcome of a confined call. Its output may be hostile, and affects only responses with the same answer."""
    if ending.late:
        return Outcome(0.0, "timeout", f"no result within {timeout_seconds:g} s")
    if ending.exit_code == EXIT_OUT_OF_MEMORY:
        return Outcome(0.0, "crash", "out of memory")
    if ending.exit_code != 0:
        return Outcome(0.0, "crash", f"exit code {ending.exit_code}")
    kind, body = ending.output[:1], ending.output[1:]
    if kind == _FAILED:
        return Outcome(0.0, "crash", _printable(body.decode(errors="replace")))
    try:
        if kind == _SCORED:
            return Outcome(_checked_score(_SCORE.unpack(body)[0]))
        if kind == _OWN:
            reward = read_result(json.loads(body))
            return Outcome(reward.correctness, total=reward.total, parts=reward.parts)
    except (ValueError, RecursionError, struct.error):
        pass
    return Outcome(0.0, "crash", "the scorer's output is not a score in [0, 1]")


def _checked_score(score: Any) -> float:
    if (
        isinstance(score, bool)
        or not isinstance(score, (int, float))
        or not math.isfinite(score)
        or not 0 <= score <= 1
    ):
        raise ValueError("a score must be a number in [0, 1]")
    return float(score)


def _printable(text: str) -> str:
    """The text for a log line: shortened, and without control characters."""
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_REASON_CHARACTERS])
