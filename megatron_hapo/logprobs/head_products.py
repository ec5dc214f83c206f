"""The matrix products of an output head: its logits, and the gradients of hidden states and weight.

`N` tokens, `C` of them in a chunk, `H` hidden size, `V` this rank's rows of the weight. Products of bfloat16 matrices
are summed in float32 anyway; here the sum can stay as it is. Only CUDA has matmuls that return or add to a wider dtype
than their arguments'. Elsewhere a block of the weight is converted at a time, which gives the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hapo.logprobs.row_statistics import slices, statistics_dtype

WEIGHT_BLOCKS = 16
"""Blocks in which a weight or its gradient is converted where a matmul has no wider result than its arguments."""
GRADIENT_CHUNK_BYTES = 128 << 20
"""Size of the part of a float32 gradient of logits that is rounded at a time."""


def head_product(hidden_CH: Tensor, weight_VH: Tensor, *, out: Tensor) -> Tensor:
    """hidden @ weight^T in the first rows of `out`, in its dtype: that of the arguments, or float32. [C, V]"""
    logits_CV = out[: len(hidden_CH)]
    if logits_CV.dtype == hidden_CH.dtype:
        return torch.mm(hidden_CH, weight_VH.t(), out=logits_CV)
    if logits_CV.device.type == "cuda":
        return torch.mm(hidden_CH, weight_VH.t(), out_dtype=logits_CV.dtype, out=logits_CV)
    wide_CH = hidden_CH.to(logits_CV.dtype)
    for columns in _blocks(len(weight_VH)):
        logits_CV[:, columns] = wide_CH @ weight_VH[columns].to(logits_CV.dtype).t()
    return logits_CV


def float32_logits(hidden_NH: Tensor, weight_VH: Tensor, *, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Differentiable float32 logits of all tokens, those of padding included. [N, V] float32

    Their gradient is rounded to the dtype of the hidden states for its own two products, a part at a time.

    Args:
        tp_group: ranks that sum their gradients of the hidden states, one all-reduce per part; None: they do not.
    """
    return _Float32Logits.apply(hidden_NH, weight_VH, tp_group)  # type: ignore[misc]


class _Float32Logits(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, tp_group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH)
        ctx.tp_group = tp_group
        out = hidden_NH.new_empty(len(hidden_NH), len(weight_VH), dtype=statistics_dtype(hidden_NH.dtype))
        return head_product(hidden_NH, weight_VH, out=out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NV: Tensor):  # type: ignore[override]
        hidden_NH, weight_VH = ctx.saved_tensors
        gradients = HeadGradients(hidden_NH, weight_VH, needs=ctx.needs_input_grad[:2], tp_group=ctx.tp_group)
        rows_of_part = max(1, GRADIENT_CHUNK_BYTES // (len(weight_VH) * grad_NV.element_size()))
        for rows in slices(len(grad_NV), rows_of_part):
            gradients.add(rows, grad_NV[rows])
        return *gradients.finish(), None


class HeadGradients:
    """Gradients of hidden states and weight, from those of one chunk of logits at a time.

    If Megatron's DistributedDataParallel manages the weight, its gradient is added straight to `main_grad`, in the
    dtype of that buffer, and marked as done; any other weight gets an ordinary gradient.

    Args:
        needs: whether hidden states and weight need a gradient.
        tp_group: ranks whose gradients of the hidden states are summed; None: they are not.
    """

    def __init__(
        self, hidden_NH: Tensor, weight_VH: Tensor, *, needs: tuple[bool, bool], tp_group: dist.ProcessGroup | None
    ):
        self._hidden_NH, self._weight_VH, self._tp_group = hidden_NH, weight_VH, tp_group
        self._of_hidden_NH = torch.empty_like(hidden_NH) if needs[0] else None
        self._of_weight = _WeightGradient(weight_VH) if needs[1] else None
        self._reductions: list[Any] = []

    def add(self, rows: slice, gradient_CV: Tensor) -> None:
        """Adds the part of these rows; `gradient_CV` has the columns that are not padding, or all."""
        hidden_CH = self._hidden_NH[rows]
        gradient_CV = gradient_CV.to(hidden_CH.dtype)
        if self._of_hidden_NH is not None:
            of_hidden_CH = self._of_hidden_NH[rows]
            torch.mm(gradient_CV, self._weight_VH[: gradient_CV.shape[1]], out=of_hidden_CH)
            if self._tp_group is not None:
                # Overlaps with the computation of the weight's gradient.
                self._reductions.append(dist.all_reduce(of_hidden_CH, group=self._tp_group, async_op=True))
        if self._of_weight is not None:
            self._of_weight.add(gradient_CV, hidden_CH)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients for autograd; None for a weight whose gradient is in Megatron's buffer."""
        for reduction in self._reductions:
            reduction.wait()
        return self._of_hidden_NH, None if self._of_weight is None else self._of_weight.finish()


class _WeightGradient:
    """The weight's gradient, summed over chunks in place: in Megatron's buffer if there is one, else in its own."""

    def __init__(self, weight_VH: Tensor):
        self._weight_VH = weight_VH
        # DistributedDataParallel gives a parameter both attributes.
        self._in_buffer = hasattr(weight_VH, "main_grad") and hasattr(weight_VH, "grad_added_to_main_grad")
        if self._in_buffer:
            self._sum_VH: Tensor = weight_VH.main_grad  # type: ignore[attr-defined]
        else:
            self._sum_VH = torch.zeros_like(weight_VH, dtype=statistics_dtype(weight_VH.dtype))

    def add(self, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
        """Adds gradient^T @ hidden to the rows that are not padding."""
        sum_VH = self._sum_VH[: gradient_CV.shape[1]]
        if sum_VH.dtype == gradient_CV.dtype:
            sum_VH.addmm_(gradient_CV.t(), hidden_CH)
        elif sum_VH.dtype == torch.float32 and sum_VH.device.type == "cuda":
            torch.addmm(sum_VH, gradient_CV.t(), hidden_CH, out_dtype=torch.float32, out=sum_VH)
        else:
            wide_CH = hidden_CH.to(sum_VH.dtype)
            for columns in _blocks(len(sum_VH)):
                sum_VH[columns].addmm_(gradient_CV[:, columns].t().to(sum_VH.dtype), wide_CH)

    def finish(self) -> Tensor | None:
        """The gradient for autograd; None if it is in Megatron's buffer."""
        weight: Any = self._weight_VH
        if not self._in_buffer:
            return self._sum_VH.to(weight.dtype)
        weight.grad_added_to_main_grad = True
        # With overlapped reduction the hook of Megatron 0.19 requires a gradient, though it does not read it: this one
        # is a single number expanded to the whole shape. A weight with zero_out_wgrad is also the embedding, which
        # gives it a real gradient.
        if weight.grad is None and not getattr(weight, "zero_out_wgrad", False):
            weight.grad = weight.new_zeros(()).expand_as(weight)
        return None


def _blocks(columns: int) -> list[slice]:
    return list(slices(columns, max(1, -(-columns // WEIGHT_BLOCKS))))
