"""Memory of a GPU that two processes on that GPU share by CUDA-IPC. Unshown until `tests/gpu/test_transfer.py` ran."""

from __future__ import annotations

import json

import torch
from torch import Tensor


def gpu_of(tensor: Tensor) -> str | None:
    """The GPU that holds the tensor, by a name that all processes share; None on a CPU."""
    return str(torch.cuda.get_device_properties(tensor.device).uuid) if tensor.is_cuda else None


def export_handle(slots: Tensor) -> str:
    """What another process on the same GPU needs to reach this memory, which must outlive its use there."""
    parts = slots.untyped_storage()._share_cuda_()
    return json.dumps([{"hex": part.hex()} if isinstance(part, bytes) else part for part in parts])


def open_handle(handle: str, device: torch.device) -> Tensor:
    """[num_bytes] uint8, the memory behind a handle.

    Args:
        device: this process's name of the GPU that the memory is on.
    """
    parts = [bytes.fromhex(part["hex"]) if isinstance(part, dict) else part for part in json.loads(handle)]
    parts[0] = device.index if device.index is not None else torch.cuda.current_device()
    storage = torch.UntypedStorage._new_shared_cuda(*parts)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
