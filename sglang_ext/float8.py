"""SGLang's float8 arithmetic (0.5.23) for a machine without a GPU; its own needs Triton. Never used on a GPU.

It lets an engine on a CPU serve dense models that `megatron-hapo quantize --format fp8` has written, with a bfloat16 KV
cache, and any that it quantizes itself (`rollout.quantization: fp8`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hapo.resharding.float8_rows import quantize_rows

TARGETS = {
    "sglang.srt.layers.quantization.utils.scaled_fp8_quant": "scaled_fp8_quant",
    "sglang.srt.layers.quantization.fp8_utils.static_quant_fp8": "static_quant_fp8",
    "sglang.srt.layers.quantization.fp8_utils.per_token_group_quant_fp8": "per_token_quant_fp8",
    "sglang.srt.layers.quantization.fp8_utils._apply_fallback_scaled_mm": "scaled_product",
    "sglang.srt.layers.quantization.w8a8_fp8.W8A8FP8MoEMethod.apply": "apply_experts",
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
    products = _product(qinput, x_scale, weight.t(), weight_scale)
    if bias is not None:
        products += bias
    return products.to(input_dtype).view(output_shape)


def apply_experts(_method: Any, layer: Any, dispatch_output: Any) -> Any:
    """The chosen experts' outputs, weighted and added in the order of choice, so that rows do not depend on each other.

    As SGLang's Triton kernel rounds: the inputs of both products to float8, what they return to the input's dtype.
    """
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    x = dispatch_output.hidden_states
    weights, experts, _ = dispatch_output.topk_output
    outputs = x.new_zeros((*experts.shape, x.shape[1]))  # [tokens, choices, features]
    for expert in experts.unique().tolist():
        tokens, choices = (experts == expert).nonzero(as_tuple=True)
        stacked = _product(*quantize_rows(x[tokens]), layer.w13_weight[expert], layer.w13_weight_scale[expert])
        gate, up = stacked.to(x.dtype).float().chunk(2, dim=1)
        hidden = (F.silu(gate) * up).to(x.dtype)
        down = _product(*quantize_rows(hidden), layer.w2_weight[expert], layer.w2_weight_scale[expert])
        outputs[tokens, choices] = (down * weights[tokens, choices, None]).to(x.dtype)
    return StandardCombineInput(hidden_states=outputs.float().sum(dim=1).to(x.dtype))


def _product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """[tokens, outputs] float32, from float8 inputs [tokens, features] and weights [outputs, features]."""
    return F.linear(x.float(), weight.float()) * x_scale * weight_scale.t()


def _round(x: Tensor, scale: Tensor) -> Tensor:
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
