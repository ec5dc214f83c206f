"""Which processes can hand each other memory: those of one host, and of one container if there are several."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_hapo.private_folder import SHARED_MEMORY

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_host() -> str:
    """Equal in two processes that share a kernel, its Unix sockets and its shared memory."""
    shared = SHARED_MEMORY.stat().st_dev if SHARED_MEMORY.is_dir() else "none"
    return f"{_BOOT.read_text().strip()} {os.stat('/proc/self/ns/net').st_ino} {shared}"
