"""Tensors as private views of the files that hold them: pages are read when somebody looks at them."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

_MAP_NORESERVE = 0x4000
"""Of Linux, and not in Python's mmap: without it the kernel would promise memory for the whole file, in case all of it
were written to, and refuse a file larger than the machine's memory."""


class FileView:
    """A file's bytes, mapped while a tensor of them lives. Such a tensor may be written to; the file stays as it is.

    Raises:
        OSError: it cannot be opened or mapped.
    """

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self._bytes = mmap.mmap(
                file.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )

    def tensor(self, start: int, dtype: torch.dtype, count: int) -> Tensor:
        """[count] of this dtype from byte `start` on, at whatever address that is."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=start)
