"""BAPO: clip bounds that keep positive advantages from being outweighed.

The contributions to the loss at the bounds low and high of the ratio are

    P(high) = sum over A >= 0 of min(r, high) A,    N(low) = sum over A < 0 of max(r, low) |A|

While P / N is below the target, low rises by its step up to its maximum, then high. N grows with low, so an unmet
target always raises low to its maximum first, which drops the gradient of more negative tokens.

The released code searches anew for every micro-batch (with sums over the data-parallel ranks). Decided here: the bounds
of a step follow from the ratios in the updates of the step before, so that they are known before the first micro-batch
and depend on no layout; the first step has the starting bounds. The sums of all candidates are measured in every update
and added up over the step.

Source: arXiv:2510.18927 and its released code: target 1 for P / N, low from 0.6 to 0.8, high from 1.2 to 2.0, steps of
0.05.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_hapo.algorithm.part import LossTokens, Part
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.types import TokenScores

LOW, HIGH = "bapo/low", "bapo/high"
"""State: bounds of the ratio in the next step."""


class BalancedBounds(Part):
    """The bounds in place of clip_low and clip_high; controls `bapo_low` and `bapo_high`."""

    order = -15  # other parts narrow or widen these ranges

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.bapo.enabled

    def controls(self, state: Mapping[str, float], scores: TokenScores) -> dict[str, float]:
        bapo = self.algorithm.bapo
        return {"bapo_low": state.get(LOW, bapo.low), "bapo_high": state.get(HIGH, bapo.high)}

    def next_state(
        self, state: Mapping[str, float], scores: TokenScores, updates: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        def totals(side: str, candidates: list[float]) -> list[float]:
            return [sum(update[_name(side, number)] for update in updates) for number in range(len(candidates))]

        lows, highs = self._candidates()
        low, high = balanced_bounds(
            lows, totals("negative", lows), highs, totals("positive", highs), target=self.algorithm.bapo.target
        )
        return {LOW: low, HIGH: high}

    def clip_range(self, tokens: LossTokens, low_N: Tensor, high_N: Tensor) -> tuple[Tensor, Tensor]:
        low, high = tokens.controls["bapo_low"], tokens.controls["bapo_high"]
        return torch.full_like(low_N, 1 - low), torch.full_like(high_N, high - 1)

    def sums(self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor) -> dict[str, Tensor]:
        lows, highs = self._candidates()
        ratio_N, advantages_N = ratio_N.double(), advantages_N.double()
        negative_N, positive_N = advantages_N.clamp(max=0).abs(), advantages_N.clamp(min=0)
        negatives = [(ratio_N.clamp(min=low) * negative_N).sum() for low in lows]
        positives = [(ratio_N.clamp(max=high) * positive_N).sum() for high in highs]
        return {_name("negative", number): value for number, value in enumerate(negatives)} | {
            _name("positive", number): value for number, value in enumerate(positives)
        }

    def _candidates(self) -> tuple[list[float], list[float]]:
        bapo = self.algorithm.bapo
        return steps(bapo.low, bapo.low_max, bapo.low_step), steps(bapo.high, bapo.high_max, bapo.high_step)


def _name(side: str, number: int) -> str:
    return f"measured/bapo_{side}_{number}"


def steps(start: float, end: float, step: float) -> list[float]:
    """start, start + step, ... and end."""
    count = int((end - start) / step + 1e-9)
    values = [start + number * step for number in range(count + 1)]
    return [*values[:-1], end] if end - values[-1] < 1e-9 else [*values, end]


def balanced_bounds(
    lows: Sequence[float],
    negatives: Sequence[float],
    highs: Sequence[float],
    positives: Sequence[float],
    *,
    target: float,
) -> tuple[float, float]:
    """The first bounds (low, high) at which P / N reaches the target; the last ones if none does.

    Args:
        lows, highs: candidates in ascending order.
        negatives, positives: N and P at each of them.
    """
    low = next((i for i, negative in enumerate(negatives) if positives[0] >= target * negative), len(lows) - 1)
    high = next((i for i, positive in enumerate(positives) if positive >= target * negatives[low]), len(highs) - 1)
    return lows[low], highs[high]
