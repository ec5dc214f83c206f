"""An event loop in a thread of this process, for requests that are made while the reward workers score."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any


class RequestLoop:
    """The loop and its thread, until `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()
        self._at_end: list[Callable[[], Awaitable[None]]] = []

    def start[R](self, work: Coroutine[Any, Any, R]) -> Future[R]:
        """Run a coroutine; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def at_end(self, close: Callable[[], Awaitable[None]]) -> None:
        """Call this when the loop ends, after everything that runs in it has been cancelled."""
        self._at_end.append(close)

    def close(self) -> None:
        """Cancel what runs, and end the thread."""
        self.start(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        this = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not this]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for close in self._at_end:
            await close()
