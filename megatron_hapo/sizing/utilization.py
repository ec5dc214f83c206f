"""Metrics of how well a step uses its hardware: padding, pipeline bubbles, idle time, MFU.

Counts follow from the batch and the layout alone; times are measured by the driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hapo.algorithm.microbatch_plan import (
    Plan,
    SharedPrompts,
    can_share_prompts,
    computed_tokens,
    plan_microbatches,
    saved_prompts,
    shared_prompts,
)
from megatron_hapo.algorithm.microbatches import padded_lengths
from megatron_hapo.config import Config
from megatron_hapo.model.families import Shape
from megatron_hapo.sizing.throughput import model_flops
from megatron_hapo.types import TrainBatch


@dataclass(frozen=True, kw_only=True)
class Utilization:
    """Computes the utilization metrics of one run."""

    config: Config
    shape: Shape
    peak_flops: float | None
    """Peak operations per second of one trainer GPU. None if unknown, as on a CPU; MFU is then omitted."""
    transformer_engine: bool
    """Whether the trainer's layers are Transformer Engine's, which compute a prompt again for each of its responses."""

    def of_batches(self, parts: Sequence[TrainBatch]) -> dict[str, float]:
        """Metrics of scoring these mini-batches and updating on them.

        `padding_share`: share of padding among the tokens that the ranks compute. `shared_prompt_share`: share of the
        batches' tokens that need not be computed, since other responses to the same prompt share them.
        `dp_imbalance`: tokens of the busiest data-parallel rank over the mean. `bubble_share`: share of an update in
        which a pipeline stage waits for its first micro-batch or after its last, if all stages take equally long.
        `model_tflops`: 10^12 operations of the model in scoring and updates, without recomputation.
        """
        parallel = self.config.parallel
        share = can_share_prompts(cp_size=parallel.cp, transformer_engine=self.transformer_engine)
        given = computed = padded = slowest = 0
        operations, bubbles = 0.0, []
        for part in parts:
            lengths, prompts = part.sequence_lengths, shared_prompts(part) if share else SharedPrompts.none(len(part))
            plan = plan_microbatches(
                lengths,
                dp_size=parallel.dp,
                max_tokens=self.config.trainer.max_tokens_per_microbatch,
                multiple=parallel.pp if parallel.vpp > 1 else 1,
                prompts=prompts,
            )
            tokens = [[computed_tokens(rows, lengths, prompts) for rows in rank] for rank in plan]
            of_rank = [
                sum(self._padded(number, lengths[rows]) for number, rows in zip(*of, strict=True))
                for of in zip(tokens, plan, strict=True)
            ]
            given += int(lengths.sum())
            computed += sum(map(sum, tokens))
            padded += sum(of_rank)
            slowest += max(of_rank) * parallel.dp
            fill = (parallel.pp - 1) / parallel.vpp
            bubbles.append(fill / (len(plan[0]) + fill))
            operations += self._operations(part, prompts, plan)
        return {
            "utilization/padding_share": 1 - computed / padded,
            "utilization/shared_prompt_share": 1 - computed / given,
            "utilization/dp_imbalance": slowest / padded,
            "utilization/bubble_share": float(np.mean(bubbles)),
            "utilization/model_tflops": operations / 1e12,
        }

    def of_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics of a whole step, from its metrics including `time/*`; idle shares are shares of the step's time.

        `mfu`: the model's operations over the peak of the trainer's GPUs in the time of scoring and updates.
        """
        config, seconds = self.config, metrics["time/step"]
        training = metrics["time/log_probs"] + metrics["time/update"] + metrics.get("time/reference", 0.0)
        gpus = config.parallel.world_size
        if config.placement == "disaggregated" and config.replay is None:
            gpus += config.rollout.engines * config.rollout.tp
        result = {
            "utilization/trainer_idle_share": max(0.0, 1 - training / seconds),
            "utilization/tokens_per_second_per_gpu": metrics["tokens_per_second"] / gpus,
        }
        if config.replay is None:
            result["utilization/engine_idle_share"] = max(0.0, 1 - metrics["time/rollout"] / seconds)
        if self.peak_flops is not None:
            available = training * config.parallel.world_size * self.peak_flops
            result["utilization/mfu"] = 1e12 * metrics["utilization/model_tflops"] / available
        return result

    def _padded(self, computed: int, lengths_B: np.ndarray) -> int:
        """Tokens of a micro-batch that computes so many of sequences of these lengths, including padding."""
        parallel = self.config.parallel
        multiple = parallel.tp if parallel.sequence_parallel else 1
        # Context parallelism pads each sequence, and shares no prompts.
        lengths = lengths_B if parallel.cp > 1 else np.array([computed])
        return int(sum(padded_lengths(lengths, multiple=multiple, cp_size=parallel.cp)))

    def _operations(self, part: TrainBatch, prompts: SharedPrompts, plan: Plan) -> float:
        """Model operations: a forward pass to score, and one of a reference model; a forward and a backward pass (twice
        a forward) to update."""
        # A token attends to those before it: half the square of the length.
        tokens, squares = float(part.sequence_lengths.sum()), float((part.sequence_lengths.astype(float) ** 2).sum())
        for rows in (rows for rank in plan for rows in rank):
            saved = saved_prompts(rows, prompts).astype(float)
            tokens, squares = tokens - saved.sum(), squares - (saved**2).sum()
        passes = 5 if self.config.algorithm.kl.enabled else 4
        share = part.num_response_tokens / tokens
        return passes * model_flops(self.shape, tokens=tokens, length=squares / tokens, response_share=share)
