"""SGLang's float8 rounding (0.5.23) for a machine without a GPU; its own needs Triton. Never used on a GPU.

It lets an engine on a CPU serve dense models that `megatron-hapo quantize --format fp8` has written, with a bfloat16 KV
cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

TARGETS = {
    "sglang.srt.layers.quantization.utils.scaled_fp8_quant": "scaled_fp8_quant",
    "sglang.srt.layers.quantization.fp8_utils.static_quant_fp8": "static_quant_fp8",
}
"""Each name under which SGLang looks a function up, and the function of this module that replaces it."""


def scaled_fp8_quant(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weights rounded to float8 on this scale, and the scale."""
    return _round(x, scale), scale


def static_quant_fp8(x: Tensor, x_s: Tensor, repeat_scale: bool = False) -> tuple[Tensor, Tensor]:
    """Activations rounded to float8 on this scale, and the scale."""
    assert not repeat_scale, "repeat_scale (one scale a row) is only for SGLang's own GPU kernels"
    return _round(x, x_s), x_s


def _round(x: Tensor, scale: Tensor) -> Tensor:
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
