"""REPO: advantages freed of their correlation with log-probs, by a strength that follows a target entropy.

A policy gradient lowers the entropy by the covariance of A and L = log pi - E log pi = log pi + H (the paper's theorem
1), so REPO takes a part of L out of the advantage. `form: rescaled` is REPO-R, whose part is zeta |A|:

    A > 0: A' = max(A (1 - zeta log pi), 0),    A < 0: A' = min(A (1 + zeta log pi), 0)

`form: subtracted` is the paper's general form with one strength for all tokens, A' = A - zeta L. It also acts on tokens
whose advantage is 0, and can turn signs. With zeta > 0 both raise unlikely right tokens more, and push unlikely wrong
ones down less. log pi and H are the policy's that is being updated, without gradient; log pi is at least -20. zeta
follows the mean entropy H of each step:

    H > target: halved, or doubled if negative;   H < target: doubled, or halved if negative

|zeta| stays in [zeta_min, zeta_max], and a halving below zeta_min turns the sign. Without a target of its own, the
target is the entropy of the first step. Decided here: H is that of the policy before the step's first update, and the
same controller serves both forms.

Source: arXiv:2603.11682, appendix D.2, as SkyRL implements and cites it; |zeta| in [1e-4, 0.05]. The general form as
published summaries of the paper give it.
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


class DecorrelatedAdvantages(Part):
    """Both forms, and the controller of their strength; control `repo_zeta`."""

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
        zeta = tokens.controls["repo_zeta"]
        if self.algorithm.repo.form == "rescaled":
            return rescaled_advantages(advantages_N, tokens.log_probs, zeta=zeta)
        decorrelated_N = decorrelated_advantages(advantages_N, tokens.log_probs, tokens.entropies, zeta=zeta)
        weights_N = tokens.microbatch.get("weights")  # the advantages have them; what is subtracted has not
        return decorrelated_N if weights_N is None else advantages_N + (decorrelated_N - advantages_N) * weights_N

    def _zeta(self, state: Mapping[str, float]) -> float:
        repo = self.algorithm.repo
        return state.get(ZETA, repo.zeta) if repo.adaptive else repo.zeta


def rescaled_advantages(advantages_N: Tensor, log_probs_N: Tensor, *, zeta: float) -> Tensor:
    """A' of each token, of A's sign or 0. [N]"""
    scaled_N = zeta * log_probs_N.clamp(min=-MAX_LOG_RATIO)
    return advantages_N * (1 - advantages_N.sign() * scaled_N).clamp(min=0)


def decorrelated_advantages(advantages_N: Tensor, log_probs_N: Tensor, entropies_N: Tensor, *, zeta: float) -> Tensor:
    """A - zeta (log pi + H) of each token. [N]"""
    return advantages_N - zeta * (log_probs_N.clamp(min=-MAX_LOG_RATIO) + entropies_N)


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
