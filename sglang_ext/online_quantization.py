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
_METHODS = "sglang.srt.layers.quantization.w8a8_fp8."
AROUND = {
    f"{_METHODS}W8A8Fp8LinearMethod.process_weights_after_loading": "quantize_linear",
    f"{_METHODS}W8A8FP8MoEMethod.create_weights": "create_experts",
    f"{_METHODS}W8A8FP8MoEMethod.process_weights_after_loading": "quantize_experts",
}
"""SGLang's functions and the hooks of this module around them."""
_EXPERTS = ("w13_weight", "w2_weight")
"""SGLang's parameters of a layer's experts, [experts, rows, columns]; their scales have the suffix `_scale`."""
_RANDOM_LIMIT = 1e-3
"""Magnitude of SGLang's random weights (`load_format=dummy`)."""


def requested() -> bool:
    """Whether this process serves such a model."""
    return os.environ.get("HAPO_FLOAT8_ROWS") == "1"


def quantize_linear(original: Callable[..., None], method: Any, layer: Any) -> None:
    """Replaces a linear layer's weight by its float8 rows, transposed as SGLang's products take it."""
    if _is_done(layer):
        return
    if _holds_float8(method.quantization_config):
        _fill_randomly(Float8Rows(layer.weight.data, layer.weight_scale.data))
        original(method, layer)
        return
    rows = quantize_rows(layer.weight.data)
    layer.weight = Parameter(rows.weight.t(), requires_grad=False)
    layer.weight_scale = Parameter(rows.scale, requires_grad=False)
    layer.input_scale = None


def create_experts(
    original: Callable[..., None], method: Any, layer: Any, *, params_dtype: torch.dtype, **sizes: Any
) -> None:
    """Allocates experts that will be read from a folder in its 16 bits: SGLang would cut them to float8 unscaled."""
    original(method, layer, params_dtype=params_dtype, **sizes)
    if _holds_float8(method.quant_config):
        return
    for name in _EXPERTS:
        float8 = getattr(layer, name)
        wide = Parameter(torch.empty_like(float8, dtype=params_dtype), requires_grad=False)
        vars(wide).update(vars(float8))  # how SGLang loads it
        setattr(layer, name, wide)


def quantize_experts(original: Callable[..., None], method: Any, layer: Any) -> None:
    """Replaces the experts by their float8 rows."""
    if _is_done(layer):
        return
    for name in _EXPERTS:
        weight, scale = getattr(layer, name), getattr(layer, f"{name}_scale")
        if _holds_float8(method.quant_config):
            _fill_randomly(Float8Rows(as_matrix(weight), scale.data.view(-1, 1)))
            continue
        rows = quantize_rows(as_matrix(weight))
        setattr(layer, name, Parameter(rows.weight.view(weight.shape), requires_grad=False))
        scale.data.copy_(rows.scale.view(scale.shape))
    original(method, layer)


def _is_done(layer: Any) -> bool:
    """Whether this has been called with the layer before: SGLang does so at the end of every weight update too."""
    done = getattr(layer, "hapo_float8", False)
    layer.hapo_float8 = True
    return done


def _holds_float8(config: Any) -> bool:
    """Whether memory was allocated for float8: in an engine that starts without weights (`engine_config`)."""
    return config.is_checkpoint_fp8_serialized


def _fill_randomly(rows: Float8Rows) -> None:
    """Random weights. SGLang's own are 0 in float8, so that activations would be, by which its kernel divides."""
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
    scales = {f"{name}_scale" for name, parameter in parameters.items() if parameter.dtype == DTYPE}
    for name, parameter in parameters.items():
        if name in scales:
            continue
        scale = parameters.get(f"{name}_scale")
        if parameter.dtype != DTYPE or scale is None:
            served[name] = as_matrix(parameter)
            continue
        # Experts are as they came, and other weights transposed.
        weight = as_matrix(parameter if parameter.ndim == 3 else parameter.t())
        served[name] = Float8Rows(weight, scale.detach().view(-1, 1))
    return served
