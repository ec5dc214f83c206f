"""What a layer consists of: Megatron's layer specs, and our own layers for the `local` spec.

That spec needs no Transformer Engine: RMSNorm here, and `packed_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_hapo.model import cpu_kernels
from megatron_hapo.model.families import Shape
from megatron_hapo.model.packed_attention import PackedAttention


def block_spec(config: TransformerConfig, shape: Shape, *, te: bool, chunk: int) -> Any:
    """Megatron's specs of the layers of a model chunk; `te`: with Transformer Engine's layers."""
    first, number = get_transformer_layer_offset(config, chunk), get_num_layers_to_build(config, chunk)
    layer_spec = _te_layer_spec if te else _local_layer_spec
    layers = [layer_spec(config, experts=shape.has_experts(layer)) for layer in range(first, first + number)]
    if te:
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _te_layer_spec(config: TransformerConfig, *, experts: bool) -> Any:
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if experts else None,
        moe_grouped_gemm=experts,
        qk_layernorm=config.qk_layernorm,
    )


def _local_layer_spec(config: TransformerConfig, *, experts: bool) -> Any:
    layer: Any = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if experts else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if experts:  # as in Transformer Engine's spec, where an expert's first linear layer has no fused norm
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


class RMSNorm(torch.nn.Module):
    """RMSNorm that supports sequence parallelism (Megatron's own torch norm does not)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradients of marked parameters over the tp ranks, each of which saw a part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The normalised and scaled input, same shape and dtype."""
        if x.is_cpu and x.dtype == torch.float32:
            return cpu_kernels.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
