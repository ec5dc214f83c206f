"""SGLang's normalization and rotary embedding on a CPU, in fewer steps and with the same bits.

A decode step of a small model is mostly the overhead of its many small operations. SGLang (0.5.23) has kernels of its
own for a GPU and for CPUs with AMX; elsewhere its layers compose the same formulas of a dozen operations each. Only
float32 is taken over here, where the order of roundings is the same. Never used on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

AROUND = {
    "sglang.srt.layers.layernorm.RMSNorm.forward_native": "rms_norm",
    "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.forward_native": "rotary_embedding",
}
"""SGLang's functions and the hooks of this module around them."""


def rms_norm(
    original: Callable[..., Any],
    layer: Any,
    x: Tensor,
    residual: Tensor | None = None,
    *more: Any,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """In the place of SGLang's: the normalized rows, after a sum with `residual`, which is returned as well."""
    plain = (
        x.dtype == layer.weight.dtype == torch.float32
        and (residual is None or residual.dtype == torch.float32)
        and layer.override_orig_dtype in (None, torch.float32)
        and layer.variance_size_override is None
        and x.shape[-1] == layer.hidden_size
        and all(value is None for value in (*more, *options.values()))
    )
    if not plain:
        return original(layer, x, residual, *more, **options)
    if residual is None:
        return F.rms_norm(x, (layer.hidden_size,), layer.weight, layer.variance_epsilon)
    residual = x + residual
    return F.rms_norm(residual, (layer.hidden_size,), layer.weight, layer.variance_epsilon), residual


def rotary_embedding(
    original: Callable[..., Any],
    layer: Any,
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    offsets: Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[Tensor, Tensor]:
    """In the place of SGLang's: query and key, [tokens, heads * head size], turned by their positions."""
    plain = (
        query.dtype == key.dtype == layer.cos_sin_cache.dtype == torch.float32
        and layer.is_neox_style
        and layer.rotary_dim == layer.head_size
        and offsets is None
        and fused_set_kv_buffer_arg is None
    )
    if not plain:
        return original(layer, positions, query, key, offsets, fused_set_kv_buffer_arg)
    turns = layer.cos_sin_cache.index_select(0, positions.flatten())
    cos, sin = turns.chunk(2, dim=-1)
    cos_N1D, sin_N1D = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]

    def turned(heads: Tensor) -> Tensor:
        heads_NHD = heads.view(len(turns), -1, layer.head_size)
        # x_1 cos - x_2 sin and x_2 cos + x_1 sin, both halves of each head at once
        swapped = torch.roll(heads_NHD, layer.head_size // 2, -1).mul_(sin_N1D)
        return (heads_NHD * cos_N1D).add_(swapped).reshape(heads.shape)

    return turned(query), turned(key)
