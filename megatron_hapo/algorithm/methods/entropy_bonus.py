"""Entropy bonus: the loss falls with the mean token entropy, by a fixed coefficient or by one that follows a target.

    L = L_policy - alpha_k 1/N sum H_t

Fixed: alpha_k = c. Adaptive (MAGIC in Skywork-OR1), with the mean entropy e_k of step k under the policy before its
first update:

    alpha_k = c_k [e_k <= target],   c_{k+1} = c_k + delta if e_k < target, c_k - delta if e_k > target

c stays in [0, max_coefficient]. H_t is the entropy of the policy being updated, over the whole vocabulary, and carries
gradient. Decided here: the mean runs over all tokens of the mini-batch, whatever the aggregation and the token weights
of the policy's loss; e_k is computed from distributions (the released code estimates it by -log pi of the sampled
tokens, and compares the step before); at e_k = target, c stays as it is (there it falls).

Source: arXiv:2505.22312, "Adaptive Entropy Control"; target 0.2, delta 1e-4 and bounds 0, 0.005 from the released
scripts, in which c_0 = 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_hapo.algorithm.part import LossTokens, Part, mean_entropy
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.types import TokenScores

COEFFICIENT = "entropy_bonus/coefficient"
"""State: c of the next step."""


class EntropyBonus(Part):
    """The bonus; control `entropy_coefficient`: alpha of the step."""

    entropy_gradient = True

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.entropy_bonus.enabled

    def controls(self, state: Mapping[str, float], scores: TokenScores) -> dict[str, float]:
        target = self.algorithm.entropy_bonus.target
        active = target is None or mean_entropy(scores) <= target
        return {"entropy_coefficient": self._coefficient(state) if active else 0.0}

    def next_state(
        self, state: Mapping[str, float], scores: TokenScores, updates: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        bonus = self.algorithm.entropy_bonus
        if bonus.target is None:
            return {}
        return {
            COEFFICIENT: next_coefficient(
                self._coefficient(state), mean_entropy(scores),
                target=bonus.target, delta=bonus.delta, max_coefficient=bonus.max_coefficient,
            )
        }  # fmt: skip

    def loss_term(self, tokens: LossTokens) -> Tensor:
        return -tokens.controls["entropy_coefficient"] * tokens.entropies.sum()

    def sums(self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor) -> dict[str, Tensor]:
        return {"entropy": tokens.entropies.detach().sum()}

    def _coefficient(self, state: Mapping[str, float]) -> float:
        bonus = self.algorithm.entropy_bonus
        return bonus.coefficient if bonus.target is None else state.get(COEFFICIENT, bonus.coefficient)


def next_coefficient(
    coefficient: float, entropy: float, *, target: float, delta: float, max_coefficient: float
) -> float:
    """c of the next step, in [0, max_coefficient].

    Args:
        entropy: mean of the step, nats.
    """
    step = delta if entropy < target else -delta if entropy > target else 0.0
    return min(max(coefficient + step, 0.0), max_coefficient)
