"""A program that attempts, inside the sandbox, what the sandbox must prevent, and prints the result of each attempt.

Its argument: JSON with the layers of isolation to disable, the user to become, and the facts that the attempts need.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hapo.reward import kernel_calls, sandbox

ATTEMPTS: dict[str, Callable[[dict[str, Any]], object]] = {}
"""Attempts by name. Each returns if it succeeds, and raises if it is prevented."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def attempt(function: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    ATTEMPTS[function.__name__] = function
    return function


def system_call(number: int, *arguments: int) -> int:
    result = _libc.syscall(number, *map(ctypes.c_long, arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# --- network


@attempt
def connect_tcp(facts):
    socket.create_connection(("127.0.0.1", facts["port"]), timeout=1)


@attempt
def connect_unix(facts):
    socket.socket(socket.AF_UNIX).connect(facts["unix"])


@attempt
def connect_abstract(facts):
    socket.socket(socket.AF_UNIX).connect("\0" + facts["abstract"])


@attempt
def send_udp(facts):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", facts["port"]))


# --- files


@attempt
def write_file(facts):
    Path(facts["canary"]).write_text("x")


@attempt
def write_temporary(facts):
    for folder in ("/tmp", "/dev/shm", "/var/tmp", os.getcwd(), "/", str(Path(__file__).parent)):
        try:
            with tempfile.NamedTemporaryFile(dir=folder):
                return
        except OSError:
            pass
    raise OSError("no folder is writable")


@attempt
def overwrite_module(facts):
    open(sandbox.__file__, "a").close()


@attempt
def change_mode(facts):
    os.chmod(facts["victim"], 0o777)


@attempt
def link_file(facts):
    os.link(facts["victim"], facts["canary"] + "-link")


@attempt
def delete_file(facts):
    os.unlink(facts["victim"])


@attempt
def read_secret_file(facts):
    assert "secret" in Path(facts["secret"]).read_text()


@attempt
def list_home(facts):
    os.listdir(Path(facts["secret"]).parent)


@attempt
def see_secret_file(facts):
    os.stat(facts["secret"])


@attempt
def read_users(facts):
    Path("/etc/passwd").read_text()


@attempt
def read_driver_memory(facts):
    os.open(f"/proc/{facts['driver']}/mem", os.O_RDONLY)


@attempt
def read_driver_environment(facts):
    assert "WANDB_API_KEY" in Path(f"/proc/{facts['driver']}/environ").read_text()


@attempt
def read_parent_memory(facts):
    os.open(f"/proc/{os.getppid()}/mem", os.O_RDONLY)


@attempt
def find_secret_in_environment(facts):
    assert "WANDB_API_KEY" in os.environ


@attempt
def find_secret_in_proc(facts):
    assert "WANDB_API_KEY" in Path("/proc/self/environ").read_text()


# --- processes


@attempt
def kill_driver(facts):
    os.kill(facts["driver"], 0)


@attempt
def trace_driver(facts):
    system_call(101, 0x4206, facts["driver"], 0, 0)  # PTRACE_SEIZE, which does not stop it


@attempt
def trace_parent(facts):
    system_call(101, 0x4206, os.getppid(), 0, 0)


@attempt
def limit_driver(facts):
    resource.prlimit(facts["driver"], resource.RLIMIT_NOFILE)


@attempt
def fork(facts):
    if os.fork() == 0:
        os._exit(0)


@attempt
def fork_by_clone3(facts):
    arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)
    if system_call(435, ctypes.addressof(arguments), 88) == 0:
        os._exit(0)


@attempt
def start_thread(facts):
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


@attempt
def run_program(facts):
    subprocess.run(["/bin/true"], check=True)


@attempt
def execute(facts):
    os.execv(sys.executable, [sys.executable, "-c", "import os; os.write(3, b'done')"])


# --- privileges


@attempt
def become_root(facts):
    os.setgroups([0])
    os.setuid(0)


@attempt
def hold_capabilities(facts):
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    system_call(125, ctypes.addressof(header), ctypes.addressof(data))
    assert any(data)


@attempt
def new_user_namespace(facts):
    os.unshare(os.CLONE_NEWUSER)


@attempt
def mount(facts):
    kernel_calls._mount("none", "/", kind="tmpfs", flags=0)


@attempt
def raise_limits(facts):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


@attempt
def escape_root(facts):
    os.chroot("/")


# --- other ways out


@attempt
def io_uring(facts):
    parameters = (ctypes.c_uint8 * 120)()
    system_call(425, 1, ctypes.addressof(parameters))


@attempt
def memory_file(facts):
    os.memfd_create("x")


@attempt
def shared_memory(facts):
    system_call(30, facts["shared_memory"], 0, 0)  # shmat


@attempt
def other_descriptors(facts):
    opened = []
    for descriptor in (0, 1, 2, *range(4, 4096)):
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        opened.append(descriptor)
    assert opened != [0, 1, 2], "only /dev/null is open"


@attempt
def signal_by_fcntl(facts):
    import fcntl

    fcntl.fcntl(3, fcntl.F_SETOWN, facts["driver"])


def main() -> None:
    facts = json.loads(sys.argv[1])
    paths = (*sandbox.python_paths(), Path(__file__))
    if facts["user"] is not None:
        os.setgroups([])
        os.setgid(facts["user"])
        os.setuid(facts["user"])
        kernel_calls._prctl(kernel_calls._PR_SET_DUMPABLE, 1)  # as after an exec; otherwise root still owns /proc/self
    found = sandbox.probe
    sandbox.probe = lambda policy: _without(found(policy), facts["off"])
    lifeline, _kept = os.pipe()
    scratch = Path(facts["scratch"]) if facts["scratch"] else None
    policy = sandbox.Policy(readable=paths, memory_bytes=1 << 30, scratch=scratch, scratch_bytes=1 << 20)
    confined = sandbox.enter_sandbox(policy, lifeline=lifeline)
    results = {}
    for name, function in ATTEMPTS.items():
        results[name] = _run(confined, function, facts)
    alive = confined.run(lambda: b"alive", timeout_seconds=10.0).output
    print(json.dumps({"isolation": vars(confined.isolation), "results": results, "alive": alive.decode()}))


def _run(confined: sandbox.Sandbox, function: Callable[[dict[str, Any]], object], facts: dict[str, Any]) -> str:
    def call() -> bytes:
        try:
            function(facts)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"[:500].encode()
        return b"done"

    ending = confined.run(call, timeout_seconds=10.0)
    return ending.output.decode() or f"exit code {ending.exit_code}, late: {ending.late}"


def _without(isolation: sandbox.Isolation, layers: list[str]) -> sandbox.Isolation:
    return sandbox.Isolation(**{**vars(isolation), **dict.fromkeys(layers, "disabled for the test")})


if __name__ == "__main__":
    main()
