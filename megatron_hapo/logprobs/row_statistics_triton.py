"""`row_statistics.local_statistics` as one Triton kernel that reads the logits once and stores nothing of their size.

One program per row goes along the columns with a running maximum; when it rises, the sums so far are rescaled. Triton's
`maximum` drops NaN, so bounds are set by comparisons, which let a NaN reach the sums and be reported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Columns of one step: 16 per thread."""
NUM_WARPS = 8


def local_statistics(logits_NV: Tensor, local_targets_N: Tensor, temperature_N: Tensor | None) -> Tensor:
    """Maximum, sum of exp(x), sum of x exp(x), and the target's logit or 0, of each row. [4, N] float32

    Args:
        logits_NV: [N, V] float32, bfloat16 or float16, with contiguous rows; N and V at least 1.
        local_targets_N: [N] int64; outside [0, V) if another rank has the target.
        temperature_N: [N] float32; None means 1.
    """
    num_rows, num_columns = logits_NV.shape
    assert logits_NV.stride(1) == 1, "rows must be contiguous"
    result_4N = torch.empty(4, num_rows, dtype=torch.float32, device=logits_NV.device)
    row_statistics_kernel[(num_rows,)](
        logits_NV,
        local_targets_N.contiguous(),
        # Never read without a temperature, but the kernel needs a pointer.
        result_4N if temperature_N is None else temperature_N.contiguous(),
        result_4N,
        logits_NV.stride(0),
        num_rows,
        num_columns,
        HAS_TEMPERATURE=temperature_N is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,  # type: ignore[call-arg]  # an option of the launch
    )
    return result_4N


@triton.jit
def row_statistics_kernel(
    logits,
    local_targets,
    temperatures,
    result,
    row_stride,
    num_rows,
    num_columns,
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
    target = tl.load(local_targets + row)
    here = (target >= 0) & (target < num_columns)
    target_logit = tl.load(start + target, mask=here, other=0.0).to(tl.float32)
    tl.store(result + row, maximum)
    tl.store(result + num_rows + row, sum_exp)
    tl.store(result + 2 * num_rows + row, sum_x_exp)
    tl.store(result + 3 * num_rows + row, target_logit)
