"""An engine in a process of its own, as a Ray actor would hold it, but without Ray.

The process needs `sglang_ext.cpu.environment` before its Python starts, and keeps SGLang out of the test process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_hapo.model.rank_environment import importing
from megatron_hapo.types import GroupRequest, Prompt, Rollout, Sampling
from sglang_ext import cpu
from tests.time_limits import patient

TIMEOUT_SECONDS = 400  # imports alone take half a minute of CPU time, more on a busy machine


class RemoteEngine:
    """Calls methods of the engine by name; what they raise is raised here."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._connection.send((method, args, kwargs))
            return self.receive()

        return call

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        return generate(self, prompts, sampling)

    def receive(self) -> Any:
        if not self._connection.poll(TIMEOUT_SECONDS):
            raise TimeoutError(f"no answer from the engine process within {TIMEOUT_SECONDS} s")
        error, value = self._connection.recv()
        if error is not None:
            raise error
        return value


def generate(engine: Any, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
    """`sampling.samples` rollouts of each prompt, in the prompts' order, from an Engine here or elsewhere."""
    started = {number: GroupRequest(prompt, sampling) for number, prompt in enumerate(prompts)}
    rollouts: dict[tuple[int, int], Rollout] = {}
    while len(rollouts) < len(prompts) * sampling.samples:
        rollouts |= {(number, index): rollout for number, index, rollout in engine.advance(0, started)}
        started = {}
    return [[rollouts[number, index] for index in range(sampling.samples)] for number in range(len(prompts))]


@contextmanager
def running_engine(
    model_path: Path, *, variables: dict[str, str] | None = None, **settings: Any
) -> Iterator[RemoteEngine]:
    """An engine on the CPU; `settings` are EngineConfig fields, `variables` are added to its environment."""
    settings = {
        "model_path": model_path,
        "device": "cpu",
        "dtype": "float32",
        "tp": 1,
        "max_running_requests": 32,
        "memory_fraction": 0.1,
        "kv_cache_tokens": 4096,
        "context_tokens": 512,
        "seed": 0,
    } | settings
    context = multiprocessing.get_context("spawn")  # a forked child would keep this process's environment and threads
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, settings))
    with mock.patch.dict(os.environ, cpu.environment(settings["tp"]) | (variables or {})):
        process.start()
    theirs.close()
    engine = RemoteEngine(ours)
    try:
        engine.receive()
        yield engine
    finally:
        with suppress(OSError):  # the process may have ended already; its error has been received
            ours.send(None)
        process.join(patient(60))
        if process.is_alive():
            process.kill()


def _serve(connection: Connection, settings: dict[str, Any]) -> None:
    # multiprocessing gives a spawned child its parent's sys.path, in which PYTHONPATH has no effect.
    sys.path.insert(0, str(cpu.STAND_INS))
    with importing():
        from sglang.srt.managers.io_struct import BatchTokenizedGenerateReqInput
        from sglang.srt.managers.tokenizer_manager import TokenizerManager

        from sglang_ext.engine import Engine
        from sglang_ext.engine_config import EngineConfig

    class CountingEngine(Engine):
        """Notes how many tokens of each prompt were in the prefix cache, and how many requests a message had."""

        async def _answer(self, **request: Any) -> Any:
            answer = await super()._answer(**request)
            if isinstance(answer, dict) and "cached_tokens" in answer["meta_info"]:  # an aborted one has none
                self.noted = [*getattr(self, "noted", ()), answer["meta_info"]["cached_tokens"]]
            return answer

        def cached_tokens(self) -> list[int]:
            """Of the answers since the last call, in their order."""
            noted, self.noted = self.noted, []
            return noted

        def sent_requests(self) -> list[int]:
            """Number of requests in each message to the scheduler since the last call."""
            counts, sent[:] = list(sent), []
            return counts

    sent: list[int] = []
    send = TokenizerManager._dispatch_to_scheduler

    def counting_send(manager: TokenizerManager, message: Any) -> None:
        if isinstance(message, BatchTokenizedGenerateReqInput):
            sent.append(len(message))
        send(manager, message)

    TokenizerManager._dispatch_to_scheduler = counting_send
    try:
        engine = CountingEngine(EngineConfig(**settings))
    except BaseException as error:
        connection.send((error, None))
        raise
    connection.send((None, None))
    while (request := connection.recv()) is not None:
        method, args, kwargs = request
        try:
            connection.send((None, getattr(engine, method)(*args, **kwargs)))
        except Exception as error:
            connection.send((error, None))
    engine.shutdown()
