"""The memory that a trainer rank releases while engines use its GPU: gradient buffers and the optimizer's state.

The state is copied to host memory. All tensors stay the same objects and only their storage is freed and restored, so
that Megatron's references to them, and views of them, stay valid. Megatron 0.19.2's own
`MegatronOptimizer.offload_to_cpu` moves float32 parameters to new memory, too, which disconnects a distributed
optimizer from the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_hapo.checkpoint.resumable import chained_optimizers
from megatron_hapo.trainer.host_arena import HostArena


class ReleasableMemory:
    """Releases and restores a rank's memory. The code is the same on a CPU, where state moves within host memory.

    Args:
        chunks: of the model, wrapped in Megatron's DistributedDataParallel.
        optimizer: Megatron's.
        device: the rank's. Tensors on other devices stay where they are.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: Any, device: torch.device):
        self._chunks, self._optimizer, self._device = chunks, optimizer, device
        self._arena = HostArena()
        self._offloaded: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._released: set[str] = set()

    @property
    def released(self) -> frozenset[str]:
        """The parts that are released now: any of `gradients` and `optimizer`."""
        return frozenset(self._released)

    def release(self, parts: Sequence[str]) -> None:
        """Release `gradients`, whose values are lost, or `optimizer`; releasing a part twice has no effect."""
        for part in parts:
            if part in self._released:
                continue
            if part == "gradients":
                for chunk in self._chunks:
                    chunk.offload_grad_buffers(empty_cache=False)
            else:
                self._move_to_host()
            self._released.add(part)
        torch.cuda.empty_cache()

    def restore(self, parts: Sequence[str]) -> None:
        """Undo `release`; gradients become zero. Restoring a part that is not released has no effect."""
        for part in parts:
            if part not in self._released:
                continue
            if part == "gradients":
                for chunk in self._chunks:
                    chunk.restore_grad_buffers()
            else:
                self._move_back()
            self._released.remove(part)

    def optimizer_storages(self) -> Iterator[torch.UntypedStorage]:
        """Storages on the device that only the optimizer uses; its parameters may be the model's, or views of them."""
        model = {parameter.untyped_storage()._cdata for chunk in self._chunks for parameter in chunk.parameters()}
        for tensor in optimizer_tensors(self._optimizer):
            storage = tensor.untyped_storage()
            if tensor.device.type == self._device.type and storage._cdata not in model:
                yield storage

    def _move_to_host(self) -> None:
        storages = list({s._cdata: s for s in self.optimizer_storages() if s.nbytes()}.values())
        parts = self._arena.parts([storage.nbytes() for storage in storages])
        for storage, host in zip(storages, parts, strict=True):
            host.copy_(_bytes_of(storage), non_blocking=True)
        torch.cuda.synchronize()
        for storage, host in zip(storages, parts, strict=True):
            storage.resize_(0)
            self._offloaded.append((storage, host))

    def _move_back(self) -> None:
        for storage, host in self._offloaded:
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        self._offloaded = []


def optimizer_tensors(optimizer: Any) -> Iterable[Tensor]:
    """The optimizer's parameters (master weights, where the model's are not float32) and their state."""
    for part in chained_optimizers(optimizer):
        inner = part.optimizer
        if inner is None:  # this rank has no parameters of this kind
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
