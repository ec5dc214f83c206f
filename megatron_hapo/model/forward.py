"""Logits of whole sequences at any layout, to compare models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_hapo.model.build import packed_format
from megatron_hapo.model.families import Shape
from megatron_hapo.model.packed_attention import packed_params
from megatron_hapo.model.parallel_layout import ParallelLayout


@torch.no_grad()
def sequence_logits(
    model: Sequence[GPTModel], shape: Shape, layout: ParallelLayout, sequences: list[list[int]]
) -> list[Tensor] | None:
    """Logits of token sequences, packed into one micro-batch. Every rank calls it, with the same sequences.

    Returns:
        On the last pipeline stage one [length, vocabulary] tensor per sequence, without vocabulary padding. None on
        the other stages.
    """
    lengths = [len(sequence) for sequence in sequences]
    padding = -sum(lengths) % layout.sizes.tp  # sequence parallelism needs a multiple of tp
    padded = [*lengths, padding] if padding else lengths
    tokens = torch.tensor([token for sequence in sequences for token in sequence] + [0] * padding)
    positions = torch.cat([torch.arange(length) for length in padded])

    def forward_step(iterator: Any, module: torch.nn.Module):
        output = module(
            tokens[None].to(layout.device),
            positions[None].to(layout.device),
            None,
            packed_seq_params=packed_params(padded, layout.device, packed_format=packed_format(model)),
        )
        return output, lambda logits, non_loss_data=False: logits

    for chunk in model:
        chunk.eval()
    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(()) for _ in model],
        model=list(model),
        # The interleaved schedule needs as many micro-batches as there are stages; all of them are the same one.
        num_microbatches=layout.sizes.pp if len(model) > 1 else 1,
        seq_length=len(tokens),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    for chunk in model:
        chunk.train()
    if not layout.is_last_stage:
        return None
    local = collected[0][0].contiguous()
    shards = [torch.empty_like(local) for _ in range(layout.sizes.tp)]
    dist.all_gather(shards, local, group=layout.tp_group)
    return list(torch.cat(shards, dim=-1)[: sum(lengths), : shape.vocab_size].split(lengths))
