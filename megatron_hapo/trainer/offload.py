"""What a trainer rank gives back while engines use its GPU: gradient buffers, and the optimizer's state in host memory.

The tensors stay the objects that they are; only what they store goes away and comes back, so that Megatron's own
references to them, and views of them, stay true. Megatron 0.19.2 has `MegatronOptimizer.offload_to_cpu`, which gives
float32 parameters, too, a memory of their own, and so cuts a distributed optimizer off from the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class TrainerMemory:
    """Gives back and takes again; on a CPU too, where the host's memory is the device's.

    Args:
        chunks: the model's, wrapped in Megatron's DistributedDataParallel.
        optimizer: Megatron's.
        device: of the rank. What is elsewhere stays there.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: Any, device: torch.device):
        self._chunks, self._optimizer, self._device = chunks, optimizer, device
        self._on_host: dict[int, Tensor] = {}
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._parts: set[str] = set()

    @property
    def given_back(self) -> frozenset[str]:
        """Of gradients and optimizer."""
        return frozenset(self._parts)

    def release(self, parts: Sequence[str]) -> None:
        """Give back `gradients`, whose values are lost, or `optimizer`; a part that is away already stays so."""
        for part in parts:
            if part in self._parts:
                continue
            if part == "gradients":
                for chunk in self._chunks:
                    chunk.offload_grad_buffers(empty_cache=False)
            else:
                self._move_to_host()
            self._parts.add(part)
        torch.cuda.empty_cache()

    def take(self, parts: Sequence[str]) -> None:
        """The opposite; gradients come back as zeros. A part that is here already stays so."""
        for part in parts:
            if part not in self._parts:
                continue
            if part == "gradients":
                for chunk in self._chunks:
                    chunk.restore_grad_buffers()
            else:
                self._move_back()
            self._parts.remove(part)

    def _move_to_host(self) -> None:
        storages = {storage._cdata: storage for storage in self._storages() if storage.nbytes()}
        kept, self._on_host = self._on_host, {}
        for key, storage in storages.items():
            host = kept.get(key)
            if host is None or host.numel() != storage.nbytes():
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
            self._on_host[key] = host.copy_(_bytes_of(storage), non_blocking=True)
        torch.cuda.synchronize()
        for key, storage in storages.items():
            storage.resize_(0)
            self._away.append((storage, self._on_host[key]))

    def _move_back(self) -> None:
        for storage, host in self._away:
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        self._away = []

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Of the optimizer alone: its parameters may be the model's, or views of them."""
        model = {parameter.untyped_storage()._cdata for chunk in self._chunks for parameter in chunk.parameters()}
        for tensor in optimizer_tensors(self._optimizer):
            storage = tensor.untyped_storage()
            if tensor.device.type == self._device.type and storage._cdata not in model:
                yield storage


def optimizer_tensors(optimizer: Any) -> Iterable[Tensor]:
    """Parameters, which are masters where the model's are not float32, and their state."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None:  # of a rank without parameters of this kind
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
