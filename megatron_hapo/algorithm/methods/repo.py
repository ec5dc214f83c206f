"""REPO-R: advantages that weigh unlikely tokens more, by a strength that follows a target entropy.

    A > 0: A' = max(A (1 - zeta log pi), 0),    A < 0: A' = min(A (1 + zeta log pi), 0)

With zeta > 0, unlikely right tokens are raised more, and unlikely wrong ones are pushed down less, against the
correlation of advantages and log-probs that lowers the entropy. log pi is the policy's that is being updated, without
gradient and at least -20. zeta follows the mean entropy H of each step:

    H > target: halved, or doubled if negative;   H < target: doubled, or halved if negative

|zeta| stays in [zeta_min, zeta_max], and a halving below zeta_min turns the sign. Without a target of its own, the
target is the entropy of the first step. Decided here: H is that of the policy before the step's first update. Of the
paper's other methods, REPO-D and ADAPO (clip_high that follows the entropy) are left out: no source with their formulas
and step sizes was at hand.

Source: arXiv:2603.11682, appendix D.2, as SkyRL implements and cites it; |zeta| in [1e-4, 0.05].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_hapo.algorithm.part import LossTokens, Part, mean_entropy
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.loss import MAX_LOG_RATIO
from megatron_hapo.types import TokenScores

ZETA = "repo/zeta"
"""State: zeta of the next step."""
TARGET = "repo/target"
"""State: the entropy that zeta follows, nats; fixed by the first step."""


class RescaledAdvantages(Part):
    """`rescaled_advantages`, and the controller of their strength; control `repo_zeta`."""

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.repo.enabled

    def controls(self, state: Mapping[str, float], scores: TokenScores) -> dict[str, float]:
        return {"repo_zeta": self._zeta(state)}

    def next_state(
        self, state: Mapping[str, float], scores: TokenScores, updates: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        repo = self.algorithm.repo
        if not repo.adaptive:
            return {}
        entropy = mean_entropy(scores)
        target = state.get(TARGET, entropy) if repo.target is None else repo.target
        zeta = next_zeta(self._zeta(state), entropy, target=target, zeta_min=repo.zeta_min, zeta_max=repo.zeta_max)
        return {ZETA: zeta, TARGET: target}

    def token_advantages(
        self, tokens: LossTokens, advantages_N: Tensor, ratio_N: Tensor, low_N: Tensor, high_N: Tensor
    ) -> Tensor:
        return rescaled_advantages(advantages_N, tokens.log_probs, zeta=tokens.controls["repo_zeta"])

    def _zeta(self, state: Mapping[str, float]) -> float:
        repo = self.algorithm.repo
        return state.get(ZETA, repo.zeta) if repo.adaptive else repo.zeta


def rescaled_advantages(advantages_N: Tensor, log_probs_N: Tensor, *, zeta: float) -> Tensor:
    """A' of each token, of A's sign or 0. [N]"""
    scaled_N = zeta * log_probs_N.clamp(min=-MAX_LOG_RATIO)
    return advantages_N * (1 - advantages_N.sign() * scaled_N).clamp(min=0)


def next_zeta(zeta: float, entropy: float, *, target: float, zeta_min: float, zeta_max: float) -> float:
    """zeta of the next step.

    Args:
        entropy: mean of the step, nats.
    """
    if entropy == target:
        return zeta
    sign = 1.0 if entropy < target else -1.0
    towards = sign * zeta  # positive: it already acts towards the target
    if towards > 0:
        return sign * min(max(2 * towards, zeta_min), zeta_max)
    return sign * zeta_min if -towards / 2 < zeta_min else zeta / 2
