"""Archer: wide clipping and no KL for reasoning tokens, narrow clipping and KL for knowledge tokens.

A token of response i is a reasoning token if its entropy exceeds the 0.8 quantile of that response's entropies, else a
knowledge token. Everything else is DAPO's:

    L = -1/sum |o_i| sum_i sum_t min(r A, clip(r, 1 - eps_it, 1 + eps_it) A) - kl_it D_it

with eps = 0.5, kl = 0 for reasoning tokens and eps = 0.2, kl = 0.001 for knowledge tokens, D the k3 estimate of the KL.
Decided here: entropies are the old policy's; the quantile is the k-th smallest, k = round_half_even(0.8 (n - 1)),
without interpolation; a token at the quantile is a knowledge token (in the paper a reasoning token), so that a response
of equally certain tokens has no reasoning tokens; D is taken to the policy before the step's first update, as a method
of this package needs no reference model (the paper's is the starting model; `algorithm.kl` has one, for all tokens). At
the first update of a step D and its gradient are therefore zero.

Source: arXiv:2507.15778v2, section 4.1, equations 2 to 5; values from section 5.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hapo.algorithm.methods.reference_kl import kl_estimate
from megatron_hapo.algorithm.part import LossTokens, Part
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.types import TokenScores, TrainBatch


class DualConstraint(Part):
    """Clip ranges and KL by the kind of token; per-token data: `reasoning`, bool."""

    order = -10  # adaptive clipping widens the ranges that the token's kind gives

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.dual_constraint.enabled

    def token_data(self, batch: TrainBatch, scores: TokenScores) -> dict[str, Tensor]:
        entropies_N, lengths_B = torch.from_numpy(scores.entropies), torch.from_numpy(batch.response_lengths)
        return {"reasoning": reasoning_mask(entropies_N, lengths_B, quantile=self.algorithm.dual_constraint.quantile)}

    def clip_range(self, tokens: LossTokens, low_N: Tensor, high_N: Tensor) -> tuple[Tensor, Tensor]:
        wide, reasoning_N = self.algorithm.dual_constraint, tokens.microbatch["reasoning"]
        return torch.where(reasoning_N, wide.clip_low, low_N), torch.where(reasoning_N, wide.clip_high, high_N)

    def loss_term(self, tokens: LossTokens) -> Tensor:
        microbatch = tokens.microbatch
        kl_N = kl_to_old_policy(tokens.log_probs, microbatch["old_log_probs"]).where(~microbatch["reasoning"], 0)
        weights_N = microbatch.get("weights")
        return self.algorithm.dual_constraint.kl * (kl_N if weights_N is None else kl_N * weights_N).sum()


def reasoning_mask(entropies_N: Tensor, lengths_B: Tensor, *, quantile: float = 0.8) -> Tensor:
    """Whether each token's entropy exceeds the quantile of its own response. [N] bool

    Raises:
        ValueError: a quantile outside (0, 1).
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie in (0, 1), got {quantile}")
    masks = [torch.zeros(0, dtype=torch.bool)]
    for entropies in entropies_N.split(lengths_B.tolist()):
        if len(entropies):
            masks.append(entropies > entropies.kthvalue(round(quantile * (len(entropies) - 1)) + 1).values)
    return torch.cat(masks)


def kl_to_old_policy(log_probs_N: Tensor, old_log_probs_N: Tensor) -> Tensor:
    """k3 estimate of each token's KL(current || old), at least 0, differentiable in log_probs. [N]"""
    return kl_estimate(log_probs_N, old_log_probs_N, estimator="k3")
