"""Engines with `rollout.quantization: fp8`: SGLang's `w8a8_fp8` (0.5.23), with weights quantized by `float8_rows`.

SGLang's own rounding of weights depends on the device and on the kernel's compiler flags, and without CUTLASS it has
one scale a matrix. With ours, weights that were read from a folder, received in a sync or expected by the trainer have
the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from megatron_hapo.resharding.float8_rows import DTYPE, LARGEST, Float8Rows, quantize_rows
from megatron_hapo.resharding.transfer import as_matrix

ENVIRONMENT = {"HAPO_FLOAT8_ROWS": "1"}
"""Variables of such an engine's scheduler processes, set before they start."""
AROUND = {
    "sglang.srt.layers.quantization.w8a8_fp8.W8A8Fp8LinearMethod.process_weights_after_loading": (
        "quantize_after_loading"
    )
}
"""SGLang's function and the hook of this module around it."""
_RANDOM_LIMIT = 1e-3
"""Magnitude of SGLang's random weights (`load_format=dummy`)."""


def requested() -> bool:
    """Whether this process serves such a model."""
    return os.environ.get("HAPO_FLOAT8_ROWS") == "1"


def quantize_after_loading(original: Callable[..., None], method: Any, layer: Any) -> None:
    """Replaces a linear layer's weight by its float8 rows, transposed as SGLang's products take it."""
    if method.quantization_config.is_checkpoint_fp8_serialized:
        # An engine without weights: SGLang's random numbers are 0 in float8, and its kernel divides by a token's
        # largest activation, which must not be 0.
        _fill_randomly(Float8Rows(layer.weight.data, layer.weight_scale.data))
        original(method, layer)
        return
    rows = quantize_rows(layer.weight.data)
    layer.weight = Parameter(rows.weight.t(), requires_grad=False)
    layer.weight_scale = Parameter(rows.scale, requires_grad=False)
    layer.input_scale = None


def _fill_randomly(rows: Float8Rows) -> None:
    generator = torch.Generator(rows.weight.device).manual_seed(0)
    for part in rows.weight.split(1024):
        values = torch.empty(part.shape, dtype=torch.float32, device=part.device)
        part.copy_(values.uniform_(-LARGEST, LARGEST, generator=generator))
    rows.scale.fill_(_RANDOM_LIMIT / LARGEST)


def served_matrices(model: nn.Module) -> dict[str, Tensor | Float8Rows]:
    """Every parameter as a plan addresses it: a [rows, columns] view, or float8 rows together with their scales.

    A shared parameter is named once: an output head tied to the embedding is left out.
    """
    served: dict[str, Tensor | Float8Rows] = {}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name.removesuffix("_scale") != name and parameters[name.removesuffix("_scale")].dtype == DTYPE:
            continue
        if parameter.dtype == DTYPE and (scale := parameters.get(f"{name}_scale")) is not None:
            served[name] = Float8Rows(as_matrix(parameter.t()), scale.detach())
        else:
            served[name] = as_matrix(parameter)
    return served
