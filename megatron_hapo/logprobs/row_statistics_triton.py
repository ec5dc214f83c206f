"""`row_statistics.local_statistics` and `overwrite_with_gradient` as one Triton kernel each.

The first reads the logits once and stores nothing of their size: one program per row goes along the columns with a
running maximum; when it rises, the sums so far are rescaled. The second reads and overwrites them once, in blocks that
do not depend on each other. Triton's `maximum` drops NaN, so bounds are set by comparisons, which let a NaN reach the
sums and be reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from megatron_hapo.logprobs.row_statistics import RowGradient

BLOCK = 4096
"""Columns of one step: 16 per thread."""
NUM_WARPS = 8


def local_statistics(logits_NV: Tensor, local_targets_N: Tensor | None, temperature_N: Tensor | None) -> Tensor:
    """Maximum, sum of exp(x), sum of x exp(x), and the target's logit or 0, of each row. [4, N] float32

    Args:
        logits_NV: [N, V] float32, bfloat16 or float16, with contiguous rows; N and V at least 1.
        local_targets_N: [N] int64; outside [0, V) if another rank has the target. None if nobody needs its logit.
        temperature_N: [N] float32; None means 1.
    """
    num_rows, num_columns = logits_NV.shape
    assert logits_NV.stride(1) == 1, "rows must be contiguous"
    result_4N = torch.empty(4, num_rows, dtype=torch.float32, device=logits_NV.device)
    row_statistics_kernel[(num_rows,)](
        logits_NV,
        # Never read without targets, or a temperature, but the kernel needs pointers.
        result_4N if local_targets_N is None else local_targets_N.contiguous(),
        result_4N if temperature_N is None else temperature_N.contiguous(),
        result_4N,
        logits_NV.stride(0),
        num_rows,
        num_columns,
        HAS_TARGETS=local_targets_N is not None,
        HAS_TEMPERATURE=temperature_N is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,  # type: ignore[call-arg]  # an option of the launch
    )
    return result_4N


def overwrite_with_gradient(logits_NV: Tensor, local_targets_N: Tensor, gradient: RowGradient) -> None:
    """Overwrites the logits [N, V], columns that are not padding, with the gradient of the loss.

    Args:
        logits_NV: [N, V] float32, bfloat16 or float16, with contiguous rows; N and V at least 1.
        local_targets_N: [N] int64; outside [0, V) if another rank has the target.
        gradient: of these rows.
    """
    num_rows, num_columns = logits_NV.shape
    assert logits_NV.stride(1) == 1, "rows must be contiguous"
    blocks = triton.cdiv(num_columns, BLOCK)
    # Pointers that a kernel never reads, but needs: without a temperature, or a slope.
    temperature_N = gradient.offset if gradient.temperature is None else gradient.temperature
    slope_N = gradient.offset if gradient.slope is None else gradient.slope
    row_gradient_kernel[(num_rows * blocks,)](
        logits_NV,
        local_targets_N.contiguous(),
        gradient.maximum.contiguous(),
        temperature_N.contiguous(),
        gradient.offset.contiguous(),
        slope_N.contiguous(),
        gradient.target.contiguous(),
        logits_NV.stride(0),
        num_columns,
        blocks,
        HAS_TEMPERATURE=gradient.temperature is not None,
        HAS_SLOPE=gradient.slope is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,  # type: ignore[call-arg]  # an option of the launch
    )


@triton.jit
def row_statistics_kernel(
    logits,
    local_targets,
    temperatures,
    result,
    row_stride,
    num_rows,
    num_columns,
    HAS_TARGETS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the statistics of one row; `result` is [4, num_rows]."""
    # float32's lowest value and `row_statistics.FAR_BELOW`; a kernel cannot read globals.
    lowest = -3.4028234663852886e38
    far_below = -1e4
    row = tl.program_id(0).to(tl.int64)  # logits can have more than 2**31 elements
    start = logits + row * row_stride
    temperature = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperatures + row)
    # Finite from the start, as in the torch version: -inf - -inf would be NaN.
    maximum = lowest
    sum_exp = 0.0
    sum_x_exp = 0.0
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logit = tl.load(start + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
        new_maximum = tl.maximum(maximum, tl.max(logit, 0))
        shift = tl.maximum((maximum - new_maximum) / temperature, far_below)
        x = (logit - new_maximum) / temperature
        x = tl.where(x < far_below, far_below, x)
        exp = tl.exp(x)
        sum_x_exp = tl.exp(shift) * (sum_x_exp + shift * sum_exp) + tl.sum(exp * x, 0)
        sum_exp = tl.exp(shift) * sum_exp + tl.sum(exp, 0)
        maximum = new_maximum
    target_logit = 0.0
    if HAS_TARGETS:
        target = tl.load(local_targets + row)
        here = (target >= 0) & (target < num_columns)
        target_logit = tl.load(start + target, mask=here, other=0.0).to(tl.float32)
    tl.store(result + row, maximum)
    tl.store(result + num_rows + row, sum_exp)
    tl.store(result + 2 * num_rows + row, sum_x_exp)
    tl.store(result + 3 * num_rows + row, target_logit)


@triton.jit
def row_gradient_kernel(
    logits,
    local_targets,
    maxima,
    temperatures,
    offsets,
    slopes,
    target_gradients,
    row_stride,
    num_columns,
    blocks_per_row,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrites one block of one row's logits with `RowGradient`'s formula."""
    far_below = -1e4  # `row_statistics.FAR_BELOW`
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    columns = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    places = logits + row * row_stride + columns
    x = tl.load(places, mask=columns < num_columns, other=0.0).to(tl.float32) - tl.load(maxima + row)
    if HAS_TEMPERATURE:
        x = x / tl.load(temperatures + row)
    x = tl.where(x < far_below, far_below, x)
    factor = tl.load(offsets + row)
    if HAS_SLOPE:
        factor = x * tl.load(slopes + row) + factor
    value = tl.where(columns == tl.load(local_targets + row), tl.load(target_gradients + row), tl.exp(x) * factor)
    tl.store(places, value.to(logits.dtype.element_ty), mask=columns < num_columns)
