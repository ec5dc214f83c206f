"""One owner of a run folder at a time.

The owner holds a flock on the file `lock` in the run folder, which the kernel releases when the owner ends, however it
ends. flock does not reach other hosts on every network file system (Lustre's localflock, NFS's local_lock, most FUSE),
so the file also holds a lease: who owns the folder, renewed every RENEW_SECONDS. Another host takes a lease over only
after it has seen it unchanged for WATCH_SECONDS; no clocks are compared. An owner that is not killed empties the file.
"""

from __future__ import annotations

import _thread
import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_hapo.errors import HapoError

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
LONGEST_PAUSE_SECONDS = 60.0
"""How long the Python threads of a healthy process may all stand still: while a call, such as one that page-locks
hundreds of gigabytes, holds the interpreter's lock."""
RENEW_SECONDS = 10.0
WATCH_SECONDS = 30.0 + LONGEST_PAUSE_SECONDS
_LEASE_BYTES = 1024
"""A lease always has this size: renewing it needs no new space on a full disk."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def owned_run_folder(folder: Path) -> Iterator[None]:
    """This process is the owner of a run folder while the context is open; creates the folder, with mode 0700.

    Raises:
        HapoError: another process owns it; names that process.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)  # of an existing folder the mode is the user's choice
    file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lease = _take(folder, file)
        try:
            with _renewed(folder, file, lease):
                yield
        finally:
            if _read(file) == lease.owner:
                os.ftruncate(file, 0)
    finally:
        os.close(file)  # releases the flock


class _Lease:
    """The owner's entry in the lock file."""

    def __init__(self) -> None:
        self.owner = {
            "host": socket.gethostname(),
            "kernel": _kernel(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            "token": secrets.token_hex(8),
        }

    def write(self, file: int) -> None:
        """Write the lease, as new, and let other hosts see it."""
        text = json.dumps({**self.owner, "renewed": time.time()})
        os.pwrite(file, text.encode().ljust(_LEASE_BYTES), 0)
        os.fsync(file)


def _take(folder: Path, file: int) -> _Lease:
    """The lease of this process, in the lock file; the flock is held where the file system has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except BlockingIOError:
        raise _in_use(folder, _read(file)) from None
    except OSError:  # the file system has no flock
        locked = False
    previous = _read(file)
    if previous is not None and not (locked and previous.get("kernel") == _kernel()):
        _watch(folder, previous)
    lease = _Lease()
    lease.write(file)
    if not locked:  # two processes may have come here at once: the last to write has it
        time.sleep(1.0)
        if _read_again(folder) != lease.owner:
            raise _in_use(folder, _read_again(folder))
    return lease


def _watch(folder: Path, previous: dict[str, Any]) -> None:
    """Raises HapoError if the lease of a process on another host changes, which means that the process is alive."""
    logger.warning(
        "%s was last used by %s, and was not released; waiting %g s to see whether that process is alive",
        folder, _named(previous), WATCH_SECONDS,
    )  # fmt: skip
    deadline = time.monotonic() + WATCH_SECONDS
    before = _contents(folder)
    while time.monotonic() < deadline:
        time.sleep(min(1.0, WATCH_SECONDS / 10))
        if (now := _contents(folder)) != before:
            if not now.strip():  # released
                return
            raise _in_use(folder, _read_again(folder))


@contextlib.contextmanager
def _renewed(folder: Path, file: int, lease: _Lease) -> Iterator[None]:
    """A thread renews the lease while the context is open; it interrupts the run if another host has taken it over."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            try:
                owner = _read_again(folder)
                if owner is not None and owner != lease.owner:
                    logger.error("%s has been taken over by %s, so this run ends", folder, _named(owner))
                    _thread.interrupt_main()  # would end the run after this step, with a checkpoint
                    if not ended.wait(1.0):
                        _thread.interrupt_main()  # ends it at once
                    return
                lease.write(file)
            except OSError as error:
                logger.warning("cannot renew the lease in %s: %s", folder / LOCK_FILE, error)

    thread = threading.Thread(target=renew, name="run folder", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _in_use(folder: Path, owner: dict[str, Any] | None) -> HapoError:
    return HapoError(
        f"{folder}: in use by {_named(owner)}; a run folder has one owner at a time: wait for that run, stop it, or "
        "choose another name or output_dir"
    )


def _named(owner: dict[str, Any] | None) -> str:
    """Who owns a folder, in words."""
    if owner is None:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"


def _read(file: int) -> dict[str, Any] | None:
    """The owner in an open lock file; None if there is none, or it is being written."""
    return _owner_in(os.pread(file, _LEASE_BYTES, 0))


def _read_again(folder: Path) -> dict[str, Any] | None:
    """The owner in the lock file as it is now, on a network file system too: they check for changes when opening."""
    return _owner_in(_contents(folder))


def _contents(folder: Path) -> bytes:
    try:
        return (folder / LOCK_FILE).read_bytes()
    except FileNotFoundError:
        return b""


def _owner_in(data: bytes) -> dict[str, Any] | None:
    try:
        owner = json.loads(data)
    except ValueError:
        return None
    if not isinstance(owner, dict):
        return None
    owner.pop("renewed", None)
    return owner


def _kernel() -> str:
    """What distinguishes this host, until it is started again, from others of the same name."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else socket.gethostname()
