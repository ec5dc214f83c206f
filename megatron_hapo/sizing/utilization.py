"""Metrics of how well a step uses its hardware: padding, pipeline bubbles, idle time, MFU.

Counts follow from the batch and the layout alone; times are measured by the driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hapo.algorithm.microbatches import padded_lengths, plan_microbatches
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

    def of_batches(self, parts: Sequence[TrainBatch]) -> dict[str, float]:
        """Metrics of scoring these mini-batches and updating on them.

        `padding_share`: share of padding among the tokens that the ranks compute. `dp_imbalance`: tokens of the busiest
        data-parallel rank over the mean. `bubble_share`: share of an update in which a pipeline stage waits for its
        first micro-batch or after its last, if all stages take equally long. `model_tflops`: 10^12 operations of the
        model in scoring and updates, without recomputation.
        """
        parallel = self.config.parallel
        real = padded = slowest = 0
        bubbles = []
        for part in parts:
            plan = plan_microbatches(
                part.sequence_lengths,
                dp_size=parallel.dp,
                max_tokens=self.config.trainer.max_tokens_per_microbatch,
                multiple=parallel.pp if parallel.vpp > 1 else 1,
            )
            tokens = [[self._computed(part.sequence_lengths[rows]) for rows in rank] for rank in plan]
            of_rank = [sum(rank) for rank in tokens]
            real += int(part.sequence_lengths.sum())
            padded += sum(of_rank)
            slowest += max(of_rank) * parallel.dp
            fill = (parallel.pp - 1) / parallel.vpp
            bubbles.append(fill / (len(plan[0]) + fill))
        return {
            "utilization/padding_share": 1 - real / padded,
            "utilization/dp_imbalance": slowest / padded,
            "utilization/bubble_share": float(np.mean(bubbles)),
            "utilization/model_tflops": self._operations(parts) / 1e12,
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

    def _computed(self, lengths_B: np.ndarray) -> int:
        """Tokens of a micro-batch with these sequence lengths, including padding."""
        parallel = self.config.parallel
        multiple = parallel.tp if parallel.sequence_parallel else 1
        return int(sum(padded_lengths(lengths_B, multiple=multiple, cp_size=parallel.cp)))

    def _operations(self, parts: Sequence[TrainBatch]) -> float:
        """Model operations: a forward pass to score, and one of a reference model; a forward and a backward pass (twice
        a forward) to update."""
        lengths = np.concatenate([part.sequence_lengths for part in parts]).astype(float)
        tokens, responses = lengths.sum(), sum(part.num_response_tokens for part in parts)
        mean_of_token = float((lengths**2).sum() / tokens)
        passes = 5 if self.config.algorithm.kl.enabled else 4
        return passes * model_flops(self.shape, tokens=tokens, length=mean_of_token, response_share=responses / tokens)
