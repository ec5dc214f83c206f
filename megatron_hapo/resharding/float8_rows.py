"""Weights as engines serve them with `rollout.quantization: fp8`: e4m3 with one float32 scale a row. Pure.

A row is one output of a linear layer, as it lies on an engine rank: where tensor parallelism cuts columns, each rank
has scales of its own. Every operation is exact or rounded by IEEE's rules, so that a CPU and a GPU compute the same
bits, and trainer and engines can be compared by checksums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
"""448; a row's largest magnitude becomes this."""
_CHUNK_ELEMENTS = 1 << 24
"""Elements that are quantized at once; the work space is 8 bytes per element."""


class Float8Rows(NamedTuple):
    """A quantized matrix; row i stands for scale[i] * weight[i]."""

    weight: Tensor
    """[rows, columns] float8_e4m3fn."""
    scale: Tensor
    """[rows, 1] float32."""


def empty_rows(shape: tuple[int, int], device: torch.device) -> Float8Rows:
    """Memory for a quantized matrix of this shape."""
    return Float8Rows(
        torch.empty(shape, dtype=DTYPE, device=device),
        torch.empty((shape[0], 1), dtype=torch.float32, device=device),
    )


def quantize_rows(matrix: Tensor, *, out: Float8Rows | None = None) -> Float8Rows:
    """The matrix with each row divided by its scale, max |row| / 448, and rounded to the nearest e4m3.

    A row of zeros has the scale 1. Rows do not depend on each other: quantizing some of them gives the same bits.

    Args:
        matrix: [rows, columns], float32 or 16 bits.
        out: receives the result; None allocates it on the matrix's device.
    """
    rows, columns = matrix.shape
    out = out or empty_rows((rows, columns), matrix.device)
    at_once = max(1, _CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        values = matrix[part].float()
        largest = torch.maximum(*(bound.abs() for bound in values.aminmax(dim=1, keepdim=True)))
        # The smallest normal number, so that a scale never becomes 0, nor differs where subnormals are flushed.
        scale = torch.where(largest > 0, (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny), 1.0)
        out.scale[part].copy_(scale)
        out.weight[part].copy_((values / scale).clamp_(-LARGEST, LARGEST).to(DTYPE))
    return out
