"""Packs named tensors into buckets of bounded size, with the checksums that the engines should find. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_hapo.model.families import Shape
from megatron_hapo.resharding.checksum import engine_slices, tensor_checksum
from megatron_hapo.types import WeightBucket

ALIGNMENT = 16
"""Each tensor starts at a multiple of this many bytes of its bucket."""


@dataclass(frozen=True)
class EngineCut:
    """How an engine slices tensors over its `tp` ranks. The fields are the arguments of `checksum.engine_slices`."""

    tp: int
    num_heads: int
    num_kv_heads: int
    ep: int = 1
    num_experts: int = 0

    def slices(self, name: str, tensor: Tensor) -> list[Tensor]:
        """What each engine rank holds of the tensor with this Hugging Face name: `tp` views."""
        return engine_slices(name, tensor, **vars(self))

    def checksums(self, name: str, tensor: Tensor) -> list[int]:
        """The checksum of each engine rank's slice."""
        return [tensor_checksum(part) for part in self.slices(name, tensor)]


def engine_cut(shape: Shape, *, tp: int, ep: int) -> EngineCut:
    """How engines with this tensor- and expert-parallel size slice the model."""
    num_experts = 0 if shape.moe is None else shape.moe.num_experts
    return EngineCut(tp, shape.num_heads, shape.num_kv_heads, ep, num_experts)


class BucketBuilder:
    """Collects tensors until a bucket is full. A tensor larger than a bucket gets a bucket of its own.

    Args:
        max_bytes: size limit of a bucket.
        checksums: how the engines slice the tensors, to add checksums of the slices; None to add none.
    """

    def __init__(self, *, max_bytes: int, checksums: EngineCut | None):
        self._max_bytes, self._cut = max_bytes, checksums
        self._pending: list[tuple[str, Tensor]] = []
        self._num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> Iterator[WeightBucket]:
        """Adds a tensor; first yields the pending bucket if the tensor does not fit into it."""
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if self._pending and self._num_bytes + size > self._max_bytes:
            yield from self.rest()
        self._pending.append((name, tensor))
        self._num_bytes += size

    def rest(self) -> Iterator[WeightBucket]:
        """Yields the pending bucket, if there is one."""
        if not self._pending:
            return
        data = np.zeros(self._num_bytes, dtype=np.uint8)
        target, start = torch.from_numpy(data), 0
        for _, tensor in self._pending:
            target[start : start + tensor.nbytes].copy_(tensor.contiguous().view(-1).view(torch.uint8))
            start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        yield WeightBucket(
            names=tuple(name for name, _ in self._pending),
            shapes=tuple(tuple(tensor.shape) for _, tensor in self._pending),
            dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in self._pending),
            data=data,
            checksums=self._cut and {name: self._cut.checksums(name, tensor) for name, tensor in self._pending},
        )
        self._pending, self._num_bytes = [], 0
