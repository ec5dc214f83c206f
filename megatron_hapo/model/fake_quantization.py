"""Quantization-aware training: rounds a rank's linear weights, in place, to values that float8 can represent."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_hapo.model.build import named_parameters
from megatron_hapo.model.families import is_expert
from megatron_hapo.model.parallel_layout import ParallelLayout

# Embeddings, output head, norms and the experts' router are not rounded, as in modelopt's FP8 presets.
_LINEAR = re.compile(r".*\.linear_(qkv|proj|fc1|fc2)\.weight\d*")
_DTYPE = torch.float8_e4m3fn


@torch.no_grad()
def round_to_float8(model: Sequence[GPTModel], layout: ParallelLayout) -> None:
    """Round every linear weight to scale x e4m3, with scale = max |weight| / 448 over the whole Megatron matrix.

    Called after each optimizer step, this is the straight-through estimator: the gradient is that of the rounded
    weights, and the optimizer applies it to its float32 master weights, which are never rounded. Forward pass, weight
    sync, checkpoints and exports all see the rounded weights. Queries, keys and values share a scale, and so do gate
    and up, as in `megatron-hapo quantize --format fp8` and in SGLang. Rounding twice changes nothing.

    Collective: all ranks of a tp group call it together (one all-reduce there, and one in the etp group).

    Args:
        model: the rank's chunks, in bfloat16; the optimizer holds their master weights.
    """
    names, weights = zip(*((n, p) for n, p in named_parameters(model) if _LINEAR.fullmatch(n)), strict=True)
    own_max = torch.stack([_largest(weight) for weight in weights])
    dense_max, expert_max = own_max.clone(), own_max.clone()
    dist.all_reduce(dense_max, dist.ReduceOp.MAX, group=layout.tp_group)
    dist.all_reduce(expert_max, dist.ReduceOp.MAX, group=layout.etp_group)
    # The ranks of a tp group hold shards of the same dense matrix, but possibly of different experts.
    of_expert = torch.tensor([is_expert(name) for name in names], device=own_max.device)
    scales = torch.where(of_expert, expert_max, dense_max) / torch.finfo(_DTYPE).max
    for weight, scale in zip(weights, scales.clamp(min=torch.finfo(torch.float32).tiny), strict=True):
        weight.copy_((weight.float() / scale).to(_DTYPE).float() * scale)


def _largest(weight: Tensor) -> Tensor:
    """max |weight|, a float32 scalar."""
    low, high = torch.aminmax(weight)
    return torch.maximum(-low, high).float()
