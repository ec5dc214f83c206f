"""SGLang's engine for requests that are token ids, and whose answers are."""

from __future__ import annotations

import asyncio
import multiprocessing
from functools import partial
from typing import Any

from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
from sglang.srt.managers.io_struct import BatchTokenizedGenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from sglang_ext.scheduler_process import run_scheduler


class RequestManager(TokenizerManager):
    """Sends the requests that are made in one turn of the event loop to the scheduler in one message.

    SGLang (0.5.23) sends each by itself. Its scheduler then begins with the first, and needs a forward pass for each
    handful that has arrived meanwhile, where one pass could have computed all.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._unsent: list[TokenizedGenerateReqInput] = []
        super().__init__(*args, **kwargs)

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        if not isinstance(obj, TokenizedGenerateReqInput):
            self._send_requests()
            super()._dispatch_to_scheduler(obj)
            return
        if not self._unsent:
            # Runs after all that the loop is about to run in this turn.
            asyncio.get_running_loop().call_soon(self._send_requests)
        self._unsent.append(obj)

    async def _async_dispatch_to_scheduler(self, obj: Any) -> None:
        self._send_requests()
        await super()._async_dispatch_to_scheduler(obj)

    def _send_requests(self) -> None:
        """Also called before any other message, so that messages keep their order."""
        requests, self._unsent = self._unsent, []
        for request in requests:
            request.wrap_pickle_fields()  # SGLang unwraps them as soon as it believes them sent
        if requests:
            super()._dispatch_to_scheduler(BatchTokenizedGenerateReqInput(batch=requests))


class TokenEngine(Engine):
    """With requests in few messages, and without SGLang's detokenizer.

    To the latter its scheduler sends nothing under `skip_tokenizer_init` (0.5.23). As a process of its own it would
    import all of SGLang, a third of an engine's start, and hold its memory.
    """

    init_tokenizer_manager_func = staticmethod(
        partial(init_tokenizer_manager, TokenizerManagerClass=RequestManager)  # type: ignore[arg-type]  # a class
    )
    run_scheduler_process_func = staticmethod(run_scheduler)

    @classmethod
    def _launch_detokenizer_subprocesses(
        cls, *args: Any, **kwargs: Any
    ) -> tuple[list[multiprocessing.Process], list[str]]:
        """No process, and no name for SGLang's watchdog."""
        return [], []
