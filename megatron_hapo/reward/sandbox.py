"""Runs untrusted code in processes that can do nothing but compute: one fork per call, from a clean state.

    outer process: waits, and kills the inner one when its own parent ends
      └ inner process (process 1 of its own namespaces): trusted code, imports made once; calls `Sandbox.run`
          └ one child per call, confined, killed after its answer or its deadline

Three independent layers confine a child, where the kernel offers them: namespaces (no network, no other processes, a
file system of only the readable paths), Landlock (nothing else can be opened) and seccomp (no process, no program, no
socket, no write). None needs root. Resource limits, an empty set of capabilities and closed descriptors add to them.
bubblewrap and nsjail confine programs in similar ways, but would start a program for each call.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import platform
import resource
import select
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_hapo.reward import kernel_calls
from megatron_hapo.reward.syscall_filter import filter_program

EXIT_OUT_OF_MEMORY = 77
EXIT_NOT_CONFINED = 78

_ANSWER = 3
"""The descriptor on which a child answers; its only others are of /dev/null."""
_OPEN_FILES = 64
_SYSTEM_PATHS = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/etc/alternatives"),
    *("/usr/share/zoneinfo", "/etc/localtime", "/dev/null", "/dev/urandom"),
)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a child may use."""

    readable: tuple[Path, ...]
    """Files and folders; see `python_paths`."""
    memory_bytes: int
    """Address space of the inner process and of each child."""
    scratch: Path | None = None
    """A writable folder. Its files stay from one call to the next."""
    scratch_bytes: int = 0
    """Largest file in it."""


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """The layers that the kernel offers to this process: for each, why it is missing, or an empty string."""

    namespaces: str
    landlock: str
    seccomp: str

    @property
    def any(self) -> bool:
        """Whether at least one layer is available."""
        return not (self.namespaces and self.landlock and self.seccomp)

    @property
    def confines_programs(self) -> bool:
        """Whether a program can neither read files outside the policy nor reach the network."""
        return not self.namespaces or not (self.landlock or self.seccomp)

    @property
    def limits_reading(self) -> bool:
        """Whether files outside the policy are unreadable; seccomp cannot see paths."""
        return not (self.namespaces and self.landlock)

    def __str__(self) -> str:
        layers = {"namespaces": self.namespaces, "Landlock": self.landlock, "seccomp": self.seccomp}
        parts = [f"no {name} ({fault})" if fault else name for name, fault in layers.items()]
        return ", ".join(parts) + ("" if self.limits_reading else "; files can be read, but not written")


@dataclass(frozen=True)
class Ending:
    """How a call ended."""

    output: bytes
    """The child's output, at most `max_bytes`. Must be validated: a hostile child can write anything."""
    exit_code: int
    """Negative: the signal that ended the child."""
    late: bool
    """Whether it was killed at its deadline."""


class SandboxError(RuntimeError):
    """A sandbox could not be set up, although the probe found that its layers work."""


def enter_sandbox(policy: Policy, *, lifeline: int) -> Sandbox:
    """Split this process in two and return a sandbox in the inner one.

    The outer process never returns: it ends with the inner one's exit code, and kills it when the other end of
    `lifeline` closes or its parent process ends. A parent-death signal would not be enough: it is sent when the
    thread that started the process ends, and a pool's threads come and go.

    Args:
        lifeline: descriptor of a socket or pipe; the inner process may use it.
    Raises:
        SandboxError: this process has threads, or a layer fails that the probe found to work.
    """
    if num_threads() > 1:
        raise SandboxError("a sandbox needs a process without other threads, because a fork would copy their locks")
    isolation = probe(policy)
    if not isolation.namespaces:
        _enter_namespaces()
    inner = os.fork()
    if inner:
        _guard(inner, lifeline)
    return Sandbox(policy, isolation)


def probe(policy: Policy) -> Isolation:
    """The layers that work here, each tried in a child process."""

    def namespaces() -> None:
        _enter_namespaces()
        os.unshare(os.CLONE_NEWNS)
        kernel_calls.enter_root(readable=policy.readable, writable=_writable(policy))

    def landlock() -> None:
        if kernel_calls.landlock_abi() == 0:
            raise OSError(errno.ENOSYS, "not in this kernel, or not enabled at boot")
        kernel_calls.forbid_new_privileges()
        kernel_calls.landlock_restrict(kernel_calls.landlock_ruleset(readable=policy.readable, writable=()))

    def seccomp() -> None:
        if platform.machine() != "x86_64":
            raise OSError(errno.ENOSYS, f"not supported on {platform.machine()}")
        kernel_calls.forbid_new_privileges()
        kernel_calls.install_seccomp(filter_program(writes=False))

    return Isolation(namespaces=_fault(namespaces), landlock=_fault(landlock), seccomp=_fault(seccomp))


class Sandbox:
    """Runs functions in confined children. Belongs to the inner process, which must stay single-threaded."""

    def __init__(self, policy: Policy, isolation: Isolation):
        """Only for `enter_sandbox`: it changes the calling process."""
        self.isolation = isolation
        self._policy = policy
        self._owns_processes = not isolation.namespaces and os.getpid() == 1
        """Whether this process owns every other process in its namespace, so that one kill(-1) ends them all."""
        for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, policy.memory_bytes)):
            _lower_limit(limit, value)
        kernel_calls.forbid_new_privileges()
        kernel_calls.drop_capability_bounds()
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        writable = _writable(policy)
        self._root = self._ruleset = self._filter = None
        if not isolation.namespaces:
            self._root = _root_namespace(policy)
        else:
            kernel_calls.drop_capabilities()
        if not isolation.landlock:
            self._ruleset = kernel_calls.landlock_ruleset(readable=policy.readable, writable=writable)
        if not isolation.seccomp:
            self._filter = filter_program(writes=policy.scratch is not None)
        kernel_calls.forbid_inspection()
        kernel_calls.kill_with_parent(signal.SIGKILL)  # last: a change of capabilities resets it
        trial = self.run(lambda: b"confined", timeout_seconds=60.0)
        if trial.output != b"confined":
            raise SandboxError(f"a confined process failed to start: {trial.output.decode(errors='replace')}")

    def run(
        self, function: Callable[[], bytes], *, timeout_seconds: float, max_bytes: int = 4096, stdin: bytes = b""
    ) -> Ending:
        """Call the function in a confined child; returns how the call ended. Nothing that it did or started remains.

        Args:
            timeout_seconds: wall-clock limit, at which the child is killed.
            max_bytes: of output; a child that writes more is killed.
            stdin: what the child reads on descriptor 0.
        """
        ours, theirs = os.pipe()
        given = _file_of(stdin) if stdin else None
        child = os.fork()
        if child == 0:
            self._be_child(function, theirs, timeout_seconds, given)
        for descriptor in (theirs, given):
            if descriptor is not None:
                os.close(descriptor)
        try:
            output, late = _read_all(ours, time.monotonic() + timeout_seconds, max_bytes)
        finally:
            exit_code = self._end(child)  # before the pipe closes, which a writing child would see as EPIPE
            os.close(ours)
        return Ending(output, exit_code, late)

    def _be_child(
        self, function: Callable[[], bytes], answer: int, timeout_seconds: float, stdin: int | None
    ) -> NoReturn:
        code = EXIT_NOT_CONFINED
        try:
            try:
                self._confine(answer, timeout_seconds, stdin)
            except Exception as error:
                os.write(answer, repr(error).encode())
                os._exit(code)
            code = 1
            view = memoryview(function())
            while view:
                view = view[os.write(_ANSWER, view) :]
            code = 0
        except MemoryError:
            code = EXIT_OUT_OF_MEMORY
        finally:
            os._exit(code)  # also after SystemExit: the frames above this one belong to the inner process

    def _confine(self, answer: int, timeout_seconds: float, stdin: int | None) -> None:
        """Confine this child to computing. The order matters: a step may need a right that a later step removes."""
        os.setsid()
        if self._root is not None:
            os.setns(self._root, os.CLONE_NEWNS)
        os.chdir(self._policy.scratch or "/")
        if self._ruleset is not None:
            kernel_calls.landlock_restrict(self._ruleset)
        for descriptor in range(3):
            os.dup2(self._null if stdin is None or descriptor else stdin, descriptor)
        os.dup2(answer, _ANSWER)
        os.closerange(_ANSWER + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        _lower_limit(resource.RLIMIT_CPU, math.ceil(timeout_seconds) + 1)
        _lower_limit(resource.RLIMIT_FSIZE, self._policy.scratch_bytes if self._policy.scratch else 0)
        _lower_limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
        _lower_limit(resource.RLIMIT_NPROC, 0)
        if self._root is not None:
            kernel_calls.drop_capabilities()
        kernel_calls.forbid_inspection()
        kernel_calls.kill_with_parent(signal.SIGKILL)
        sys.dont_write_bytecode = True
        if self._filter is not None:
            kernel_calls.install_seccomp(self._filter)

    def _end(self, child: int) -> int:
        """Kill the child and everything that it started; returns the child's exit code."""
        if self._owns_processes:
            os.kill(-1, signal.SIGKILL)
        else:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ChildProcessError):
            while self._owns_processes:  # orphans of a child become children of process 1
                os.waitpid(-1, 0)
        return os.waitstatus_to_exitcode(status)


def python_paths() -> tuple[Path, ...]:
    """The paths that this interpreter needs for imports: whole library folders, but only the modules of other folders.

    Another folder on sys.path may be a checkout or a home folder that also holds runs and keys.
    """
    prefixes = {Path(prefix) for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    whole = {prefix / name for prefix in prefixes for name in ("lib", "lib64")}
    whole |= {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    whole |= {Path(path) for path in _SYSTEM_PATHS}
    modules = set()
    for entry in {Path(entry).absolute() for entry in sys.path if entry}:
        if entry.is_file() or entry.name in ("site-packages", "dist-packages"):
            whole.add(entry)
        elif entry.is_dir() and not any(folder == entry or folder in entry.parents for folder in whole):
            modules |= set(_modules(entry))
    return tuple(sorted(path for path in whole | modules if os.path.exists(path)))


def num_threads() -> int:
    """Number of threads of this process, including those of libraries; 1 if /proc cannot be read."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def _modules(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.suffix in (".py", ".pyc", ".so") or (path / "__init__.py").is_file():
            yield path


def _writable(policy: Policy) -> tuple[Path, ...]:
    return () if policy.scratch is None else (policy.scratch,)


def _enter_namespaces() -> None:
    """Move into new namespaces, in which only this user exists; the next fork becomes their process 1."""
    user, group = os.geteuid(), os.getegid()
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with contextlib.suppress(OSError):  # no nested namespace, in which a child would regain capabilities
        Path("/proc/sys/user/max_user_namespaces").write_text("0")


def _root_namespace(policy: Policy) -> int:
    """A descriptor of a mount namespace that contains only the policy's paths; a helper process builds it."""
    ours, theirs = socket.socketpair()
    helper = os.fork()
    if helper == 0:
        try:
            os.unshare(os.CLONE_NEWNS)
            namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
            kernel_calls.enter_root(readable=policy.readable, writable=_writable(policy))
            socket.send_fds(theirs, [b"."], [namespace])
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(helper, 0)
    if not descriptors:
        raise SandboxError("the mount namespace could not be built")
    return descriptors[0]


def _guard(inner: int, lifeline: int) -> NoReturn:
    """Wait for the inner process and exit with its status; kill it when the lifeline closes or the parent ends."""

    def follow(*_: object) -> None:
        done, status = os.waitpid(inner, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.kill(os.getpid(), -code)
            os._exit(abs(code))

    parent = os.getppid()
    signal.signal(signal.SIGCHLD, follow)
    follow()
    poller = select.poll()
    poller.register(lifeline, 0)  # POLLHUP is always reported
    while not poller.poll(1000) and os.getppid() == parent:
        pass
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.kill(inner, signal.SIGKILL)
    os.waitpid(inner, 0)
    os._exit(0)


def _file_of(content: bytes) -> int:
    """A descriptor of a file in memory with this content, at its start."""
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _read_all(descriptor: int, deadline: float, max_bytes: int) -> tuple[bytes, bool]:
    """The bytes read until the other end closes, and whether the deadline came first."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    output = b""
    while len(output) <= max_bytes:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not poller.poll(math.ceil(remaining * 1000)):
            return output[:max_bytes], True
        received = os.read(descriptor, max_bytes + 1 - len(output))
        if not received:
            break
        output += received
    return output[:max_bytes], False


def _fault(attempt: Callable[[], None]) -> str:
    """Why the attempt fails in a child process, or an empty string."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            attempt()
        except OSError as error:
            os.write(theirs, (error.strerror or repr(error)).encode())
        except BaseException as error:
            os.write(theirs, repr(error).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    fault, late = _read_all(ours, time.monotonic() + 30.0, 400)
    os.close(ours)
    if late:
        os.kill(child, signal.SIGKILL)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return fault.decode(errors="replace") or ("" if exit_code == 0 else f"exit code {exit_code}")


def _lower_limit(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))
