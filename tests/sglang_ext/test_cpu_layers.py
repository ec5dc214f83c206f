"""Normalization and rotary embedding in few steps against their formulas in many; without SGLang."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_ext.cpu_layers import rms_norm, rotary_embedding


def not_called(*_: Any, **__: Any) -> Any:
    raise AssertionError("SGLang's own function was called")


def norm_layer(size: int, dtype: torch.dtype = torch.float32, **other: Any) -> SimpleNamespace:
    weight = torch.linspace(0.5, 2, size).to(dtype)
    fields = {
        "weight": weight, "hidden_size": size, "variance_epsilon": 1e-6, "variance_size_override": None,
        "override_orig_dtype": None,
    }  # fmt: skip
    return SimpleNamespace(**(fields | other))


@pytest.mark.parametrize("shape", [(1, 576), (33, 128), (128, 4, 32)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norms_have_the_bits_of_the_formula(shape: tuple[int, ...], with_residual: bool):
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, *shape, generator=generator)
    layer = norm_layer(shape[-1])
    total = x + residual if with_residual else x
    expected = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * layer.weight

    result = rms_norm(not_called, layer, x, residual if with_residual else None)

    if with_residual:
        result, new_residual = result
        assert torch.equal(new_residual, total)
    assert torch.equal(result, expected)


def rotary_layer(head_size: int, dtype: torch.dtype = torch.float32, **other: Any) -> SimpleNamespace:
    angles = torch.arange(64)[:, None] / 10000 ** (torch.arange(0, head_size, 2) / head_size)
    cache = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
    fields = {"cos_sin_cache": cache, "is_neox_style": True, "rotary_dim": head_size, "head_size": head_size}
    return SimpleNamespace(**(fields | other))


@pytest.mark.parametrize(("num_heads", "head_size"), [(4, 32), (9, 64)])
def test_heads_are_turned_with_the_bits_of_the_formula(num_heads: int, head_size: int):
    generator = torch.Generator().manual_seed(num_heads)
    layer = rotary_layer(head_size)
    positions = torch.randint(0, 64, (17,), generator=generator)
    query = torch.randn(17, num_heads * head_size, generator=generator)
    key = torch.randn(17, 2 * num_heads * head_size, generator=generator)[:, : 2 * head_size]  # a part of wider rows

    turned = rotary_embedding(not_called, layer, positions, query, key)

    cos, sin = (part[:, None] for part in layer.cos_sin_cache[positions].chunk(2, -1))

    def expected(x: Tensor) -> Tensor:
        first, second = x.unflatten(1, (-1, head_size)).chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).flatten(1)

    for result, x in zip(turned, (query, key), strict=True):
        assert result.shape == x.shape
        assert torch.equal(result, expected(x))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        pytest.param(norm_layer(8, torch.bfloat16), torch.ones(2, 8, dtype=torch.bfloat16), id="bfloat16"),
        pytest.param(norm_layer(8, variance_size_override=4), torch.ones(2, 8), id="variance of a part"),
        pytest.param(norm_layer(8, override_orig_dtype=torch.bfloat16), torch.ones(2, 8), id="another output"),
        pytest.param(norm_layer(8), torch.ones(2, 4), id="wrong size"),
    ],
)
def test_other_norms_are_left_to_sglang(layer: SimpleNamespace, x: Tensor):
    assert rms_norm(lambda *_: "SGLang's", layer, x) == "SGLang's"


def test_a_sum_of_three_is_left_to_sglang():
    layer, rows = norm_layer(8), torch.ones(2, 8)
    assert rms_norm(lambda *_: "SGLang's", layer, rows, rows, rows) == "SGLang's"


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(rotary_layer(8, torch.bfloat16), id="bfloat16"),
        pytest.param(rotary_layer(8, is_neox_style=False), id="interleaved"),
        pytest.param(rotary_layer(8, rotary_dim=4), id="a part of each head"),
    ],
)
def test_other_embeddings_are_left_to_sglang(layer: SimpleNamespace):
    heads = torch.ones(2, 8, dtype=layer.cos_sin_cache.dtype)
    assert rotary_embedding(lambda *_: "SGLang's", layer, torch.tensor([0, 1]), heads, heads) == "SGLang's"
