"""Clip-Cov and KL-Cov: restrain the few tokens that drive the entropy down, those with the largest covariance.

The covariance of a token is (log pi - mean log pi) (A - mean A), with means over the tokens. Clip-Cov drops the
gradient of a share of the tokens with a covariance in (lower, upper), drawn at random; KL-Cov adds coefficient
|log pi - log pi_old| to the loss of the share with the largest, and its surrogate is r A without clipping
(`surrogate: unclipped`).

The papers' code selects within each micro-batch of each GPU, by the policy being updated. Decided here: means and
selection run over all tokens of the step, by the policy before its first update, which is the current one at the first
update; so the choice depends neither on mini-batches nor on the layout, and clipped tokens, which Clip-Cov leaves out,
do not exist yet. Ties at KL-Cov's threshold are all selected. Clip-Cov's draw depends on the step's tokens alone.
KL-Cov's penalty has the weights of the tokens' losses (aggregation, corrections), as in the released code.

Source: arXiv:2505.22617, section 4; values from the released scripts: Clip-Cov 2e-4 in (1, 5), KL-Cov a share of 2e-3
(7B; 2e-4 for 32B) and a coefficient of 1, both with eps 0.2.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from megatron_hapo.algorithm.part import LossTokens, Part
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.types import TokenScores, TrainBatch


class Unclipped(Part):
    """The ratio times the advantage, without any clipping."""

    choice = ("surrogate", "unclipped")

    def surrogate(
        self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor, low_N: Tensor, high_N: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        none = torch.zeros((), dtype=torch.int64, device=ratio_N.device)
        return -ratio_N * advantages_N, {"clipped_low": none, "clipped_high": none, "dual_clipped": none}


class ClipCov(Part):
    """Weight 0 for the tokens that `drawn_tokens` selects."""

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.clip_cov.enabled

    def token_weights(self, batch: TrainBatch, scores: TokenScores) -> Tensor:
        clip_cov = self.algorithm.clip_cov
        selected_N = drawn_tokens(
            _covariance(batch), share=clip_cov.share, lower=clip_cov.lower, upper=clip_cov.upper,
            seed=zlib.crc32(batch.token_ids.tobytes()),
        )  # fmt: skip
        return (~selected_N).float()


class KlCov(Part):
    """A penalty on the tokens that `largest_tokens` selects; per-token data: `kl_cov`, bool."""

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.kl_cov.enabled

    def token_data(self, batch: TrainBatch, scores: TokenScores) -> dict[str, Tensor]:
        return {"kl_cov": largest_tokens(_covariance(batch), share=self.algorithm.kl_cov.share)}

    def loss_term(self, tokens: LossTokens) -> Tensor:
        return self.algorithm.kl_cov.coefficient * self._distances(tokens, tokens.microbatch.get("weights")).sum()

    def sums(self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor) -> dict[str, Tensor]:
        return {"kl_cov_distance": self._distances(tokens, None).detach().sum()}

    def _distances(self, tokens: LossTokens, weights_N: Tensor | None) -> Tensor:
        distance_N = (tokens.log_probs - tokens.microbatch["old_log_probs"]).abs()
        distance_N = distance_N.where(tokens.microbatch["kl_cov"], 0)
        return distance_N if weights_N is None else distance_N * weights_N


def _covariance(batch: TrainBatch) -> Tensor:
    assert batch.advantages is not None, "the batch must have advantages"
    assert batch.old_log_probs is not None, "the batch must be scored"
    advantages_N = np.repeat(batch.advantages, batch.response_lengths)
    return token_covariance(torch.from_numpy(batch.old_log_probs), torch.from_numpy(advantages_N))


def token_covariance(log_probs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """Each token's part of the covariance of log-probs and advantages over these tokens. [N] float64"""
    log_probs_N, advantages_N = log_probs_N.double(), advantages_N.double()
    return (log_probs_N - log_probs_N.mean()) * (advantages_N - advantages_N.mean())


def drawn_tokens(covariance_N: Tensor, *, share: float, lower: float, upper: float, seed: int) -> Tensor:
    """Tokens drawn at random among those with a covariance in (lower, upper): `share` of all, at least one. [N] bool

    Every token has a random rank, so a token that enters the range displaces at most one other.
    """
    count = max(int(share * len(covariance_N)), 1)
    ranks_N = torch.from_numpy(np.random.default_rng(seed).random(len(covariance_N)))
    candidates = ((covariance_N > lower) & (covariance_N < upper)).nonzero()[:, 0]
    chosen = candidates[ranks_N[candidates].argsort()[:count]]
    selected_N = torch.zeros(len(covariance_N), dtype=torch.bool)
    selected_N[chosen] = True
    return selected_N


def largest_tokens(covariance_N: Tensor, *, share: float) -> Tensor:
    """The `share` of the tokens with the largest covariance, at least one, with ties. [N] bool"""
    if not len(covariance_N):
        return torch.zeros(0, dtype=torch.bool)
    count = max(int(share * len(covariance_N)), 1)
    return covariance_N >= covariance_N.topk(count).values[-1]
