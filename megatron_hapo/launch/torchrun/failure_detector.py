"""Failure detector for torchrun's ranks: every rank sends a heartbeat, and checks those of the others.

Everything goes through the rendezvous store. A rank that fails leaves its error there, and rank 0 raises it in the
driver; a rank whose heartbeat stops is named. The other ranks exit when rank 0 is gone, when any rank has failed, or
when the torchrun agent that started them has ended: torchrun's agents do not always tell each other.
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
from megatron_hapo.launch.run_lock import LONGEST_PAUSE_SECONDS

logger = logging.getLogger(__name__)

STOP_SIGNAL = signal.SIGUSR2
"""Delivers another rank's stop request to rank 0's process. Not SIGTERM, whose second arrival stops at once."""
HEARTBEAT_SECONDS = 1.0
HEARTBEAT_TIMEOUT_SECONDS = 30.0 + LONGEST_PAUSE_SECONDS
"""A rank without a heartbeat for this long counts as lost."""
STORE_TIMEOUT_SECONDS = 45.0 + LONGEST_PAUSE_SECONDS
"""A rank whose store does not answer for this long exits: its network is gone. The timer runs on while the rank's
Python stands still."""
_POLL_SECONDS = 0.1
_REPORT_SECONDS = 5.0
"""How long a rank with an error of a library waits for the report of the rank that failed first."""


class FailureDetector:
    """One rank's part, active from its construction until `close`. It runs in a thread of its own."""

    @staticmethod
    def prepare(store: Store, names: Sequence[str]) -> None:
        """Create the keys, on rank 0, before any rank reads them: reading a missing key blocks.

        Args:
            names: what error messages call each rank.
        """
        for rank, name in enumerate(names):
            store.set(f"heartbeat/{rank}", "0")
            store.set(f"name/{rank}", name)
        store.add("failures", 0)
        store.add("stop_requests", 0)

    def __init__(self, store: Store, *, rank: int, world_size: int):
        self._store, self._rank, self._world_size = store.clone(), rank, world_size
        self._parent = os.getppid()
        self._closed = threading.Event()
        self._failed = threading.Event()
        self._error: BaseException | None = None
        self.reported_by_another = False
        """Whether the error came from another rank, so that rank 0 shows it to the user."""
        self._raises_in_main_thread = False
        self._stop_delivered = False
        self._thread = threading.Thread(target=self._run, name="failure detector", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the heartbeat because the run ends as it should; no other rank is alarmed."""
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):
            self._store.add("closed", 1)

    def wait_for_others(self, timeout_seconds: float) -> None:
        """Return when all other ranks have closed. Rank 0, whose process may host the store, exits last."""
        deadline = time.monotonic() + timeout_seconds
        store = self._store.clone()
        while store.add("closed", 0) < self._world_size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def report(self, error: BaseException) -> None:
        """Leave this rank's error in the store for rank 0, as the cause of the failure."""
        own = isinstance(error, HapoError)
        report = {
            "rank": self._rank,
            "kind": type(error).__name__,
            "text": str(error) if own else "".join(traceback.format_exception(error)).rstrip(),
            "own": own,
        }
        store = self._store.clone()  # the detector's own connection may be blocked in a wait
        with contextlib.suppress(RuntimeError):  # the store died with its host, which every other rank reports
            number = store.add("reports", 1)
            store.set(f"report/{number}", json.dumps(report))
            store.add("failures", 1)

    def fail(self, error: BaseException) -> None:
        """Report the error of this rank's own thread, and wake the main thread.

        An error from a library may only be a consequence of a failure elsewhere, such as a closed connection, so the
        report of the rank that failed first is waited for.
        """
        if not isinstance(error, HapoError):
            self._failed.wait(_REPORT_SECONDS)
        if not self._failed.is_set():
            self.report(error)
            self._fail(error)

    def request_stop(self) -> None:
        """Ask rank 0 to end the run after the current step."""
        with contextlib.suppress(RuntimeError):
            self._store.clone().add("stop_requests", 1)

    @property
    def failed(self) -> threading.Event:
        """Set when the run cannot go on."""
        return self._failed

    @property
    def error(self) -> BaseException | None:
        """The first failure that this rank knows of, its own or another rank's."""
        return self._error

    @contextlib.contextmanager
    def raising_failures(self) -> Iterator[None]:
        """Within the block, raise a failure of any rank in the main thread, whatever that waits for.

        A stop request of another rank raises KeyboardInterrupt, unless the code within handles STOP_SIGNAL.
        """

        raised: list[BaseException] = []

        def on_failure(_number: int, _frame: FrameType | None) -> None:
            if self._raises_in_main_thread and self._error is not None:
                self._raises_in_main_thread = False
                raised.append(self._error)
                raise self._error

        handlers = {signal.SIGUSR1: on_failure, STOP_SIGNAL: signal.default_int_handler}
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        self._raises_in_main_thread = True
        try:
            if self._error is not None:
                raise self._error
            yield
        except BaseException:
            if raised:  # Ray and others wrap an exception that a signal handler raises
                raise raised[0] from None
            raise
        finally:
            self._raises_in_main_thread = False
            for number, handler in previous.items():
                signal.signal(number, handler)

    # ----- the thread

    def _run(self) -> None:
        heartbeats = _Heartbeats(range(self._world_size) if self._rank == 0 else (0,))
        count = 0
        while not self._closed.wait(HEARTBEAT_SECONDS):
            if self._rank != 0:
                # A store on a host that is cut off does not even refuse connections: only this timer ends the wait.
                faulthandler.dump_traceback_later(STORE_TIMEOUT_SECONDS, exit=True)
            count += 1
            try:
                error = self._beat(heartbeats, count)
            except RuntimeError as gone:
                error = TrainingError(f"the rendezvous store does not answer; has its torchrun agent ended? ({gone})")
            if self._closed.is_set():
                break
            if error is not None:
                self._fail(error)
                break
        faulthandler.cancel_dump_traceback_later()

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._failed.set()
        if self._raises_in_main_thread:
            os.kill(os.getpid(), signal.SIGUSR1)

    def _beat(self, heartbeats: _Heartbeats, count: int) -> HapoError | None:
        """Send one heartbeat and check on the other ranks; returns the failure, if there is one."""
        if os.getppid() != self._parent:
            error = TrainingError(f"the torchrun agent of {self._store.get(f'name/{self._rank}').decode()} has ended")
            self.report(error)
            return error
        self._store.set(f"heartbeat/{self._rank}", str(count))
        keys = [f"heartbeat/{rank}" for rank in heartbeats.ranks]
        failures, stop_requests, *counts = self._store.multi_get(["failures", "stop_requests", *keys])
        if int(failures):
            self.reported_by_another = True
            return self._first_report()
        if self._rank == 0 and int(stop_requests) and not self._stop_delivered and self._raises_in_main_thread:
            self._stop_delivered = True
            os.kill(os.getpid(), STOP_SIGNAL)
        silent = heartbeats.silent(counts)
        if not silent:
            return None
        names = [self._store.get(f"name/{rank}").decode() for rank in silent]
        return TrainingError(
            f"no heartbeat for {HEARTBEAT_TIMEOUT_SECONDS:g} s from {', '.join(names)}: killed (out of memory?), or "
            "cut off from the network"
        )

    def _first_report(self) -> HapoError:
        report = json.loads(self._store.get("report/1"))
        name = self._store.get(f"name/{report['rank']}").decode()
        if report["own"]:
            kind = getattr(errors, report["kind"], TrainingError)
            return kind(report["text"].splitlines() if kind is ConfigError else report["text"])
        return TrainingError(f"{name} failed:\n{report['text']}")


class _Heartbeats:
    """When each rank's heartbeat last changed, by this process's clock."""

    def __init__(self, ranks: range | tuple[int, ...]):
        self.ranks = ranks
        self._last: dict[int, tuple[bytes, float]] = {}

    def silent(self, counts: list[bytes]) -> list[int]:
        """The ranks whose count has not changed for HEARTBEAT_TIMEOUT_SECONDS."""
        now = time.monotonic()
        for rank, count in zip(self.ranks, counts, strict=True):
            if rank not in self._last or self._last[rank][0] != count:
                self._last[rank] = (count, now)
        return [rank for rank, (_, since) in self._last.items() if now - since > HEARTBEAT_TIMEOUT_SECONDS]


def exit_now(code: int) -> NoReturn:
    """Exit at once, without joining threads: one that hangs in a collective would keep the process for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
