"""Folders for what a run needs only while it runs: sockets, rendezvous files, Ray's session, scratch files.

Each is a new folder `megatron-hapo-XXXXXXXX` with mode 0700, so that no other user of the machine can open a file in it
or connect to a socket in it. Its owner holds a flock on the file `owner` in it. The kernel releases that lock when the
owner ends, however it ends: the next process that creates such a folder removes those whose lock is free. What has to
be in /dev/shm has a name that begins with the folder's, and is removed together with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "megatron-hapo-"
_OWNER_FILE = "owner"
_DEFAULT_PARENT = Path("/tmp")
_REMOVE_SECONDS = 10.0
"""Processes of the run that are still ending may write to the folder while it is being removed."""
_MAX_PATH_BYTES = 107
"""Maximum length of a Unix socket's path (sun_path, without the final zero)."""
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest of Ray's sockets (2.60), at the highest process id of Linux."""


class PrivateFolder:
    """A new private folder that this process owns until `close`, or until it ends.

    Args:
        parent: where it is created; default: the folder for temporary files, as TMPDIR says. Folders there whose owner
            has ended are removed first.
    """

    def __init__(self, parent: Path | None = None):
        parent = parent or Path(tempfile.gettempdir())
        remove_abandoned(parent)
        self._owner_file = -1
        while self._owner_file < 0:  # until no other process has taken the new folder for an abandoned one
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            self._owner_file = _own(self.path)

    @contextlib.contextmanager
    def for_temporary_files(self) -> Iterator[None]:
        """Temporary files of this process and of those that it starts are in this folder while the context is open."""
        previous = os.environ.get("TMPDIR")
        keep_compile_cache()
        os.environ["TMPDIR"] = str(self.path)
        tempfile.tempdir = None  # read TMPDIR again
        try:
            yield
        finally:
            if previous is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = previous
            tempfile.tempdir = None

    def close(self) -> None:
        """Remove the folder, and what belongs to it in /dev/shm."""
        if self._owner_file >= 0:
            _remove(self.path, patience_seconds=_REMOVE_SECONDS)
            os.close(self._owner_file)
            self._owner_file = -1


@contextlib.contextmanager
def run_time_folder() -> Iterator[Path]:
    """A private folder for everything of a run on this host, while the context is open; short enough for Ray's sockets.

    Temporary files of this process and of those that it starts are in it too.
    """
    folder = PrivateFolder(_parent_for_sockets())
    try:
        with folder.for_temporary_files():
            yield folder.path
    finally:
        folder.close()


def current_folder() -> Path | None:
    """The private folder in which this process's temporary files are; None if they are elsewhere."""
    folder = Path(tempfile.gettempdir())
    return folder if (folder / _OWNER_FILE).is_file() else None


def shared_memory_prefix() -> str:
    """Beginning of the name of anything in /dev/shm, so that it is removed together with this process's folder."""
    folder = current_folder()
    return _PREFIX if folder is None else f"{folder.name}-"


def remove_abandoned(parent: Path) -> None:
    """Remove the private folders of this user in `parent` whose owner has ended, and what belongs to them."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            file = os.open(folder / _OWNER_FILE, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # not one of ours, or just removed
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
            logger.info("removed %s, which a run that did not end normally has left", folder)
        except OSError:  # its owner is alive
            continue
        finally:
            os.close(file)


def keep_compile_cache() -> None:
    """Let torch keep compiled code in the user's cache: its default is a folder beside the temporary files.

    To be called before anything imports torch._dynamo (2.14), whose import creates that folder.
    """
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: this user has no home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-hapo" / "torchinductor"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def _parent_for_sockets() -> Path:
    """RAY_TMPDIR, or the folder for temporary files; /tmp if the paths of Ray's sockets would be too long there."""
    parent = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    longest = f"{parent}/{_PREFIX}XXXXXXXX{_RAY_SOCKET}"
    return parent if len(os.fsencode(longest)) <= _MAX_PATH_BYTES else _DEFAULT_PARENT


def _own(folder: Path) -> int:
    """Descriptor of the folder's locked owner file; -1 if another process is removing the folder."""
    try:
        file = os.open(folder / _OWNER_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return -1
    except OSError:  # a file system without flock: no process can take the folder for an abandoned one
        pass
    if os.fstat(file).st_nlink == 0:
        os.close(file)
        return -1
    os.write(file, json.dumps({"pid": os.getpid()}).encode())
    return file


def _remove(folder: Path, *, patience_seconds: float = 0.0) -> None:
    """Remove the folder with the folders of other owners in it, such as engines', and what they have in /dev/shm."""
    for owned in (folder, *folder.glob(f"{_PREFIX}*")):
        _remove_shared_memory(owned)
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            # The owner file goes last: without it nobody would find what is left.
            for entry in folder.iterdir():
                if entry.name != _OWNER_FILE:
                    _delete(entry)
            shutil.rmtree(folder)
            return
        except FileNotFoundError:
            if not folder.exists():
                return
        except OSError as error:
            if time.monotonic() > deadline:
                logger.warning("cannot remove %s: %s; the next run tries again", folder, error.strerror)
                return
        time.sleep(0.1)


def _remove_shared_memory(folder: Path) -> None:
    """Remove what begins with the folder's name, and the segments that torch names after its owner's process id."""
    if not SHARED_MEMORY.is_dir():
        return
    names = [f"{folder.name}-*"]
    with contextlib.suppress(OSError, ValueError):
        owner = int(json.loads((folder / _OWNER_FILE).read_text())["pid"])
        if owner == os.getpid() or not Path(f"/proc/{owner}").exists():
            names.append(f"torch_{owner}_*")
    for name in names:
        for entry in SHARED_MEMORY.glob(name):
            with contextlib.suppress(OSError):
                if entry.lstat().st_uid == os.geteuid():
                    _delete(entry)


def _delete(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
