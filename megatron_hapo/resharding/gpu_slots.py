"""GPU memory that two processes on the same GPU share through CUDA IPC. Tested by `tests/gpu/test_transfer.py` only."""

from __future__ import annotations

import json

import torch
from torch import Tensor


def gpu_of(device: torch.device) -> str | None:
    """UUID of this GPU, the same in all processes; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def export_handle(slots: Tensor) -> str:
    """A handle with which another process on the same GPU can open this memory, which must outlive its use there."""
    parts = slots.untyped_storage()._share_cuda_()
    return json.dumps([{"hex": part.hex()} if isinstance(part, bytes) else part for part in parts])


def open_handle(handle: str, device: torch.device) -> Tensor:
    """[num_bytes] uint8 on `device`, the memory behind a handle from `export_handle`.

    Args:
        device: the GPU that holds the memory, as numbered in this process.
    """
    parts = [bytes.fromhex(part["hex"]) if isinstance(part, dict) else part for part in json.loads(handle)]
    parts[0] = device.index if device.index is not None else torch.cuda.current_device()
    storage = torch.UntypedStorage._new_shared_cuda(*parts)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
