"""The registry of methods: closed choices, an explicit order, and new methods without other edits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hapo.algorithm import methods
from megatron_hapo.algorithm.methods import enabled_parts, part_classes
from megatron_hapo.algorithm.methods.grpo import ClippedSurrogate
from megatron_hapo.algorithm.methods.hapo import Redistribution, TokenLevelGroupAverage
from megatron_hapo.algorithm.methods.importance import importance_weights
from megatron_hapo.algorithm.microbatches import pack
from megatron_hapo.algorithm.minibatches import minibatches
from megatron_hapo.algorithm.objective import policy_loss
from megatron_hapo.algorithm.part import GroupedRewards, LossTokens, Part
from megatron_hapo.algorithm.step_statistics import steering
from megatron_hapo.algorithm.training_batch import with_token_data
from megatron_hapo.config import AlgorithmConfig, BatchConfig
from megatron_hapo.types import EntropyStats, TokenScores, TrainBatch
from tests.algorithm.test_methods import as_microbatch, scored_batch, with_scores

STATS = EntropyStats(0.0, 1.0, -1.0, 1.0, 8)
CHOICES = {
    name: set(get_args(field.annotation))
    for name, field in AlgorithmConfig.model_fields.items()
    if get_origin(field.annotation) is Literal
}


def test_every_value_of_every_choice_is_implemented_by_one_part():
    implemented: dict[str, list[str]] = {name: [] for name in CHOICES}
    for part in part_classes():
        if part.choice is not None:
            implemented[part.choice[0]].append(part.choice[1])
    assert {name: sorted(values) for name, values in implemented.items()} == {
        name: sorted(values) for name, values in CHOICES.items()
    }


@pytest.mark.parametrize("setting", sorted(CHOICES))
def test_a_value_that_no_part_implements_is_refused(setting):
    """Catches a value added to the settings alone, which would train something else."""
    settings = AlgorithmConfig().model_copy(update={setting: "brand_new"})
    with pytest.raises(ValueError, match=f"algorithm.{setting}=brand_new: exactly one part .* must implement it, 0 do"):
        enabled_parts(settings)


def test_unknown_values_inside_a_part_are_refused():
    batch, scores = scored_batch()
    zeros, lengths = torch.zeros(2), torch.tensor([2])
    for level, mode in (("group", "clip"), ("token", "wrap")):
        unknown: dict[str, Any] = {"level": level, "mode": mode}
        with pytest.raises(AssertionError, match="Expected code to be unreachable"):
            importance_weights(zeros, zeros, lengths, max_weight=2.0, **unknown)
    default = AlgorithmConfig()
    settings = default.model_copy(update={"entropy": default.entropy.model_copy(update={"source": "next"})})
    scored, stats = with_scores(batch, scores, settings)
    microbatch = pack(scored, [0, 1], device=torch.device("cpu"))
    log_probs = torch.zeros(len(microbatch.targets))
    with pytest.raises(AssertionError, match="Expected code to be unreachable"):
        policy_loss(log_probs, log_probs, microbatch, settings, num_tokens=1, stats=stats)


def test_parts_are_applied_in_a_fixed_order():
    on = {"enabled": True}
    settings = AlgorithmConfig.model_validate(
        {"forking_tokens": on, "dual_constraint": on, "importance_correction": {"level": "token"}}
    )
    assert [type(part).__name__ for part in enabled_parts(settings)] == [
        "EntropyModulation",  # the others read h
        "DualConstraint",  # adaptive clipping starts from its ranges
        "TokenMean",
        "ForkingTokens",
        "TokenRatio",
        "AdaptiveClip",
        "AdaptiveTemperatureSampling",
        "Redistribution",
        "TokenLevelGroupAverage",
        "ImportanceCorrection",
        "ClippedSurrogate",  # unless another surrogate answers before it
    ]


def test_hapos_parts_follow_their_switches():
    off = {"enabled": False}
    assert steering(AlgorithmConfig(), None) is None
    wish = steering(AlgorithmConfig(), STATS)
    assert wish is not None
    assert (wish.stats, wish.tau) == (STATS, 0.05)
    assert steering(AlgorithmConfig.model_validate({"adaptive_temperature": off}), STATS) is None
    batch, scores = scored_batch()
    assert with_scores(batch, scores, AlgorithmConfig())[0].token_data.keys() == {"modulation"}
    plain = AlgorithmConfig.model_validate({"adaptive_clip": off, "redistribution": off})
    assert not with_scores(batch, scores, plain)[0].token_data


def test_the_papers_neutral_zone_is_of_the_base_clip_range():
    """With h = 1 and alpha 1, high is adapted from 0.2 to 0.4: a ratio of 1.15 moves out of the base zone alone."""
    batch, _ = scored_batch(groups=1, size=1)
    microbatch = replace(as_microbatch(batch), per_token={"modulation": torch.tensor([1.0, 0.0])})
    zeros_N = torch.zeros(2)
    tokens = LossTokens(log_probs=zeros_N, entropies=zeros_N, microbatch=microbatch, stats=None, cp_group=None)
    advantages_N, low_N, high_N = torch.ones(2), torch.full((2,), 0.2), torch.tensor([0.4, 0.2])
    results = [
        Redistribution(AlgorithmConfig.model_validate({"redistribution": {"neutral_zone": zone}})).token_advantages(
            tokens, advantages_N, torch.full((2,), 1.15), low_N, high_N
        )
        for zone in ("adapted", "base")
    ]
    assert results[0].tolist() == [1.0, 1.0]
    assert results[1].tolist() == [2.0, 1.0]


def test_without_a_fallback_a_lonely_response_keeps_its_token_level_advantage():
    rewards = GroupedRewards(
        rewards=torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), lengths=torch.tensor([1, 99, 50, 50]),
        groups=torch.zeros(4, dtype=torch.int64), entropies=torch.zeros(200),
    )  # fmt: skip
    with_fallback, without = (
        TokenLevelGroupAverage(AlgorithmConfig.model_validate(settings)).advantages(rewards)
        for settings in ({}, {"advantage_fallback": None})
    )
    assert float(with_fallback[0]) == pytest.approx(1.5, rel=1e-5)
    assert float(without[0]) == pytest.approx(math.sqrt(199), rel=1e-4)


class Rival(Part):
    """What future methods may need: tokens selected by step-wide statistics, another surrogate, an entropy bonus."""

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return True

    def token_weights(self, batch: TrainBatch, scores: TokenScores) -> Tensor:
        assert batch.advantages is not None
        advantages_N = torch.from_numpy(np.repeat(batch.advantages, batch.response_lengths))
        log_probs_N = torch.from_numpy(scores.log_probs)
        covariance_N = (log_probs_N - log_probs_N.mean()) * (advantages_N - advantages_N.mean())
        return (covariance_N < covariance_N.max()).float()

    def token_data(self, batch: TrainBatch, scores: TokenScores) -> dict[str, Tensor]:
        return {"selected": torch.from_numpy(scores.entropies) > 0.5}

    def surrogate(
        self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor, low_N: Tensor, high_N: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _, sums = ClippedSurrogate(self.algorithm).surrogate(tokens, ratio_N, advantages_N, low_N, high_N) or (0, {})
        return -ratio_N.detach().clamp_max(1.2) * advantages_N * tokens.log_probs, sums

    def loss_term(self, tokens: LossTokens) -> Tensor:
        return -0.5 * tokens.entropies.where(tokens.microbatch["selected"], 0).sum()


def test_a_new_method_is_a_part_and_nothing_else(monkeypatch):
    classes = (Rival, *part_classes())
    monkeypatch.setattr(methods, "part_classes", lambda: classes)
    settings = AlgorithmConfig.model_validate(
        {"adaptive_clip": {"enabled": False}, "redistribution": {"enabled": False}}
    )
    batch, scores = scored_batch(groups=2)
    scored = with_token_data(replace(batch, old_log_probs=scores.log_probs, stats=STATS), scores, settings)
    assert scored.weights is not None
    assert (scored.weights == 0).sum() == 1
    sizes = BatchConfig(prompts_per_step=2, samples_per_prompt=3, prompts_per_minibatch=1)
    part = minibatches(scored, settings, sizes, max_tokens=10, seed=0, step=1)[0]
    microbatch = pack(part, [2, 0], device=torch.device("cpu"))
    log_probs = (microbatch["old_log_probs"] + 0.1).requires_grad_()
    entropies = torch.ones(len(log_probs), requires_grad=True)
    loss, sums = policy_loss(log_probs, entropies, microbatch, settings, num_tokens=7)
    loss.backward()
    weighted = microbatch["advantages"] * microbatch["weights"]
    torch.testing.assert_close(log_probs.grad, -torch.full_like(weighted, 0.1).exp() * weighted / 7)
    torch.testing.assert_close(entropies.grad, -0.5 * microbatch["selected"].float() / 7)
    assert sums.keys() == {"loss", "clipped_low", "clipped_high", "dual_clipped", "log_ratio", "ratio"}


def test_two_parts_cannot_use_one_name_of_per_token_data(monkeypatch):
    class Copy(Rival):
        pass

    classes = (Rival, Copy, *part_classes())
    monkeypatch.setattr(methods, "part_classes", lambda: classes)
    batch, scores = scored_batch()
    with pytest.raises(AssertionError, match="several parts use one name"):
        with_scores(batch, scores, AlgorithmConfig())
