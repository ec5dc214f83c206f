"""Files mapped into memory, so that tensors are private views of them and pages are read only when accessed."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

_MAP_NORESERVE = 0x4000
"""A Linux flag that Python's mmap lacks. Without it the kernel would reserve memory for the whole file, in case all of
it were written to, and would fail on a file larger than the machine's memory."""


class MappedFile:
    """A file's bytes, mapped as long as a tensor of them exists. Writing to such a tensor does not change the file.

    Raises:
        OSError: the file cannot be opened or mapped.
    """

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self._bytes = mmap.mmap(
                file.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )

    def tensor(self, start: int, dtype: torch.dtype, count: int) -> Tensor:
        """A [count] tensor of this dtype that begins at byte `start`, which need not be aligned."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=start)
