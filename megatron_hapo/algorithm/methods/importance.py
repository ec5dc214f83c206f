"""Truncated importance sampling: corrects for tokens having been sampled by the engine, not by the trainer's policy.

    w = pi_old(o_t) / pi_engine(o_t),   pi_engine at the temperature T_t that sampled the token

The numerator is at the base temperature, that of the trained policy, so w corrects the adaptive temperature as well as
the engine's arithmetic. A response's weight is the product over its tokens. `clip` takes min(w, max_weight); `mask`
gives weight 0 where w lies outside [1 / max_weight, max_weight], else w. The weight is a constant of the step.

With `level: token` and `mode: clip` this is the decoupled objective of asynchronous training, with the weight bounded:
three policies, of which the behaviour policy pi_engine sampled the token, possibly with older weights, the proximal
policy pi_old is the center of the trust region, and the current policy pi is trained.

    J = E_engine[ sum_t  pi_old / pi_engine  min( u_t A_t, clip(u_t, 1 - low, 1 + high) A_t ) ],   u_t = pi / pi_old

The weight is not negative, so multiplying A_t by it before the minimum is the same. The proximal policy is that before
the step's first update, whose log-probs the trainer computes, as in AReaL; w is 1 where engine and trainer agree and
nothing is stale. Without decoupling the ratio would be pi / pi_engine, and its clipping would hold the policy to the
older weights. The objective has no bound on w; AReaL's implementation drops tokens above one, `mask` also those below
another.

Sources: "Your efficient RL framework secretly brings you off-policy RL training" (Yao et al. 2025, token level, clip);
sequence level and masks as in later work on the same mismatch, "When speed kills stability" (Liu et al. 2025). The
decoupled objective: "Batch size-invariance for policy optimization" (Hilton et al., arXiv:2110.00641); for asynchronous
training of LLMs AReaL, arXiv:2505.24298, "decoupled PPO objective".
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

from megatron_hapo.algorithm.part import Part
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.loss import MAX_LOG_RATIO
from megatron_hapo.types import TokenScores, TrainBatch


class ImportanceCorrection(Part):
    """`importance_weights` of the trainer's old log-probs against the engine's."""

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.importance_correction.level != "none"

    def token_weights(self, batch: TrainBatch, scores: TokenScores) -> Tensor:
        correction = self.algorithm.importance_correction
        assert correction.level != "none", "not enabled"
        return importance_weights(
            torch.from_numpy(scores.log_probs),
            torch.from_numpy(batch.rollout_log_probs),
            torch.from_numpy(batch.response_lengths),
            level=correction.level,
            mode=correction.mode,
            max_weight=correction.max_weight,
        )


def importance_weights(
    old_log_probs_N: Tensor,
    rollout_log_probs_N: Tensor,
    lengths_B: Tensor,
    *,
    level: Literal["token", "sequence"],
    mode: Literal["clip", "mask"],
    max_weight: float,
) -> Tensor:
    """Weight of each token's loss. [N] float32

    Args:
        old_log_probs_N: [N], the trainer's, before the step's first update, at the base temperature.
        rollout_log_probs_N: [N], the engine's, at each token's own temperature.
        lengths_B: [B] int64, response tokens.
    Raises:
        ValueError: max_weight is less than 1.
    """
    if max_weight < 1:
        raise ValueError(f"max_weight must be at least 1, got {max_weight}")
    log_weight_N = old_log_probs_N.double() - rollout_log_probs_N.double()
    match level:
        case "token":
            pass
        case "sequence":
            rows_N = torch.arange(len(lengths_B)).repeat_interleave(lengths_B)
            sums_B = torch.zeros(len(lengths_B), dtype=torch.float64).index_add_(0, rows_N, log_weight_N)
            log_weight_N = sums_B[rows_N]
        case _:
            assert_never(level)
    weights_N = log_weight_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    match mode:
        case "clip":
            return weights_N.clamp_max(max_weight).float()
        case "mask":
            inside_N = (weights_N <= max_weight) & (weights_N >= 1 / max_weight)
            return weights_N.where(inside_N, 0).float()
        case _:
            assert_never(mode)
