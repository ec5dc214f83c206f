"""SGLang's float8 rounding (0.5.23) for a machine without a GPU, where its own is Triton. Never used on a GPU.

With it an engine on a CPU serves dense models that `megatron-hapo quantize --format fp8` has written; their KV cache is
bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

TARGETS = {
    "sglang.srt.layers.quantization.utils.scaled_fp8_quant": "scaled_fp8_quant",
    "sglang.srt.layers.quantization.fp8_utils.static_quant_fp8": "static_quant_fp8",
}
"""Where SGLang looks a function up to the one of this module that takes its place."""


def scaled_fp8_quant(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weights on this scale, and the scale."""
    return _round(x, scale), scale


def static_quant_fp8(x: Tensor, x_s: Tensor, repeat_scale: bool = False) -> tuple[Tensor, Tensor]:
    """Activations on this scale, and the scale."""
    assert not repeat_scale, "one scale a row is for SGLang's own GPU kernels"
    return _round(x, x_s), x_s


def _round(x: Tensor, scale: Tensor) -> Tensor:
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
