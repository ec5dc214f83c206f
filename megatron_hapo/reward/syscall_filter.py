"""A seccomp program that allows the system calls which computing needs, and no others; pure."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable

_AUDIT_ARCH_X86_64 = 0xC000003E
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _IF_EQUAL, _IF_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06

_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in `struct seccomp_data`."""

# fmt: off
COMPUTING = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38,
    "getpid": 39, "exit": 60, "uname": 63, "getdents": 78, "getcwd": 79, "readlink": 89, "gettimeofday": 96,
    "getrlimit": 97, "getrusage": 98, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
    "getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204,
    "getdents64": 217, "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "pselect6": 270,
    "ppoll": 271, "dup3": 292, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334, "close_range": 436,
    "faccessat2": 439,
}
"""What Python needs to compute, to read files and to import modules; x86-64 numbers. Excluded: processes,
threads, programs, sockets, signals to others, ptrace, mounts, io_uring, shared memory, changes to files."""

WRITING = {
    "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83,
    "rmdir": 84, "unlink": 87, "mkdirat": 258, "unlinkat": 263, "renameat": 264, "renameat2": 316,
}
"""What a scratch folder needs in addition."""
# fmt: on

_OPEN, _IOCTL, _FCNTL, _OPENAT, _PRLIMIT64 = 2, 16, 72, 257, 302
_WRITE_FLAGS = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)
_IOCTLS = (0x5401, 0x5450, 0x5451)  # TCGETS (isatty), FIONCLEX, FIOCLEX
_FCNTLS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD to F_SETFL, F_DUPFD_CLOEXEC; not F_SETOWN, which sends signals


def filter_program(*, writes: bool) -> bytes:
    """The program for `kernel_calls.install_seccomp`: what is not allowed fails with EPERM.

    Args:
        writes: whether files may be written, created and removed; seccomp cannot see which files.
    """
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_IF_EQUAL, _AUDIT_ARCH_X86_64, if_true=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
    ]
    for number in (COMPUTING | WRITING if writes else COMPUTING).values():
        program += [_instruction(_IF_EQUAL, number, if_false=1), _instruction(_RETURN, _ALLOW)]
    for number, flags_argument in ((_OPEN, 1), (_OPENAT, 2)):
        program += _call(number, _unless_bits(flags_argument, 0 if writes else _WRITE_FLAGS))
    program += _call(_IOCTL, _one_of(1, _IOCTLS))
    program += _call(_FCNTL, _one_of(1, _FCNTLS))
    program += _call(_PRLIMIT64, _one_of(0, (0,)))  # 0: this process; no other may be given
    return b"".join([*program, _instruction(_RETURN, _ERRNO | errno.EPERM)])


def _call(number: int, body: list[bytes]) -> list[bytes]:
    """The instructions for one system call; the body always returns."""
    return [_instruction(_IF_EQUAL, number, if_false=len(body)), *body]


def _unless_bits(argument: int, bits: int) -> list[bytes]:
    return [
        _instruction(_LOAD, _ARGUMENTS + 8 * argument),
        _instruction(_IF_BITS, bits, if_true=1),
        _instruction(_RETURN, _ALLOW),
        _instruction(_RETURN, _ERRNO | errno.EACCES),
    ]


def _one_of(argument: int, values: Iterable[int]) -> list[bytes]:
    """The low half of the argument is compared: the kernel reads these arguments as 32-bit integers."""
    body = [_instruction(_LOAD, _ARGUMENTS + 8 * argument)]
    for value in values:
        body += [_instruction(_IF_EQUAL, value, if_false=1), _instruction(_RETURN, _ALLOW)]
    return [*body, _instruction(_RETURN, _ERRNO | errno.EPERM)]


def _instruction(code: int, operand: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, operand)
