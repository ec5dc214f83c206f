"""Runs a batch through Megatron's pipeline schedule: this rank's micro-batches, and the forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_hapo.algorithm.microbatch_plan import can_share_prompts, plan_microbatches, shared_prompts
from megatron_hapo.algorithm.microbatches import MicroBatch, pack
from megatron_hapo.logprobs.output_head import OutputHead, ScoredTokens
from megatron_hapo.model.packed_attention import PackedFormat, packed_params
from megatron_hapo.model.parallel_layout import ParallelLayout
from megatron_hapo.trainer.stage_messages import schedule_options
from megatron_hapo.types import TrainBatch


def split_into_microbatches(
    batch: TrainBatch, layout: ParallelLayout, *, max_tokens: int, sequence_parallel: bool, packed_format: PackedFormat
) -> list[MicroBatch]:
    """The micro-batches of this rank's data-parallel slice, on its device, in the order in which they run.

    Args:
        max_tokens: of a micro-batch, before context parallelism cuts it; a longer sequence gets its own.
        sequence_parallel: whether the number of tokens must be a multiple of tp.
        packed_format: see `model.build.packed_format`.
    """
    share = can_share_prompts(cp_size=layout.sizes.cp, transformer_engine=packed_format == "thd")
    prompts = shared_prompts(batch) if share else None
    plan = plan_microbatches(
        batch.sequence_lengths,
        dp_size=layout.sizes.dp,
        max_tokens=max_tokens,
        # The interleaved schedule takes micro-batches in groups of as many as there are stages.
        multiple=layout.sizes.pp if layout.sizes.vpp > 1 else 1,
        prompts=prompts,
    )
    return [
        pack(
            batch,
            rows,
            device=layout.device,
            prompts=prompts,
            multiple=layout.sizes.tp if sequence_parallel else 1,
            cp_size=layout.sizes.cp,
            cp_rank=layout.cp_rank,
        )
        for rows in plan[layout.dp_rank]
    ]


def run_microbatches(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[MicroBatch],
    layout: ParallelLayout,
    *,
    output_head: OutputHead,
    scored_tokens: Callable[[MicroBatch], ScoredTokens],
    on_scores: Callable[[Tensor, MicroBatch], Any],
    forward_only: bool,
    packed_format: PackedFormat,
) -> list[Any]:
    """What `on_scores` returns for each micro-batch, in order, on the last stage; other stages get an empty list.

    All ranks call it together. Without `forward_only`, `on_scores` returns the loss, from which gradients accumulate
    in the chunks' buffers, and what to collect.

    Args:
        chunks: wrapped in Megatron's DistributedDataParallel.
        scored_tokens: the tokens of a micro-batch that the output head scores.
        packed_format: see `model.build.packed_format`.
        on_scores: gets the output head's result, [temperatures, 2, tokens].
    """

    def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module):
        microbatch = next(iterator)
        output = model(
            microbatch.input_ids,
            microbatch.position_ids,
            None,
            packed_seq_params=packed_params(
                microbatch.sequence_lengths,
                layout.device,
                packed_format=packed_format,
                prefixes=microbatch.prefixes,
                cp_size=layout.sizes.cp,
                cp_rank=layout.cp_rank,
                routes=microbatch.routes,
            ),
            output_processor=output_head,
            output_processor_context=scored_tokens(microbatch),
        )

        def on_output(scores: Tensor, non_loss_data: bool = False) -> Any:
            result = on_scores(scores, microbatch)
            if non_loss_data:
                return result
            loss, collected = result
            return loss, torch.zeros((), dtype=torch.int, device=layout.device), collected

        return output, on_output

    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(microbatches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(microbatches),
            seq_length=max(sum(microbatch.sequence_lengths) for microbatch in microbatches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            **schedule_options(chunks, microbatches, layout),
        )
