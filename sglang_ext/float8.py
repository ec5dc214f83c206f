"""SGLang's float8 arithmetic (0.5.23) for a machine without a GPU; its own needs Triton. Never used on a GPU.

It lets an engine on a CPU serve dense models that `megatron-hapo quantize --format fp8` has written, with a bfloat16 KV
cache, and those that it quantizes itself (`rollout.quantization: fp8`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hapo.resharding.float8_rows import quantize_rows

TARGETS = {
    "sglang.srt.layers.quantization.utils.scaled_fp8_quant": "scaled_fp8_quant",
    "sglang.srt.layers.quantization.fp8_utils.static_quant_fp8": "static_quant_fp8",
    "sglang.srt.layers.quantization.fp8_utils.per_token_group_quant_fp8": "per_token_quant_fp8",
    "sglang.srt.layers.quantization.fp8_utils._apply_fallback_scaled_mm": "scaled_product",
}
"""Each name under which SGLang looks a function up, and the function of this module that replaces it."""


def scaled_fp8_quant(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weights rounded to float8 on this scale, and the scale."""
    return _round(x, scale), scale


def static_quant_fp8(x: Tensor, x_s: Tensor, repeat_scale: bool = False) -> tuple[Tensor, Tensor]:
    """Activations rounded to float8 on this scale, and the scale."""
    assert not repeat_scale, "repeat_scale (one scale a row) is only for SGLang's own GPU kernels"
    return _round(x, x_s), x_s


def per_token_quant_fp8(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Activations [tokens, features] rounded to float8, each token on its own scale, and the scales [tokens, 1]."""
    assert group_size == x.shape[1], "only whole rows are quantized"
    return quantize_rows(x)


def scaled_product(
    qinput: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    input_2d_shape: torch.Size,
    output_shape: list[int],
    bias: Tensor | None,
    input_dtype: torch.dtype,
) -> Tensor:
    """A linear layer of float8 inputs and weights, summed in float32 as on a GPU; then scales and bias are applied.

    Args:
        qinput: [tokens, features]. x_scale: [tokens, 1].
        weight: [features, outputs]. weight_scale: [outputs, 1].
    """
    assert len(qinput) == input_2d_shape[0], "padding is for torch's own products"
    products = F.linear(qinput.float(), weight.t().float()) * x_scale * weight_scale.t()
    if bias is not None:
        products += bias
    return products.to(input_dtype).view(output_shape)


def _round(x: Tensor, scale: Tensor) -> Tensor:
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
