"""Is the run of torchrun's ranks still whole? Every rank gives a sign of life and looks for those of the others.

All of it goes through the rendezvous store. A rank that fails leaves its error there, which rank 0 raises in the
driver; a rank that gives no more signs is named. The others leave when rank 0 is gone, when somebody has failed, or
when the agent that started them has ended: torchrun's agents do not always tell each other.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from torch.distributed.distributed_c10d import Store

from megatron_hapo import errors
from megatron_hapo.errors import ConfigError, HapoError, TrainingError

logger = logging.getLogger(__name__)

WISH_TO_STOP = signal.SIGUSR2
"""What another rank's wish to stop is in rank 0's process: a SIGTERM of its own would mean more the second time."""
SIGN_SECONDS = 1.0
SILENT_SECONDS = 30.0
"""Without a sign for so long a rank counts as lost."""
_STUCK_SECONDS = 45
"""A rank whose store does not answer for so long ends itself: its network is gone."""
_POLL_SECONDS = 0.1
_REPORT_SECONDS = 5.0
"""A rank that loses its connection to another waits so long for that one's own account."""


class Watch:
    """One rank's part, from its construction until `close`."""

    @staticmethod
    def prepare(store: Store, names: Sequence[str]) -> None:
        """Rank 0, before any rank looks: a store waits for a key that is missing.

        Args:
            names: what to call each rank.
        """
        for rank, name in enumerate(names):
            store.set(f"sign/{rank}", "0")
            store.set(f"name/{rank}", name)
        store.add("failures", 0)
        store.add("stops", 0)

    def __init__(self, store: Store, *, rank: int, world_size: int):
        self._store, self._rank, self._world_size = store.clone(), rank, world_size
        self._parent = os.getppid()
        self._closed = threading.Event()
        self._failed = threading.Event()
        self._error: BaseException | None = None
        self.told_by_another = False
        """Whether the error is another rank's, which rank 0 tells the user."""
        self._interrupts = False
        self._stop_asked = False
        self._thread = threading.Thread(target=self._look_on, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This rank ends because the run does: nobody is to be alarmed."""
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):
            self._store.add("closed", 1)

    def wait_for_others(self, timeout_seconds: float) -> None:
        """Rank 0, whose process may hold the store, ends last."""
        deadline = time.monotonic() + timeout_seconds
        store = self._store.clone()
        while store.add("closed", 0) < self._world_size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def report(self, error: BaseException) -> None:
        """Leave this rank's error for rank 0, as the cause of the run's end."""
        own = isinstance(error, HapoError)
        account = {
            "rank": self._rank,
            "kind": type(error).__name__,
            "text": str(error) if own else "".join(traceback.format_exception(error)).rstrip(),
            "own": own,
        }
        store = self._store.clone()  # the other one may be waiting
        with contextlib.suppress(RuntimeError):  # the store went with its host, and that is told by all others
            number = store.add("reports", 1)
            store.set(f"report/{number}", json.dumps(account))
            store.add("failures", 1)

    def fail(self, error: BaseException) -> None:
        """This rank's own thread has failed: tell the others, and wake the main thread.

        An error that is not one of our own may only echo what happened elsewhere, so that one's account is waited for.
        """
        if not isinstance(error, HapoError):
            self._failed.wait(_REPORT_SECONDS)
        if not self._failed.is_set():
            self.report(error)
            self._fail(error)

    def ask_to_stop(self) -> None:
        """Ask rank 0 to end the run after the step under way."""
        with contextlib.suppress(RuntimeError):
            self._store.clone().add("stops", 1)

    @property
    def failed(self) -> threading.Event:
        """Set when the run cannot go on."""
        return self._failed

    @property
    def error(self) -> BaseException | None:
        return self._error

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within it a failure elsewhere is raised, whatever the main thread waits for. Another rank's wish to stop is a
        KeyboardInterrupt, unless somebody within it handles WISH_TO_STOP."""

        raised: list[BaseException] = []

        def on_failure(number: int, frame: FrameType | None) -> None:
            if self._interrupts and self._error is not None:
                self._interrupts = False
                raised.append(self._error)
                raise self._error

        handlers = {signal.SIGUSR1: on_failure, WISH_TO_STOP: signal.default_int_handler}
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        self._interrupts = True
        try:
            if self._error is not None:
                raise self._error
            yield
        except BaseException:
            if raised:  # Ray and others wrap what comes out of a signal handler
                raise raised[0] from None
            raise
        finally:
            self._interrupts = False
            for number, handler in previous.items():
                signal.signal(number, handler)

    # ----- the thread

    def _look_on(self) -> None:
        signs = _Signs(range(self._world_size) if self._rank == 0 else (0,))
        count = 0
        while not self._closed.wait(SIGN_SECONDS):
            if self._rank != 0:
                # A store on a host that is cut off does not even refuse: nothing short of this would return.
                faulthandler.dump_traceback_later(_STUCK_SECONDS, exit=True)
            count += 1
            try:
                error = self._look(signs, count)
            except RuntimeError as gone:
                error = TrainingError(f"the rendezvous store does not answer: its torchrun agent has ended? ({gone})")
            if self._closed.is_set():
                break
            if error is not None:
                self._fail(error)
                break
        faulthandler.cancel_dump_traceback_later()

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._failed.set()
        if self._interrupts:
            os.kill(os.getpid(), signal.SIGUSR1)

    def _look(self, signs: _Signs, count: int) -> HapoError | None:
        if os.getppid() != self._parent:
            error = TrainingError(f"the torchrun agent of {self._store.get(f'name/{self._rank}').decode()} has ended")
            self.report(error)
            return error
        self._store.set(f"sign/{self._rank}", str(count))
        failures, stops, *counts = self._store.multi_get(["failures", "stops", *(f"sign/{r}" for r in signs.ranks)])
        if int(failures):
            self.told_by_another = True
            return self._first_report()
        if self._rank == 0 and int(stops) and not self._stop_asked and self._interrupts:
            self._stop_asked = True
            os.kill(os.getpid(), WISH_TO_STOP)
        silent = signs.silent(counts)
        if not silent:
            return None
        names = [self._store.get(f"name/{rank}").decode() for rank in silent]
        return TrainingError(
            f"no sign of life for {SILENT_SECONDS:g} s from {', '.join(names)}: killed (out of memory?), or cut off"
        )

    def _first_report(self) -> HapoError:
        account = json.loads(self._store.get("report/1"))
        who = self._store.get(f"name/{account['rank']}").decode()
        if account["own"]:
            kind = getattr(errors, account["kind"], TrainingError)
            return kind(account["text"].splitlines() if kind is ConfigError else account["text"])
        return TrainingError(f"{who} failed:\n{account['text']}")


class _Signs:
    """Since when ranks have been silent, by this process's clock."""

    def __init__(self, ranks: range | tuple[int, ...]):
        self.ranks = ranks
        self._last: dict[int, tuple[bytes, float]] = {}

    def silent(self, counts: list[bytes]) -> list[int]:
        now = time.monotonic()
        for rank, count in zip(self.ranks, counts, strict=True):
            if rank not in self._last or self._last[rank][0] != count:
                self._last[rank] = (count, now)
        return [rank for rank, (_, since) in self._last.items() if now - since > SILENT_SECONDS]


def leave(code: int) -> NoReturn:
    """End this process at once: threads that hang in a collective would keep it for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
