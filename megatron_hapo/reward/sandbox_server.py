"""Tests programs on a sandbox server instead of in reward workers, in the form of SandboxFusion's `POST /run_code`.

A request holds a program and one input; the expected results stay here, as they do with reward workers. A program that
fails, is too slow or is stopped by the server fails its test; a server that reports an error of its own is asked again.

Source of the fields: https://github.com/bytedance/SandboxFusion, sandbox/server/sandbox_api.py (RunCodeRequest and
RunCodeResponse: the status is Success, Failed if a process ended with a code other than 0, or SandboxError).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from megatron_hapo.config.data_settings import RewardConfig
from megatron_hapo.reward.programs import PREAMBLE, digest_of_output, program_of
from megatron_hapo.reward.request_loop import RequestLoop
from megatron_hapo.reward.service import Answer, Service, UselessAnswerError
from megatron_hapo.reward.worker import Job, Outcome

_PATH = "run_code"
_SPARE_SECONDS = 10.0
"""What a server may need besides running the program, e.g. to start a container."""
_GROWTH = 3
"""Where the first failure decides, a round has this many times the tests of the one before."""


@dataclass(frozen=True)
class _Ran:
    """How the server ran a program."""

    output: bytes | None
    """None: it failed."""


class SandboxServer:
    """The server of `reward.code.server`.

    Args:
        loop: in which it is asked.
    Raises:
        RewardError: the environment lacks the server's key.
    """

    def __init__(self, config: RewardConfig, loop: RequestLoop):
        assert config.code.server is not None, "the config has a server"
        self._config, self._loop = config, loop
        settings = config.code.server
        limit = max(settings.timeout_seconds, config.code.test_seconds + _SPARE_SECONDS)
        settings = settings.model_copy(update={"timeout_seconds": limit})
        self._service = Service("reward.code.server", settings, path=_PATH, read=_read, loop=loop)

    def start(self, jobs: Sequence[Job]) -> Future[list[Outcome]]:
        """Test the programs in these responses; the future has each one's outcome, in their order, or a RewardError."""
        return self._loop.start(self._score(jobs))

    async def _score(self, jobs: Sequence[Job]) -> list[Outcome]:
        programs = [None if "fault" in job.row else program_of(job.response) for job in jobs]
        digests: list[list[str | None]] = [[] for _ in jobs]
        failed: dict[int, Answer[_Ran]] = {}
        first, size = 0, 1
        if self._config.code.credit == "share":
            size = max([len(_inputs(job)) for job in jobs], default=0)
        while True:
            asked = [
                (number, test)
                for number, job in enumerate(jobs)
                if programs[number] is not None and number not in failed and None not in digests[number]
                for test in range(first, min(first + size, len(_inputs(job))))
            ]
            if not asked:
                break
            bodies = [self._body(str(programs[number]), jobs[number].row, test) for number, test in asked]
            for (number, test), answer in zip(asked, await self._service.ask_all(bodies), strict=True):
                if answer.value is None:
                    failed[number] = answer
                else:
                    nonce = _nonce(str(programs[number]), test)
                    digests[number].append(_digest(jobs[number].row["kind"], answer.value, nonce))
            first, size = first + size, size * _GROWTH
        return [self._outcome(job, digests[number], failed.get(number)) for number, job in enumerate(jobs)]

    def _outcome(self, job: Job, digests: Sequence[str | None], failed: Answer[_Ran] | None) -> Outcome:
        if "fault" in job.row:
            return Outcome(0.0, "crash", job.row["fault"])
        if failed is not None:
            return Outcome(0.0, failed.failure, failed.reason)
        return Outcome(0.0, digests=tuple(digests))

    def _body(self, program: str, row: Mapping[str, Any], test: int) -> dict[str, Any]:
        kind, given = row["kind"], row["inputs"][test]
        return {
            "language": "python",
            "code": source_of(program, kind, given, row["function"], row["prompt"], _nonce(program, test)),
            "stdin": given if kind == "stdin" else "",
            "run_timeout": row["test_seconds"],
            "memory_limit_MB": self._config.memory_bytes >> 20,
        }


def source_of(program: str, kind: str, test: str, function: str, prompt: str, nonce: str) -> str:
    """The program that the server runs for one test.

    Args:
        nonce: marks the line in which it prints what its function returned, or that its assertions hold.
    """
    if kind == "stdin":
        return program
    if kind == "asserts":
        source = program if f"def {function}" in program else prompt + program
        return f"{source}\n\n{test}\n\ncheck({function})\nprint({chr(10) + nonce!r})\n"
    return (
        f"{PREAMBLE}{program}\n\nimport json as _json\n_owner = globals().get('Solution')\n"
        f"_has = _owner is not None and hasattr(_owner, {function!r})\n"
        f"_call = getattr(_owner(), {function!r}) if _has else globals()[{function!r}]\n"
        f"print({chr(10) + nonce!r} + _json.dumps(_call(*_json.loads({test!r})), default=list))\n"
    )


def _inputs(job: Job) -> Sequence[str]:
    return job.row.get("inputs", ())


def _nonce(program: str, test: int) -> str:
    """The mark of a result, which the program's own output does not hold by accident."""
    return hashlib.sha256(f"{test} {program}".encode(errors="replace")).hexdigest()[:32]


def _digest(kind: Any, ran: _Ran, nonce: str) -> str | None:
    if ran.output is None:
        return None
    if kind == "stdin":
        return digest_of_output(kind, ran.output, b"")
    _, found, result = ran.output.rpartition(nonce.encode())
    if not found:
        return None
    return digest_of_output(kind, nonce.encode() if kind == "asserts" else result, nonce.encode())


def _read(answer: Any) -> _Ran:
    """How the program ran, in a server's answer.

    Raises:
        UselessAnswerError: the server reports an error of its own, or answers in another form.
    """
    try:
        status, result = answer["status"], answer.get("run_result")
        if status == "Success" and isinstance(result, Mapping):
            return _Ran((result.get("stdout") or "").encode(errors="replace"))
        if status == "Failed":
            return _Ran(None)
    except (TypeError, LookupError, AttributeError):
        pass
    raise UselessAnswerError(f"the server did not run the program: {json.dumps(answer)[:200]}")
