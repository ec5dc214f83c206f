"""EntroPIC: a proportional-integral controller of entropy by the weights of positive and negative samples.

Tokens with a probability above 0.95 get the weight 1 + alpha sign A in the loss, with

    alpha_k = clip(K_p (H_k - H*) + K_i sum over j < k of (H_j - H*), -1, 1)

H_k is the mean entropy of step k, H* the target. Above the target alpha is positive: likely tokens of right responses
grow faster and those of wrong ones fall slower, which lowers the entropy; below it the reverse. The released code adds
the same as a term -alpha r |A|. Decided here: the weight multiplies the clipped loss, and the sum is divided by all
tokens (there by the likely tokens of a micro-batch, so that the result depends on the layout); probabilities and
entropies are those of the policy before the step's first update, so weights are constants of the step; the integral
grows once a step (there by the share of a mini-batch with every micro-batch).

Source: arXiv:2511.15248 and its released code: K_p 1, K_i 0.01, H* 0.1 nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_hapo.algorithm.part import Part, mean_entropy
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.types import TokenScores, TrainBatch

INTEGRAL = "entropic/integral"
"""State: sum of the entropies' errors over the steps so far, nats."""


class EntropyPi(Part):
    """The controller, and the weights of likely tokens; control `entropic_alpha`."""

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.entropic.enabled

    def controls(self, state: Mapping[str, float], scores: TokenScores) -> dict[str, float]:
        entropic = self.algorithm.entropic
        alpha = entropic.proportional * self._error(scores) + entropic.integral * state.get(INTEGRAL, 0.0)
        return {"entropic_alpha": min(max(alpha, -1.0), 1.0)}

    def next_state(
        self, state: Mapping[str, float], scores: TokenScores, updates: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        return {INTEGRAL: state.get(INTEGRAL, 0.0) + self._error(scores)}

    def token_weights(self, batch: TrainBatch, scores: TokenScores) -> Tensor:
        assert batch.advantages is not None, "the batch must have advantages"
        return likely_token_weights(
            torch.from_numpy(scores.log_probs),
            torch.from_numpy(np.repeat(batch.advantages, batch.response_lengths)),
            alpha=batch.controls["entropic_alpha"],
            probability=self.algorithm.entropic.probability,
        )

    def _error(self, scores: TokenScores) -> float:
        return mean_entropy(scores) - self.algorithm.entropic.target


def likely_token_weights(log_probs_N: Tensor, advantages_N: Tensor, *, alpha: float, probability: float) -> Tensor:
    """1 + alpha sign A where the token's probability exceeds `probability`, else 1. [N] float32

    Args:
        alpha: in [-1, 1].
    """
    likely_N = log_probs_N > math.log(probability)
    return torch.where(likely_N, 1 + alpha * advantages_N.sign(), 1.0).float()
