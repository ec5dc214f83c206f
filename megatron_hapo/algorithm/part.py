"""What a method is made of: the base class of its parts, whose hooks follow a step from sampling to the loss.

A part overrides the hooks that it needs; the others do nothing. `algorithm.methods` finds the parts, and the stages
call their hooks: `step_statistics`, `training_batch` and `minibatches` in the driver, `objective` on trainer ranks.

`B` responses, `N` response tokens: of the step in the driver, of one micro-batch on a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_hapo.algorithm.microbatches import MicroBatch
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.types import AdaptiveTemperature, EntropyStats, TokenScores, TrainBatch


@dataclass(frozen=True, kw_only=True)
class GroupedRewards:
    """What advantages are computed from: all responses of a step. Tensors on the CPU."""

    rewards: Tensor
    """[B] float64, with the overlong penalty and what the method subtracts."""
    lengths: Tensor
    """[B] int64, response tokens."""
    groups: Tensor
    """[B] int64, equal for responses to one prompt."""
    entropies: Tensor
    """[N] float32, nats, of the old policy."""


@dataclass(frozen=True, kw_only=True)
class LossTokens:
    """The response tokens of one micro-batch on one rank, as the loss sees them."""

    log_probs: Tensor
    """[N], current policy, differentiable."""
    entropies: Tensor
    """[N], current policy, nats; differentiable if an enabled part has `entropy_gradient`."""
    microbatch: MicroBatch
    """Its per-token data are those of the batch and of every `current_token_data`."""
    stats: EntropyStats | None
    """Entropy statistics of the step."""
    cp_group: dist.ProcessGroup | None
    """Ranks that hold the other tokens of the micro-batch; None without context parallelism."""
    controls: Mapping[str, float] = field(default_factory=dict)
    """What controllers set for the step's updates."""


def mean_entropy(scores: TokenScores) -> float:
    """Mean entropy of the step's tokens, nats, summed in float64."""
    return float(scores.entropies.mean(dtype=np.float64))


class Part:
    """One part of a method, made from the run's algorithm settings."""

    order: ClassVar[int] = 0
    """Parts are applied in ascending order, those of equal order by name."""
    choice: ClassVar[tuple[str, str] | None] = None
    """Setting and value that the part implements, such as ("advantage", "group_mean")."""
    entropy_gradient: ClassVar[bool] = False
    """Whether `loss_term` differentiates the entropies, as an entropy bonus does; else they are constants."""

    def __init__(self, algorithm: AlgorithmConfig):
        self.algorithm = algorithm

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        """Whether the settings ask for this part; by default, whether they have its `choice`."""
        assert cls.choice is not None, f"{cls.__name__} must have a choice or override enabled"
        setting, value = cls.choice
        return getattr(algorithm, setting) == value

    # ----- in the driver, once a step

    def sampling(self, stats: EntropyStats) -> AdaptiveTemperature | None:
        """How the previous step's statistics steer the sampler."""
        return None

    def rewards(self, batch: TrainBatch, scores: TokenScores, rewards_B: Tensor) -> Tensor:
        """The rewards from which advantages are computed, [B] float64, from those of the parts before this one.

        Args:
            batch: all responses of the step, with old log-probs and statistics.
            rewards_B: of the scorers, with the overlong penalty.
        """
        return rewards_B

    def advantages(self, rewards: GroupedRewards) -> Tensor | None:
        """The advantage of every response, [B]; the first part that answers decides."""
        return None

    def token_weights(self, batch: TrainBatch, scores: TokenScores) -> Tensor | None:
        """Weights of the tokens' losses, [N] float32, constant over the step; those of several parts are multiplied.

        Args:
            batch: all responses of the step, with advantages, old log-probs and statistics.
        """
        return None

    def token_data(self, batch: TrainBatch, scores: TokenScores) -> dict[str, Tensor]:
        """Per-token data for the part's own loss hooks, [N] float32 or bool each, by names that no other part uses."""
        return {}

    # ----- a controller, in the driver: before the step's batch is weighted, and after its last update

    def controls(self, state: Mapping[str, float], scores: TokenScores) -> dict[str, float]:
        """What a controller sets for the step's updates, by names that no other part uses; metrics `control/NAME`.

        `batch.controls` and `tokens.controls` have them in the hooks above and below.

        Args:
            state: of all controllers, as `next_state` left it after the previous step; empty before the first step.
            scores: the trainer's, before the step's first update.
        """
        return {}

    def next_state(
        self, state: Mapping[str, float], scores: TokenScores, updates: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """The controller's state after the step, by names that no other part uses; it is saved in checkpoints.

        Args:
            state, scores: as for `controls`.
            updates: metrics of each of the step's updates, with the sums `measured/NAME`.
        """
        return {}

    # ----- in the driver, once a mini-batch

    def minibatch_weights(self, lengths_B: Tensor, *, max_tokens: int) -> Tensor | None:
        """Weights of a mini-batch's tokens that turn sum / (number of tokens) into another aggregation, [N] float32.

        The first part that answers decides; None from all is the mean over tokens.

        Args:
            lengths_B: [B] int64, response tokens of each response of the mini-batch.
            max_tokens: longest response allowed.
        """
        return None

    # ----- on the trainer's ranks, for every micro-batch of an update

    def current_token_data(self, tokens: LossTokens) -> dict[str, Tensor]:
        """Per-token data that follow the policy being updated, in place of those of `token_data`; without gradient."""
        return {}

    def log_ratio(self, tokens: LossTokens) -> Tensor | None:
        """Log of the importance ratio of every token, [N], differentiable; the first part that answers decides."""
        return None

    def clip_range(self, tokens: LossTokens, low_N: Tensor, high_N: Tensor) -> tuple[Tensor, Tensor]:
        """The clip ranges, [N] each: the ratio is kept in [1 - low, 1 + high]. No gradient is taken.

        Args:
            low_N, high_N: from algorithm.clip_low and clip_high, or from the parts before this one.
        """
        return low_N, high_N

    def token_advantages(
        self, tokens: LossTokens, advantages_N: Tensor, ratio_N: Tensor, low_N: Tensor, high_N: Tensor
    ) -> Tensor:
        """The advantages, [N], from the weighted ones, the ratio and the final clip ranges. No gradient is taken."""
        return advantages_N

    def surrogate(
        self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor, low_N: Tensor, high_N: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Losses of the tokens [N], differentiable in the ratio, and the sums that `loss.clipped_surrogate` returns.

        The first part that answers decides; `algorithm.surrogate` chooses one.
        """
        return None

    def loss_term(self, tokens: LossTokens) -> Tensor | None:
        """A term that is added to the sum of the tokens' losses, before the division by their number. A scalar."""
        return None

    def sums(self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor) -> dict[str, Tensor]:
        """Further sums over the tokens, scalars, by names that no other part uses. No gradient is taken.

        NAME becomes the metric `loss/NAME`, a mean over the mini-batch's tokens; `measured/NAME` remains a sum, is no
        metric, and is read by `next_state`.
        """
        return {}
