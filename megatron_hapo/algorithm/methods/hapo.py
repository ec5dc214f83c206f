"""HAPO: four parts over DAPO's objective, each with a switch of its own for the paper's ablation.

| part | switch | formula |
| --- | --- | --- |
| adaptive temperature sampling | `algorithm.adaptive_temperature.enabled` | `entropy.adaptive_temperature` |
| token-level group average | `algorithm.advantage: token_level_group_average` | `advantage.token_level_group_average` |
| differential advantage redistribution | `algorithm.redistribution.enabled` | `loss.redistribute_advantage` |
| asymmetric adaptive clipping | `algorithm.adaptive_clip.enabled` | `loss.adaptive_clip_range` |

The last two read the modulation h of each token, per-token data that `EntropyModulation` provides. The entropies behind
it come from `algorithm.entropy.source`: `old`, the policy before the step's first update, which makes h a constant of
the step; `current`, the policy being updated, against the step's statistics; `micro_batch`, the released code's way,
with the statistics of each micro-batch's own current entropies, so that the result depends on the layout. h never
carries gradient.

Source: arXiv:2509.16591.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor

from megatron_hapo.advantage import token_level_group_average
from megatron_hapo.algorithm.part import GroupedRewards, LossTokens, Part
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.entropy import entropy_modulation, entropy_stats
from megatron_hapo.loss import adaptive_clip_range, redistribute_advantage
from megatron_hapo.types import AdaptiveTemperature, EntropyStats, TokenScores, TrainBatch


class AdaptiveTemperatureSampling(Part):
    """Uncertain tokens are sampled at a higher temperature, certain ones at a lower."""

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.adaptive_temperature.enabled

    def sampling(self, stats: EntropyStats) -> AdaptiveTemperature:
        entropy, settings = self.algorithm.entropy, self.algorithm.adaptive_temperature
        return AdaptiveTemperature(
            stats=stats, tau=settings.tau, rule=settings.rule, sign=entropy.sign, floor=entropy.floor
        )


class TokenLevelGroupAverage(Part):
    """Rewards are normalised over the tokens of a group, not over its responses."""

    choice = ("advantage", "token_level_group_average")

    def advantages(self, rewards: GroupedRewards) -> Tensor:
        return token_level_group_average(
            rewards.rewards, rewards.lengths, rewards.groups,
            norm_by_std=self.algorithm.norm_by_std, fallback=self.algorithm.advantage_fallback or math.inf,
        )  # fmt: skip


class EntropyModulation(Part):
    """h of each token for the parts of the loss; per-token data: `modulation`, float32."""

    order = -20  # others read it

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.redistribution.enabled or algorithm.adaptive_clip.enabled

    def token_data(self, batch: TrainBatch, scores: TokenScores) -> dict[str, Tensor]:
        assert batch.stats is not None, "the batch must carry the step's statistics"
        return {"modulation": self._modulation(torch.from_numpy(scores.entropies), batch.stats)}

    def current_token_data(self, tokens: LossTokens) -> dict[str, Tensor]:
        settings, entropies_N, stats = self.algorithm.entropy, tokens.entropies.detach(), tokens.stats
        match settings.source:
            case "old":
                return {}
            case "current":
                assert stats is not None, "entropy.source=current needs the step's statistics"
            case "micro_batch":
                if not len(entropies_N):
                    return {"modulation": entropies_N}
                stats = entropy_stats(
                    entropies_N, pivot=settings.pivot, floor=settings.floor, scale_quantile=settings.scale_quantile
                )
            case _:
                assert_never(settings.source)
        return {"modulation": self._modulation(entropies_N, stats)}

    def _modulation(self, entropies_N: Tensor, stats: EntropyStats) -> Tensor:
        settings = self.algorithm.entropy
        return entropy_modulation(entropies_N, stats, sign=settings.sign, floor=settings.floor)


class Redistribution(Part):
    """Advantages grow where uncertain tokens move and shrink where certain tokens stand still."""

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.redistribution.enabled

    def token_advantages(
        self, tokens: LossTokens, advantages_N: Tensor, ratio_N: Tensor, low_N: Tensor, high_N: Tensor
    ) -> Tensor:
        h_N, settings = tokens.microbatch["modulation"], self.algorithm.redistribution
        if settings.neutral_zone == "base":
            low_N, high_N = (torch.full_like(h_N, c) for c in (self.algorithm.clip_low, self.algorithm.clip_high))
        return redistribute_advantage(advantages_N, h_N, ratio_N, low_N, high_N, beta=settings.beta)


class AdaptiveClip(Part):
    """The clip range widens downwards for certain tokens and upwards for uncertain ones."""

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.adaptive_clip.enabled

    def clip_range(self, tokens: LossTokens, low_N: Tensor, high_N: Tensor) -> tuple[Tensor, Tensor]:
        h_N, alpha = tokens.microbatch["modulation"], self.algorithm.adaptive_clip.alpha
        return adaptive_clip_range(h_N, clip_low=low_N, clip_high=high_N, alpha=alpha)
