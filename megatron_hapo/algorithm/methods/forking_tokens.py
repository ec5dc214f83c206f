"""Forking tokens: the policy gradient of the most uncertain tokens only, here on top of DAPO.

    L = -1/N_kept sum_i sum_t [H_it >= tau] min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i)

tau is the entropy that a share rho = 0.2 of the batch's tokens reaches, N_kept the number of tokens that reach it.
Decided here: "the batch" is the step's, and the entropies are the old policy's, so that the choice depends neither on
mini-batches nor on the layout; as N_kept a mini-batch takes its tokens times the share that the step kept; all tokens
tied at tau are kept.

Source: "Beyond the 80/20 rule", arXiv:2506.01939v2, equation 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_hapo.algorithm.part import Part
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.types import TokenScores, TrainBatch


class ForkingTokens(Part):
    """`forking_weights` of the step's entropies."""

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.forking_tokens.enabled

    def token_weights(self, batch: TrainBatch, scores: TokenScores) -> Tensor:
        return forking_weights(torch.from_numpy(scores.entropies), share=self.algorithm.forking_tokens.share)


def forking_weights(entropies_N: Tensor, *, share: float = 0.2) -> Tensor:
    """Weights that turn sum / (number of tokens) into the mean over the kept tokens; 0 for the others. [N] float32

    The kept tokens are the `share` with the highest entropy, at least one.

    Raises:
        ValueError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    if not entropies_N.numel():
        return torch.zeros(0)
    # 0.2 * 5 is 1.0000000000000002: rounding must not add a token.
    count = max(1, math.ceil(share * entropies_N.numel() - 1e-9))
    threshold = entropies_N.topk(count).values[-1]
    kept_N = entropies_N >= threshold
    return kept_N.float() * (kept_N.numel() / kept_N.sum())
