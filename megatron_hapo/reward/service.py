"""Asks a server about many responses at once, within limits: used by scorers that a reward worker cannot run.

Reward workers have no network, so requests are made by the driver's process, in an event loop of its own thread. A
response that the server cannot deal with is that response's failure. A server that answers nothing is no response's
fault: it is repeated until the server counts as down, which ends the run or holds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from megatron_hapo.config.service_settings import ServiceConfig
from megatron_hapo.errors import RewardError, one_line
from megatron_hapo.observe import running_stages
from megatron_hapo.reward.request_loop import RequestLoop
from megatron_hapo.types import ScoringFailure

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 8 << 20
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
LONGEST_RETRY_AFTER_SECONDS = 60.0
REPORT_SECONDS = 60.0
"""Time between log lines about a slow server, or one that is down."""

_TRANSIENT = frozenset({408, 409, 425, 429, *range(500, 600)})
"""Statuses after which the same request may succeed."""
_MISCONFIGURED = frozenset({*range(300, 400), 401, 402, 403, 404, 405, 407, 501})
"""Statuses that every request would get."""
_SHOWN_CHARACTERS = 200


class UselessAnswerError(ValueError):
    """The server answered, but not what it was asked; another request may succeed."""


@dataclass(frozen=True)
class Answer[R]:
    """How the requests about one response ended."""

    value: R | None
    """What `read` made of the answer; None if there is no useful one."""
    requests: int
    """That were sent."""
    seconds: float
    """From sending the first request to the end of the last one."""
    failure: ScoringFailure | None = None
    reason: str = ""
    """Of the failure."""


@dataclass(frozen=True)
class _Failed:
    """A request without a useful answer."""

    reason: str
    kind: ScoringFailure = "crash"
    answered: bool = False
    """Whether the server dealt with it."""
    is_final: bool = False
    """Whether the same request would fail again."""
    retry_after: float | None = None


class Service[R]:
    """One server. All coroutines belong to one event loop.

    Args:
        loop: closes the connections when it ends.
        key: dotted key of its settings, for messages.
        path: of the requests, below the URL.
        read: the value in a decoded JSON answer; raises UselessAnswerError.
    Raises:
        RewardError: the environment lacks the server's key.
    """

    def __init__(self, key: str, config: ServiceConfig, *, path: str, read: Callable[[Any], R], loop: RequestLoop):
        self.key, self.config = key, config
        self._read = read
        self._url = f"{config.url}/{path}"
        self._secret = _secret(key, config)
        self._client: httpx.AsyncClient | None = None
        self._random = random.Random()  # not the global one, whose state belongs to the run's seed
        self._last_answer = 0.0
        self._held_seconds = 0.0
        self._last_report = 0.0
        loop.at_end(self.close)

    async def ask_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[Answer[R]]:
        """The answer to each request, in their order.

        Raises:
            RewardError: the server refuses all requests, is down, too slow, or fails on too many responses.
        """
        started = self._last_report = self._last_answer = time.monotonic()
        self._held_seconds = 0.0
        slots = asyncio.Semaphore(self.config.concurrency)
        asked = [asyncio.ensure_future(self._ask(body, slots)) for body in bodies]
        try:
            pending = set(asked)
            while pending:
                done, pending = await asyncio.wait(pending, timeout=1.0, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                running_stages.advance(len(done))  # of the caller's stage, whose context the loop has taken over
                self._check_deadline(started, done=len(asked) - len(pending), of=len(asked))
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        answers = [task.result() for task in asked]
        self._check_failures(answers)
        return answers

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _ask(self, body: Mapping[str, Any], slots: asyncio.Semaphore) -> Answer[R]:
        first = None
        requests = 0
        while True:
            async with slots:
                now = time.monotonic()
                first = now if first is None else first
                requests += 1
                result = await self._request(body)
            seconds = time.monotonic() - first
            if not isinstance(result, _Failed):
                self._note_answer()
                return Answer(result, requests, seconds)
            if result.answered:
                self._note_answer()
            # While the server answers nothing, it is not this response that is at fault.
            others_are_answered = self._last_answer > first
            if result.is_final or (requests >= self.config.tries and others_are_answered):
                return Answer(None, requests, seconds, result.kind, result.reason)
            self._check_down(result.reason)
            await asyncio.sleep(self._pause(requests, result.retry_after))

    async def _request(self, body: Mapping[str, Any]) -> R | _Failed:
        limit = self.config.timeout_seconds
        try:
            async with asyncio.timeout(limit):
                status, headers, content = await self._post(body)
        except (TimeoutError, httpx.TimeoutException):
            return _Failed(f"no answer within {limit:g} s", "timeout")
        except httpx.HTTPError as error:
            return _Failed(self._shown(f"{type(error).__name__}: {error}"))
        if status in _MISCONFIGURED:
            raise RewardError(
                f"{self.key}: {self._url} refuses every request with status {status} ({self._shown(content)}); correct "
                f"{self.key}.url, model or api_key_env"
            )
        if status in _TRANSIENT:
            return _Failed(self._status(status, content), retry_after=_retry_after(headers))
        if status != 200:
            return _Failed(self._status(status, content), answered=True, is_final=True)
        try:
            return self._read(json.loads(content))
        except UselessAnswerError as error:
            return _Failed(self._shown(error), answered=True)
        except (ValueError, RecursionError):
            return _Failed(f"the answer is not JSON: {self._shown(content)}", answered=True)

    async def _post(self, body: Mapping[str, Any]) -> tuple[int, httpx.Headers, str]:
        if self._client is None:
            headers = {"Content-Type": "application/json"}
            if self._secret is not None:
                headers["Authorization"] = f"Bearer {self._secret}"
            limits = httpx.Limits(max_connections=self.config.concurrency)
            self._client = httpx.AsyncClient(headers=headers, timeout=None, limits=limits)
        content = b""
        async with self._client.stream("POST", self._url, content=json.dumps(body)) as response:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > MAX_ANSWER_BYTES:
                    break
        return response.status_code, response.headers, content.decode(errors="replace")

    def _pause(self, requests: int, retry_after: float | None) -> float:
        """Seconds before the next request about the same response: doubled each time, and never the same for all."""
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(requests - 1, 16), LONGEST_PAUSE_SECONDS)
        return max(pause * self._random.uniform(0.5, 1.0), retry_after or 0.0)

    def _note_answer(self) -> None:
        now = time.monotonic()
        silent = now - self._last_answer
        if silent > self.config.down_after_seconds:
            self._held_seconds += silent
            logger.warning("%s: %s answers again, after %.0f s", self.key, self._url, silent)
        self._last_answer = now

    def _check_down(self, reason: str) -> None:
        """Raise RewardError, or log, if the server has answered nothing for too long."""
        now = time.monotonic()
        silent = now - self._last_answer
        if silent <= self.config.down_after_seconds:
            return
        message = f"{self.key}: {self._url} has answered no request for {silent:.0f} s ({reason})"
        if self.config.when_down == "end":
            advice = f"the same command continues from the newest checkpoint; {self.key}.when_down=hold would wait"
            raise RewardError(f"{message}; {advice}")
        if now - self._last_report >= REPORT_SECONDS or self._last_report <= self._last_answer:
            self._last_report = now
            logger.warning("%s; the run waits for it (when_down=hold)", message)

    def _check_deadline(self, started: float, *, done: int, of: int) -> None:
        now = time.monotonic()
        silent = now - self._last_answer
        held = self._held_seconds + (silent if silent > self.config.down_after_seconds else 0.0)
        if done < of and now - started - held > self.config.deadline_seconds:
            raise RewardError(
                f"{self.key}: {self._url} has answered for {done} of {of} responses within deadline_seconds="
                f"{self.config.deadline_seconds:g}; raise it, or concurrency={self.config.concurrency}"
            )
        if now - self._last_report >= REPORT_SECONDS and not held:
            self._last_report = now
            logger.info("%s: %d of %d responses", self.key, done, of)

    def _check_failures(self, answers: Sequence[Answer[R]]) -> None:
        failed = [answer for answer in answers if answer.failure is not None]
        if len(failed) >= 4 and len(failed) > self.config.max_failed_share * len(answers):
            raise RewardError(
                f"{self.key}: {len(failed)} of {len(answers)} responses could not be scored, a larger share than "
                f"max_failed_share={self.config.max_failed_share:g}; the first time: {failed[0].reason}"
            )

    def _status(self, status: int, content: str) -> str:
        return f"status {status}: {self._shown(content)}"

    def _shown(self, text: object) -> str:
        """The text for a message: one line, cut, and without the key, which a server may repeat."""
        line = one_line(text)
        line = line if self._secret is None else line.replace(self._secret, "[key]")
        return line[:_SHOWN_CHARACTERS]


def _secret(key: str, config: ServiceConfig) -> str | None:
    if config.api_key_env is None:
        return None
    secret = os.environ.get(config.api_key_env, "").strip()
    if not secret:
        raise RewardError(f"{key}.api_key_env: the environment variable {config.api_key_env} is not set")
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise RewardError(f"{key}.api_key_env: the value of {config.api_key_env} cannot be sent as a key")
    return secret


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that the server asks to wait, as far as it states them as a number."""
    with contextlib.suppress(ValueError):
        seconds = float(headers.get("retry-after", ""))
        if seconds > 0:
            return min(seconds, LONGEST_RETRY_AFTER_SECONDS)
    return None
