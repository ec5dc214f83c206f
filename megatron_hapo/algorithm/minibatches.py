"""From the step's batch to its mini-batches, each of which is one optimizer step. Pure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_hapo.algorithm.methods import enabled_parts, first_answer
from megatron_hapo.config import AlgorithmConfig, BatchConfig
from megatron_hapo.types import TrainBatch


def minibatches(
    batch: TrainBatch, algorithm: AlgorithmConfig, sizes: BatchConfig, *, max_tokens: int, seed: int, step: int
) -> list[TrainBatch]:
    """The step's mini-batches with the token weights of the aggregation, which counts within a mini-batch.

    Args:
        batch: scored, of the whole step.
        max_tokens: longest response allowed, the constant of `sequence_mean_token_sum_norm`.
    """
    parts = [batch.select(rows) for rows in minibatch_rows(sizes, seed=seed, step=step)]
    return [_with_aggregation(part, algorithm, max_tokens) for part in parts]


def _with_aggregation(part: TrainBatch, algorithm: AlgorithmConfig, max_tokens: int) -> TrainBatch:
    weights_N = aggregation_weights(torch.from_numpy(part.response_lengths), algorithm, max_tokens=max_tokens)
    if weights_N is None:
        return part
    return replace(part, weights=weights_N.numpy() if part.weights is None else part.weights * weights_N.numpy())


def aggregation_weights(lengths_B: Tensor, algorithm: AlgorithmConfig, *, max_tokens: int) -> Tensor | None:
    """Token weights that turn sum / (number of tokens) into the aggregation, [N] float32; None if all are 1."""
    return first_answer(part.minibatch_weights(lengths_B, max_tokens=max_tokens) for part in enabled_parts(algorithm))


def minibatch_rows(batch: BatchConfig, *, seed: int, step: int) -> list[np.ndarray]:
    """Rows of each mini-batch: whole groups, in an order that depends on (seed, step) alone."""
    order = np.random.default_rng([seed % 2**64, step]).permutation(batch.prompts_per_step)
    rows = order[:, None] * batch.samples_per_prompt + np.arange(batch.samples_per_prompt)
    return [part.ravel() for part in np.split(rows, batch.prompts_per_step // batch.prompts_per_minibatch)]
