"""Linux calls that Python's os module lacks: prctl, capabilities, mounts, Landlock and seccomp, through ctypes."""

from __future__ import annotations

import ctypes
import os
import platform
import stat
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

_SYS_PIVOT_ROOT = 41 if platform.machine() == "aarch64" else 155
_SYS_LANDLOCK_CREATE_RULESET, _SYS_LANDLOCK_ADD_RULE, _SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_KEPT_MOUNT_FLAGS = {os.ST_NOEXEC: 8, os.ST_NOATIME: 1024, os.ST_NODIRATIME: 2048, os.ST_RELATIME: 1 << 21}
"""Mount flags by statvfs flag. In a user namespace a remount must keep those that the mount already has."""

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_EXECUTE, _IOCTL_DEV = 1 << 0, 1 << 15
_FILE_RIGHTS = 1 << 1 | _READ_FILE | 1 << 14  # write, read, truncate: what Landlock accepts for a path to a file

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.syscall.restype = ctypes.c_long


def kill_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when the thread that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def forbid_inspection() -> None:
    """Close this process's memory and /proc entries to others of its user: no core dump, no ptrace."""
    _prctl(_PR_SET_DUMPABLE, 0)


def forbid_new_privileges() -> None:
    """Keep programs that this process or its children execute from gaining privileges; Landlock and seccomp need it."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capability_bounds() -> None:
    """Empty the bounding set, if this process may, so that no later exec regains a capability."""
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # EINVAL: beyond the last capability; EPERM: an ordinary user, who has none to lose
            return


def drop_capabilities() -> None:
    """Give up every capability."""
    header = struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, bytes(24)))


def install_seccomp(program: bytes) -> None:
    """Apply a BPF program (`struct sock_filter` after `struct sock_filter`) to every later system call."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))


def landlock_abi() -> int:
    """The kernel's Landlock version; 0 if Landlock is missing or disabled."""
    return max(0, _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def landlock_ruleset(*, readable: Iterable[Path], writable: Iterable[Path]) -> int:
    """A descriptor of rules for `landlock_restrict`: only these paths can be opened; no TCP, no signals to outsiders.

    Paths that do not exist are left out. Executing a program is not allowed anywhere.
    """
    abi = landlock_abi()
    handled = (1 << 13) - 1
    for since, right in ((2, 1 << 13), (3, 1 << 14), (5, _IOCTL_DEV)):
        handled |= right if abi >= since else 0
    attributes = struct.pack("QQQ", handled, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _checked(_libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0))
    rules = [(path, _READ_FILE | _READ_DIR) for path in readable]
    rules += [(path, handled & ~(_EXECUTE | _IOCTL_DEV)) for path in writable]
    for path, rights in rules:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                rights &= _FILE_RIGHTS
            rule = struct.pack("=Qi", rights, descriptor)
            _checked(_libc.syscall(_SYS_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0))
        finally:
            os.close(descriptor)
    return ruleset


def landlock_restrict(ruleset: int) -> None:
    """Apply the rules to this process and its children."""
    _checked(_libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0))


def enter_root(*, readable: Sequence[Path], writable: Sequence[Path]) -> None:
    """Replace this mount namespace's file system by an empty one with only these paths, under their own names.

    The namespace must be new and belong to this process's user namespace. Paths that do not exist are left out.
    """
    _mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    # Built over /proc, a folder that always exists and that must not be visible anyway.
    root = Path("/proc")
    _mount("tmpfs", root, kind="tmpfs", flags=_MS_NOSUID | _MS_NODEV, options="size=1m,mode=755")
    for path in sorted({*readable, *writable}):
        if not os.path.exists(path) or any(above in path.parents for above in (*readable, *writable)):
            continue
        target = root / path.relative_to("/")
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        _mount(path, target, flags=_MS_BIND | _MS_REC)
        shown = os.statvfs(target).f_flag
        flags = _MS_BIND | _MS_REMOUNT | _MS_NOSUID | (0 if path in writable else _MS_RDONLY)
        flags |= _MS_NODEV if path.is_dir() or shown & os.ST_NODEV else 0
        flags |= sum(mount_flag for flag, mount_flag in _KEPT_MOUNT_FLAGS.items() if shown & flag)
        _mount("none", target, flags=flags)
    os.chdir(root)
    _checked(_libc.syscall(_SYS_PIVOT_ROOT, b".", b"."))
    _checked(_libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")
    _mount("none", "/", flags=_MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _mount(source: str | Path, target: str | Path, *, flags: int, kind: str | None = None, options: str = "") -> None:
    kind_bytes = kind.encode() if kind else None
    _checked(_libc.mount(os.fsencode(source), os.fsencode(target), kind_bytes, flags, options.encode() or None))


def _prctl(option: int, first: int = 0, second: int = 0) -> None:
    _checked(_libc.prctl(option, first, second, 0, 0))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
