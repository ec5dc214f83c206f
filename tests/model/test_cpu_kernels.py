"""The CPU's operations against the composed ones in float64: values, and gradients of every input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hapo.model import cpu_kernels


@pytest.mark.parametrize("shape", [(7, 1, 48), (7, 1, 3, 16)], ids=["hidden states", "heads"])
def test_rms_norm_is_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, direction = torch.randn(shape) * 3, torch.rand(shape[-1]) + 0.5, torch.randn(shape)
    x[0] = 0  # nothing but eps
    exact_x, exact_weight = (t.double().requires_grad_() for t in (x, weight))
    exact = F.rms_norm(exact_x, weight.shape, exact_weight, 1e-6)
    exact.backward(direction.double())
    normed = cpu_kernels.rms_norm(x.requires_grad_(), weight.requires_grad_(), 1e-6)
    normed.backward(direction)
    torch.testing.assert_close(normed.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(_gradient(weight), exact_weight.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(_gradient(x), exact_x.grad, atol=1e-5, rtol=1e-5)


def test_rotation_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    half = torch.rand(7, 1, 1, 4) * 50
    angles, x, direction = torch.cat([half, half], -1), torch.randn(7, 1, 3, 8), torch.randn(7, 1, 3, 8)
    exact_x = x.double().requires_grad_()
    first, second = exact_x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    exact = exact_x * angles.double().cos() + turned * angles.double().sin()
    exact.backward(direction.double())
    rotated = cpu_kernels.rotate(x.requires_grad_(), angles)
    rotated.backward(direction)
    torch.testing.assert_close(rotated.double(), exact, atol=1e-4, rtol=0)  # of angles up to 50 in float32
    torch.testing.assert_close(_gradient(x), exact_x.grad, atol=1e-4, rtol=0)


def test_rotation_takes_heads_that_are_parts_of_a_larger_tensor() -> None:
    """Megatron splits queries, keys and values off one product."""
    whole, angles = torch.randn(5, 1, 6, 8), torch.rand(5, 1, 1, 8)
    part = whole[:, :, 2:5]
    assert torch.equal(cpu_kernels.rotate(part, angles), cpu_kernels.rotate(part.contiguous(), angles))


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad.double()
