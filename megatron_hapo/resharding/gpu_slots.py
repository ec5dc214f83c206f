"""Memory that processes with GPUs share: a GPU's through CUDA IPC, or the host's, known to CUDA.

Tested by `tests/gpu/test_transfer.py` only.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor


def gpu_of(device: torch.device) -> str | None:
    """UUID of this GPU, the same in all processes; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def visible_gpu(gpu: str) -> torch.device | None:
    """The GPU with this UUID as this process numbers it; None if it cannot see it."""
    devices = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return next((device for device in devices if gpu_of(device) == gpu), None)


def shareable(num_bytes: int, device: torch.device) -> Tensor:
    """[num_bytes] uint8 of GPU memory that another process can open, even where this one uses expandable segments.

    Opening such a segment takes pidfd_getfd, which unprivileged containers deny. torch 2.14 decides about a segment
    when it is allocated.
    """
    settings: Any = torch._C
    expandable = "expandable_segments:True" in (settings._accelerator_getAllocatorSettings() or "")
    if expandable:
        settings._accelerator_setAllocatorSettings("expandable_segments:False")
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    finally:
        if expandable:
            settings._accelerator_setAllocatorSettings("expandable_segments:True")


def register(slots: Tensor) -> None:
    """Make host memory known to CUDA, until `unregister`: copies then run at the bus's full speed."""
    _call("cudaHostRegister", slots.data_ptr(), slots.nbytes, 0)


def unregister(slots: Tensor) -> None:
    """Undo `register`, which must happen before the memory is unmapped."""
    _call("cudaHostUnregister", slots.data_ptr())


def _call(function: str, *arguments: int) -> None:
    runtime: Any = torch.cuda.cudart()
    status = getattr(runtime, function)(*arguments)
    if int(status) != 0:
        raise RuntimeError(f"{function} failed: {runtime.cudaGetErrorString(status)}")


def export_handle(slots: Tensor) -> str:
    """A handle with which another process that sees this GPU can open this memory, which must outlive its use there."""
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
