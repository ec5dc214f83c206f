"""Operations of float32 layers that torch composes on a CPU of a dozen others, in about half as many.

Their backward passes, which autograd would compose as well, take two thirds of a layer's time outside matrix products.
On a GPU torch and Transformer Engine have kernels for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm over the last dimension. Same shape.

    Args:
        x: [..., h] float32.
        weight: [h] float32.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normalised, scaled = x * scale, grad * weight
        along = (scaled * normalised).mean(-1, keepdim=True)
        weight_grad = (grad * normalised).flatten(0, -2).sum(0)
        return scaled.addcmul_(normalised, along, value=-1).mul_(scale), weight_grad, None


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of whole heads, whose first half is turned with the second. Same shape.

    Args:
        x: [t, 1, heads, d] float32.
        angles: [t, 1, 1, d], equal in both halves.
    """
    half = angles[..., : x.shape[-1] // 2]
    return _Rotate.apply(x, half.cos(), half.sin())


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cosine, sine = ctx.saved_tensors
        return _turned(grad, cosine, -sine), None, None


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    (first, second), result = x.chunk(2, dim=-1), torch.empty_like(x, memory_format=torch.contiguous_format)
    real, imaginary = result.chunk(2, dim=-1)
    torch.mul(first, cosine, out=real).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=imaginary).addcmul_(first, sine)
    return result
