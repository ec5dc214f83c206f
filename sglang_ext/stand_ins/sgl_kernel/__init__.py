"""The CPU operators of sgl_kernel that SGLang calls; its wheels hold CUDA code only.

Any other name can be imported, and raises when it is called. `torch.ops.sgl_kernel.convert_weight_packed` must not
exist here: its presence is how SGLang recognizes a build with AMX kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__version__ = "0.0.0+cpu.stand.in"

_operators = torch.library.Library("sgl_kernel", "FRAGMENT")
_operators.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor cols) -> Tensor")


_BLOCK_ELEMENTS = 1 << 15


def murmur_hash32(seed: Tensor, positions: Tensor, cols: Tensor) -> Tensor:
    """MurmurHash3 of (seed, position, column), the same bits as SGLang's Triton kernel.

    In numpy, because torch has no uint32 arithmetic on a CPU; a few rows at a time, so that the work space stays in
    cache.

    Args:
        seed: [R] uint64 or int64. positions: [R]. cols: [V].
    Returns:
        [R, V] uint32.
    """
    seed_R = seed.view(torch.int64).numpy().view(np.uint64)
    low_R, high_R = seed_R.astype(np.uint32), (seed_R >> np.uint64(32)).astype(np.uint32)
    h_R = _mix(_mix(_mix(np.zeros_like(low_R), low_R), high_R), positions.numpy().astype(np.uint32))
    key_V = _mix_key(cols.numpy().astype(np.uint32))
    out_RV = np.empty((len(h_R), len(key_V)), dtype=np.uint32)
    rows = max(1, _BLOCK_ELEMENTS // max(1, len(key_V)))
    scratch_RV = np.empty((rows, len(key_V)), dtype=np.uint32)
    for start in range(0, len(h_R), rows):
        block_RV = out_RV[start : start + rows]
        np.bitwise_xor(key_V, h_R[start : start + rows, None], out=block_RV)
        _finish(block_RV, scratch_RV[: len(block_RV)])
    return torch.from_numpy(out_RV)


def _mix_key(k: np.ndarray) -> np.ndarray:
    k = k * np.uint32(0xCC9E2D51)
    return ((k << np.uint32(15)) | (k >> np.uint32(17))) * np.uint32(0x1B873593)


def _mix(h: np.ndarray, k: np.ndarray) -> np.ndarray:
    h = h ^ _mix_key(k)
    return ((h << np.uint32(13)) | (h >> np.uint32(19))) * np.uint32(5) + np.uint32(0xE6546B64)


def _finish(h: np.ndarray, scratch: np.ndarray) -> None:
    """Applies the last block's rotation and the final mix in place; 16 is the length of the key in bytes."""
    np.right_shift(h, np.uint32(19), out=scratch)
    np.left_shift(h, np.uint32(13), out=h)
    np.bitwise_or(h, scratch, out=h)
    np.multiply(h, np.uint32(5), out=h)
    np.add(h, np.uint32(0xE6546B64), out=h)
    np.bitwise_xor(h, np.uint32(16), out=h)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        np.right_shift(h, np.uint32(shift), out=scratch)
        np.bitwise_xor(h, scratch, out=h)
        if factor != 1:
            np.multiply(h, np.uint32(factor), out=h)


_operators.impl("murmur_hash32_cpu", murmur_hash32, "CPU")


def assign_req_to_token_pool_cpu(
    req_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, locations: Tensor, _pool_len: int
) -> None:
    """Writes each request's new cache locations, which come concatenated, into its row of the table."""
    at = 0
    for row, first, last in zip(req_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        req_to_token[row, first:last] = locations[at : at + last - first].to(req_to_token.dtype)
        at += last - first


def __getattr__(name: str) -> Callable:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: object, **_kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU version in this stand-in")

    return missing
