"""The quantile baseline: its two regimes, other rewards, and the edge of a quantile."""

from __future__ import annotations

import pytest
import torch

from megatron_hapo.algorithm.methods.qae import group_quantile_advantage


def advantages(rewards: list[float], quantile: float, **options: bool) -> list[float]:
    values = torch.tensor(rewards, dtype=torch.float64)
    ones = torch.ones(len(rewards), dtype=torch.int64)
    return group_quantile_advantage(values, ones, 0 * ones, quantile=quantile, **options).tolist()


@pytest.mark.parametrize(
    ("right", "baseline"),
    [(1, 0), (5, 0), (6, 0), (7, 1), (9, 1)],  # K = 0.4: hard up to a share of 0.6
)
def test_hard_prompts_teach_by_right_responses_and_easy_ones_by_wrong(right, baseline):
    rewards = [1.0] * right + [0.0] * (10 - right)
    std = float(torch.tensor(rewards, dtype=torch.float64).std())
    want = [(reward - baseline) / (std + 1e-6) for reward in rewards]
    assert advantages(rewards, 0.4) == pytest.approx(want)
    assert sum(advantage != 0 for advantage in advantages(rewards, 0.4)) == (right if baseline == 0 else 10 - right)


def test_the_baseline_is_a_reward_of_the_group():
    """The smallest reward that at least 40% of five do not exceed: the second."""
    assert advantages([0.3, -1.0, 0.1, 1.0, 0.2], 0.4, norm_by_std=False) == pytest.approx([0.2, -1.1, 0, 0.9, 0.1])
    assert advantages([0.0, 1.0, 2.0], 0.01, norm_by_std=False) == [0, 1, 2]
    assert advantages([0.0, 1.0, 2.0], 0.99, norm_by_std=False) == [-2, -1, 0]


def test_equal_rewards_and_single_responses_teach_nothing():
    assert advantages([1.0, 1.0, 1.0], 0.4) == [0, 0, 0]
    assert advantages([1.0], 0.4) == [0]


def test_groups_do_not_mix():
    rewards = torch.tensor([1.0, 0.0, 5.0, 7.0])
    ones, groups = torch.ones(4, dtype=torch.int64), torch.tensor([0, 0, 1, 1])
    got = group_quantile_advantage(rewards, ones, groups, quantile=0.4, norm_by_std=False)
    assert got.tolist() == [1, 0, 0, 2]
