"""A run folder has one owner at a time, and a killed owner leaves nothing that keeps the next one out."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hapo.config import dump_config
from megatron_hapo.errors import HapoError
from megatron_hapo.launch import run_lock
from megatron_hapo.launch.run_lock import LOCK_FILE, owned_run_folder
from tests.test_loop import make_config

OWNER = """
import sys, time
from pathlib import Path
from megatron_hapo.launch.run_lock import owned_run_folder

with owned_run_folder(Path(sys.argv[1])):
    print("owned", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def owner_of(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", OWNER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "WATCH_SECONDS", 1.0)


def test_train_refuses_a_folder_that_another_run_owns_and_writes_nothing(tiny_qwen3: Path, tmp_path: Path) -> None:
    config = make_config(tiny_qwen3, tmp_path, {"tp": 1})
    dump_config(config, tmp_path / "config.yaml")
    with owner_of(config.run_dir) as owner:
        command = [sys.executable, "-m", "megatron_hapo", "train", str(tmp_path / "config.yaml")]
        second = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert second.returncode == 2
    line = second.stderr.strip().splitlines()[-1]
    assert line.startswith(f"{config.run_dir}: in use by process {owner.pid} on {os.uname().nodename} since 20")
    assert "Traceback" not in second.stderr
    assert [path.name for path in config.run_dir.iterdir()] == [LOCK_FILE]


def test_a_killed_owner_leaves_the_folder_free(tmp_path: Path) -> None:
    with owner_of(tmp_path / "run") as owner:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    start = time.monotonic()
    with owned_run_folder(tmp_path / "run"):
        assert time.monotonic() - start < 5


def test_the_folder_is_private_and_the_lock_is_empty_after_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs/run"
    with owned_run_folder(folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert (folder / LOCK_FILE).read_bytes() == b""
    folder.chmod(0o755)
    with owned_run_folder(folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755, "the user's choice"


@pytest.mark.usefixtures("hurried")
def test_without_flock_the_lease_keeps_a_second_owner_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    second = owned_run_folder(tmp_path)
    with owned_run_folder(tmp_path), pytest.raises(HapoError, match=f"in use by process {os.getpid()} on "):
        second.__enter__()


@pytest.mark.usefixtures("hurried")
def test_a_lease_of_another_host_is_taken_over_only_when_it_is_not_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = run_lock._Lease()
    lease.owner |= {"host": "elsewhere", "kernel": "another", "pid": 7}
    (tmp_path / LOCK_FILE).write_text(json.dumps(lease.owner))
    file, ended = os.open(tmp_path / LOCK_FILE, os.O_RDWR), threading.Event()

    def renew() -> None:
        while not ended.wait(0.1):
            lease.write(file)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(HapoError, match="in use by process 7 on elsewhere since"), owned_run_folder(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()
    with owned_run_folder(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    os.close(file)


PAUSING_OWNER = """
import ctypes, sys
from pathlib import Path
from megatron_hapo.launch import run_lock

run_lock.RENEW_SECONDS = float(sys.argv[2])
with run_lock.owned_run_folder(Path(sys.argv[1])):
    print("owned", flush=True)
    ctypes.PyDLL(None).usleep(int(1e6 * float(sys.argv[3])))  # unlike CDLL, keeps Python's lock
    sys.stdin.readline()
"""


def test_an_owner_that_stands_still_for_as_long_as_a_healthy_one_does_keeps_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen from another host, which no flock reaches; the times are those of a run, divided by 20."""
    renew, watch, pause = (
        seconds / 20 for seconds in (run_lock.RENEW_SECONDS, run_lock.WATCH_SECONDS, run_lock.LONGEST_PAUSE_SECONDS)
    )
    monkeypatch.setattr(run_lock, "WATCH_SECONDS", watch)
    monkeypatch.setattr(run_lock, "_kernel", lambda: "another")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    command = [sys.executable, "-c", PAUSING_OWNER, str(tmp_path), str(renew), str(pause)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "owned\n"
        with pytest.raises(HapoError, match=f"in use by process {owner.pid} on "), owned_run_folder(tmp_path):
            pass
        owner.communicate("\n")
        assert owner.returncode == 0


def keep_writing(lock_file: Path, text: str) -> None:
    """A renewal that has read the file before may write over the first; after a real expiry it no longer renews."""
    for _ in range(30):
        if lock_file.read_text() != text:
            lock_file.write_text(text)
        time.sleep(0.5)


@pytest.mark.usefixtures("hurried")
def test_an_owner_whose_lease_was_taken_over_ends(tmp_path: Path) -> None:
    other = {"host": "elsewhere", "kernel": "another", "pid": 7, "since": "now", "token": "x"}
    with owned_run_folder(tmp_path), pytest.raises(KeyboardInterrupt):
        keep_writing(tmp_path / LOCK_FILE, json.dumps(other))
    assert json.loads((tmp_path / LOCK_FILE).read_text()) == other
