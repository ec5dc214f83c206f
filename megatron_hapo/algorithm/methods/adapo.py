"""ADAPO: DAPO's upper clip range, which follows a target entropy.

Clipping bounds the change of a token's share of the entropy from above by 1 + clip_high (the paper's theorem 2), so a
wider range lets the entropy grow, and a narrower one holds it back. With the mean entropy H of each step:

    H < target: clip_high * factor;    H > target: clip_high / factor

It starts at algorithm.clip_high, and moves away from it by max_change times at most. Without a target of its own, the
target is the entropy of the first step, as in REPO.
The source says in which direction clip_high moves, not by how much. Decided here: by a factor, which treats both
directions alike; H is that of the policy before the step's first update, and acts from the next step on.

Source: arXiv:2603.11682 (its published summaries).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_hapo.algorithm.part import LossTokens, Part, mean_entropy
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.types import TokenScores

CLIP_HIGH = "adapo/clip_high"
"""State: clip_high of the next step."""
TARGET = "adapo/target"
"""State: the entropy that clip_high follows, nats; fixed by the first step."""


class AdaptiveClipHigh(Part):
    """The range upwards in place of clip_high; control `adapo_clip_high`."""

    order = -15  # other parts narrow or widen this range

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.adapo.enabled

    def controls(self, state: Mapping[str, float], scores: TokenScores) -> dict[str, float]:
        return {"adapo_clip_high": state.get(CLIP_HIGH, self.algorithm.clip_high)}

    def next_state(
        self, state: Mapping[str, float], scores: TokenScores, updates: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        adapo, entropy, start = self.algorithm.adapo, mean_entropy(scores), self.algorithm.clip_high
        target = state.get(TARGET, entropy) if adapo.target is None else adapo.target
        clip_high = next_clip_high(
            state.get(CLIP_HIGH, start), entropy,
            target=target, factor=adapo.factor, low=start / adapo.max_change, high=start * adapo.max_change,
        )  # fmt: skip
        return {CLIP_HIGH: clip_high, TARGET: target}

    def clip_range(self, tokens: LossTokens, low_N: Tensor, high_N: Tensor) -> tuple[Tensor, Tensor]:
        return low_N, torch.full_like(high_N, tokens.controls["adapo_clip_high"])


def next_clip_high(clip_high: float, entropy: float, *, target: float, factor: float, low: float, high: float) -> float:
    """clip_high of the next step, in [low, high].

    Args:
        entropy: mean of the step, nats.
    """
    step = factor if entropy < target else 1 / factor if entropy > target else 1.0
    return min(max(clip_high * step, low), high)
