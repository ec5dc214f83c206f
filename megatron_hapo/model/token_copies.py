"""Copies of a packed micro-batch's tokens at other places, with gradients that need no atomic additions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_hapo.algorithm.microbatches import to_device


@dataclass(frozen=True)
class Copies:
    """Copies of packed tokens: of a token none, one or several."""

    source: Tensor
    """[copies] int64, the token of each copy; padding copies the first."""
    by_number: tuple[tuple[Tensor, Tensor], ...]
    """For each number n of copies the tokens [s] that have so many, and their copies [s, n], int64, without padding."""

    @classmethod
    def of(cls, source: np.ndarray, device: torch.device) -> Copies:
        """From the token of each copy, -1 for padding."""
        order = np.argsort(source, kind="stable")
        order = order[np.searchsorted(source[order], 0) :]
        tokens, first, numbers = np.unique(source[order], return_index=True, return_counts=True)
        by_number = [
            (tokens[numbers == n], order[first[numbers == n][:, None] + np.arange(n)]) for n in np.unique(numbers)
        ]
        return cls(
            to_device(np.maximum(source, 0), device),
            tuple((to_device(some, device), to_device(copies, device)) for some, copies in by_number),
        )

    def take(self, x: Tensor) -> Tensor:
        """The copies of x. [copies, ...]"""
        return _Take.apply(x, self)


class _Take(torch.autograd.Function):
    """Copies of x, whose gradients are summed in a fixed order. Torch's own gradient adds them row by row on a CPU, and
    with atomic operations on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies) -> Tensor:
        ctx.copies, ctx.size = copies, len(x)
        return x.index_select(0, copies.source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        by_number = ctx.copies.by_number
        result = grad.new_empty(ctx.size, *grad.shape[1:])
        if sum(len(tokens) for tokens, _ in by_number) < ctx.size:
            result.zero_()
        for tokens, copies in by_number:
            own = grad.index_select(0, copies.flatten())
            result.index_copy_(0, tokens, own.unflatten(0, copies.shape).sum(1) if copies.shape[1] > 1 else own)
        return result, None


def collect(x: Tensor, place: Tensor) -> Tensor:
    """The values of x at the places `place` [n] int64, none of which occurs twice. [n, ...]"""
    return _Collect.apply(x, place)


class _Collect(torch.autograd.Function):
    """`collect`, whose gradient needs no sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.size = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, place, grad), None
