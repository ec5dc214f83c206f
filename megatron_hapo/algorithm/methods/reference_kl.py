"""KL to a reference model: a per-token estimate of KL(policy || reference), as a term of the loss or of the reward.

With d_t = log pi(o_t) - log pi_ref(o_t) of a sampled token, both at the base temperature (with top-p or top-k in
training, both among the tokens that the sampler kept):

    k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d

    loss:    L = L_policy + beta (mean of k_t over the tokens)
    reward:  R_i' = R_i - beta sum_t k_t(o_it), before the advantages

k1 and k3 are unbiased estimates of the KL, k2 is not; k2 and k3 are never negative, and vary less.

What an estimate does as a regularizer depends on where it is. With tokens sampled from pi,

    k1, reward   the gradient of KL(pi || pi_ref), as a policy gradient
    k2, loss     d grad(log pi): the same gradient on average
    k3, loss     (1 - pi_ref / pi) grad(log pi): on average the gradient of KL(pi_ref || pi), the other direction; equal
                 to the first two to first order in d. GRPO's choice
    k1, loss     grad(log pi), whatever the reference is, and zero on average; refused by the settings
    k2 and k3, reward: penalties of another shape; their policy gradient is not that of the KL

Decided here. Loss: k of the policy being updated; the mean has the token weights of the policy's loss (the method's
aggregation, token filter, importance correction), as in GRPO, and no importance ratio between mini-batches. Reward: k
of the policy before the step's first update. All methods of this package give a response one advantage, so there is no
reward of a token from which to subtract: the penalties of a response's tokens are summed into its reward, as the
sequence's log-ratio is in Ziegler et al. The sum is not divided by the length.

The coefficient beta may follow a target: see `adapted_coefficient`.

Sources: for the estimates, J. Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html, 2020); for their
gradients, Liu et al., "Rethinking KL regularization in RLHF", arXiv:2510.01555; for k3 in the loss, DeepSeekMath,
arXiv:2402.03300, equations 3 and 4; for the reward and for beta, Ziegler et al., arXiv:1909.08593, section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor

from megatron_hapo.algorithm.part import LossTokens, Part
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.loss import MAX_LOG_RATIO
from megatron_hapo.types import TokenScores, TrainBatch

Estimator = Literal["k1", "k2", "k3"]
LARGEST_RELATIVE_ERROR = 0.2
"""The adaptive coefficient takes the KL's relative distance from its target as at most this."""


COEFFICIENT, STARTED_FROM = "reference_kl/coefficient", "reference_kl/started_from"
"""State: beta of the next step, and `algorithm.kl.coefficient` at the first, so that another one begins anew."""


class ReferenceKl(Part):
    """The KL in the loss or in the reward; per-token data: `reference_log_probs`; control `kl_coefficient`: beta."""

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.kl.enabled

    def controls(self, state: Mapping[str, float], scores: TokenScores) -> dict[str, float]:
        return {"kl_coefficient": self._coefficient(state)}

    def next_state(
        self, state: Mapping[str, float], scores: TokenScores, updates: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        kl = self.algorithm.kl
        if kl.target is None:
            return {}
        coefficient = adapted_coefficient(
            self._coefficient(state), mean_kl(scores), target=kl.target, horizon=kl.horizon
        )
        return {COEFFICIENT: coefficient, STARTED_FROM: kl.coefficient}

    def rewards(self, batch: TrainBatch, scores: TokenScores, rewards_B: Tensor) -> Tensor:
        kl = self.algorithm.kl
        if kl.where != "reward":
            return rewards_B
        lengths_B = torch.from_numpy(batch.response_lengths)
        sums_B = response_kl(*_log_probs(scores), lengths_B, estimator=kl.estimator)
        return rewards_B - batch.controls["kl_coefficient"] * sums_B

    def token_data(self, batch: TrainBatch, scores: TokenScores) -> dict[str, Tensor]:
        return {"reference_log_probs": _log_probs(scores)[1]}

    def loss_term(self, tokens: LossTokens) -> Tensor | None:
        kl, microbatch = self.algorithm.kl, tokens.microbatch
        if kl.where != "loss":
            return None
        kl_N = kl_estimate(tokens.log_probs, microbatch["reference_log_probs"], estimator=kl.estimator)
        weights_N = microbatch.get("weights")
        return tokens.controls["kl_coefficient"] * (kl_N if weights_N is None else kl_N * weights_N).sum()

    def sums(self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor) -> dict[str, Tensor]:
        kl_N = kl_estimate(tokens.log_probs.detach(), tokens.microbatch["reference_log_probs"], estimator="k3")
        return {"kl": kl_N.sum()}

    def _coefficient(self, state: Mapping[str, float]) -> float:
        kl = self.algorithm.kl
        follows = kl.target is not None and state.get(STARTED_FROM) == kl.coefficient
        return state[COEFFICIENT] if follows else kl.coefficient


def mean_kl(scores: TokenScores) -> float:
    """KL of the policy before the step's first update, nats: the mean of k3 over the step's tokens, in float64.

    k3 whatever estimator regularizes: it is unbiased, and never negative.
    """
    log_probs_N, reference_N = (values_N.double() for values_N in _log_probs(scores))
    return float(kl_estimate(log_probs_N, reference_N, estimator="k3").mean())


def _log_probs(scores: TokenScores) -> tuple[Tensor, Tensor]:
    """The policy's before the step's first update, and the reference's, [N] each."""
    assert scores.reference_log_probs is not None, "algorithm.kl needs the reference model's log-probs"
    return torch.from_numpy(scores.log_probs), torch.from_numpy(scores.reference_log_probs)


def kl_estimate(log_probs_N: Tensor, reference_log_probs_N: Tensor, *, estimator: Estimator) -> Tensor:
    """The estimate of each token's KL(policy || reference), differentiable in log_probs. [N], nats

    The exponent of k3 is clamped to +-MAX_LOG_RATIO.
    """
    difference_N = log_probs_N - reference_log_probs_N
    match estimator:
        case "k1":
            return difference_N
        case "k2":
            return difference_N.square() / 2
        case "k3":
            log_ratio_N = (-difference_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            return torch.expm1(log_ratio_N) - log_ratio_N
        case _:
            assert_never(estimator)


def response_kl(
    log_probs_N: Tensor, reference_log_probs_N: Tensor, lengths_B: Tensor, *, estimator: Estimator
) -> Tensor:
    """The sum of each response's estimates. [B] float64, nats

    Args:
        lengths_B: [B] int64, response tokens; their sum is N.
    """
    kl_N = kl_estimate(log_probs_N.double(), reference_log_probs_N.double(), estimator=estimator)
    rows_N = torch.arange(len(lengths_B)).repeat_interleave(lengths_B)
    return torch.zeros(len(lengths_B), dtype=torch.float64).index_add_(0, rows_N, kl_N)


def adapted_coefficient(coefficient: float, kl: float, *, target: float, horizon: int) -> float:
    """The coefficient of the next step: beta (1 + e / horizon), with e = clip(kl / target - 1, -0.2, 0.2).

    The proportional controller of Ziegler et al. Decided here: the KL is a mean over tokens, where theirs is a sum over
    a response; the gain is 1 / horizon for a step of any size, where their released code has (responses of the step) /
    (a horizon in responses). The coefficient stays positive.

    Args:
        kl: of this step, in the unit of the target: nats per token.
        horizon: in steps.
    """
    error = min(max(kl / target - 1, -LARGEST_RELATIVE_ERROR), LARGEST_RELATIVE_ERROR)
    return coefficient * (1 + error / horizon)
