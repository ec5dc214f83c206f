"""During a run no other user can open its files or connect to its sockets; afterwards nothing of it is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.launch.torchrun_process import launched, metrics_of, train_command, write_config
from tests.test_loop import make_config

START_SECONDS = 900
_NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]

PROBE = """
import json, os, socket, sys

folders, sockets = json.load(sys.stdin)
reached = []
for folder in folders:
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                open(os.path.join(parent, name), "rb").close()
                reached.append(os.path.join(parent, name))
            except OSError:
                pass
for address in sockets:
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        try:
            socket.socket(socket.AF_UNIX, kind).connect(address.replace("@", chr(0), 1))
            reached.append(address)
        except OSError as error:
            assert error.errno != 91 or address.startswith("@"), "of the wrong kind, so it could be reached"
print(json.dumps(reached))
"""


def python_of_nobody() -> str | None:
    """A Python that a user without any rights can run."""
    if os.geteuid() != 0 or any(shutil.which(name) is None for name in ("setpriv", "unshare", "nsenter")):
        return None
    for python in (sys.executable, "/usr/bin/python3"):
        if subprocess.run([*_NOBODY, python, "-c", ""], capture_output=True, check=False).returncode == 0:
            return python
    return None


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can list, with a path short enough for Ray's sockets."""
    path = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def own_shared_memory() -> Iterator[int]:
    """A process with a /dev/shm of its own, in which no other program of this machine leaves anything."""
    script = "mount -t tmpfs -o mode=1777 tmpfs /dev/shm && echo ready && cat"
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    if holder.stdout.readline() != "ready\n":
        pytest.skip("mount namespaces are not allowed here")
    yield holder.pid
    holder.stdin.close()
    holder.wait()


def sockets_of(processes: Sequence[psutil.Process]) -> list[str]:
    """The addresses of the Unix sockets on which these processes listen."""
    inodes = set()
    for process in processes:
        for file in Path(f"/proc/{process.pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(file))
            except OSError:
                continue
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return sorted({row[7] for row in rows if len(row) > 7 and f"socket:[{row[6]}]" in inodes})


@pytest.mark.slow
@pytest.mark.skipif(python_of_nobody() is None, reason="needs root, and setpriv, unshare and nsenter of util-linux")
def test_a_run_is_private_and_what_a_killed_one_left_is_removed_by_the_next(
    tiny_qwen3: Path, folder: Path, own_shared_memory: int
) -> None:
    temporary = folder / "t"
    temporary.mkdir(mode=0o755)
    config = make_config(tiny_qwen3, folder, {"tp": 1}).model_copy(update={"steps": 200})
    inside = ["nsenter", "--target", str(own_shared_memory), "--mount"]
    environment = {"TMPDIR": str(temporary), "RAY_TMPDIR": None}
    command = [*inside, sys.executable, *train_command(write_config(config, folder))]
    shared_memory = Path(f"/proc/{own_shared_memory}/root/dev/shm")

    with launched(command, folder / "killed.log", environment=environment) as run:
        run.until(lambda: len(metrics_of(config)) > 1, "first step", START_SECONDS)
        run.note()
        sockets = sockets_of([psutil.Process(run.process.pid), *run.seen])
        assert any("plasma_store" in address for address in sockets)
        assert len([address for address in sockets if address.startswith(str(temporary))]) > 5, "SGLang's too"
        python = python_of_nobody()
        assert python is not None
        probe = subprocess.run(
            [*inside, *_NOBODY, python, "-c", PROBE],
            input=json.dumps([[str(temporary), str(config.run_dir), "/dev/shm"], sockets]),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(probe.stdout) == []
    # `launched` has killed every process of the run.
    assert [path.name[:14] for path in temporary.iterdir()] == ["megatron-hapo-"]

    config = config.model_copy(update={"steps": 1})
    command = [*inside, sys.executable, *train_command(write_config(config, folder))]
    with launched(command, folder / "ended.log", environment=environment) as run:
        assert run.wait(START_SECONDS) == 0, run.text[-6000:]
        run.until_gone(60)
        assert "which a run that did not end normally has left" in run.text
    assert list(temporary.iterdir()) == []
    assert sorted(path.name for path in shared_memory.iterdir()) == []
