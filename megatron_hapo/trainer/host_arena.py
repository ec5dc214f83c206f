"""One block of page-locked host memory for everything that a trainer rank moves there, no larger than needed.

torch's allocator for page-locked memory rounds every block up to a power of two (torch 2.14): up to twice the memory,
which cannot be swapped, on every rank of a host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_hapo.resharding.gpu_slots import register, unregister

ALIGNMENT = 512
"""Bytes; the parts of a block start at multiples of it."""


class HostArena:
    """A block that is kept, and replaced if another size is needed. Without a GPU it is ordinary memory."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the block."""
        return 0 if self._memory is None else len(self._memory)

    def parts(self, sizes: Sequence[int]) -> list[Tensor]:
        """A [size] uint8 part of the block for each of these sizes; what earlier parts held is lost."""
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        if sum(padded) != self.num_bytes:
            self._replace(sum(padded))
        if self._memory is None:
            return []
        return [part[:size] for part, size in zip(self._memory.split(padded), sizes, strict=True)]

    def _replace(self, num_bytes: int) -> None:
        if self._memory is not None and torch.cuda.is_available():
            unregister(self._memory)
        self._memory = None  # freed before the new block is allocated
        if num_bytes:
            memory = torch.empty(num_bytes, dtype=torch.uint8)
            if torch.cuda.is_available():
                register(memory)
            self._memory = memory
