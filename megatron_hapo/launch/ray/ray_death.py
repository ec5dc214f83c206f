"""Ends this process, with one line, when the Ray that it has started dies.

Without its raylet a driver can neither go on nor clean up: Ray (2.60) silently exits the process at the next call that
needs the raylet. Without its GCS it can start no process and loses the raylet too, after a minute
(gcs_rpc_server_reconnect_timeout_s).
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping

import psutil

EXIT_CODE = 2
"""That of every error which is reported in one line."""
NAMES = ("raylet", "gcs_server")


@contextlib.contextmanager
def exit_with_ray(
    processes: Mapping[str, int], others: Iterable[psutil.Process] = (), *, advice: str
) -> Iterator[None]:
    """While the context is open, the death of one of these processes ends this one.

    Trainer ranks and engines end by themselves with this process or with the raylet.

    Args:
        processes: Ray's core, children of this process; name to process id.
        others: processes of Ray to kill, with what is left of its core.
        advice: what the user can do then; the end of the line.
    """
    killed = [*map(psutil.Process, processes.values()), *others]
    watched = {os.pidfd_open(pid): name for name, pid in processes.items()}
    closed, closing = os.pipe()

    def watch() -> None:
        poll = select.poll()
        for descriptor in (closed, *watched):
            poll.register(descriptor, select.POLLIN | select.POLLHUP)
        dead = [descriptor for descriptor, _ in poll.poll()]
        if closed not in dead:
            print(f"Ray's {watched[dead[0]]} died; {advice}", file=sys.stderr)
            for process in killed:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_CODE)

    thread = threading.Thread(target=watch, name="ray death", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(closing)
        thread.join()
        for descriptor in (closed, *watched):
            os.close(descriptor)
