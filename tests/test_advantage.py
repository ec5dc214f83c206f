from __future__ import annotations

import math

import pytest
import torch

from megatron_hapo.advantage import group_mean_advantage, token_level_group_average
from megatron_hapo.reward.scorers import overlong_penalty
from tests import golden

ADVANTAGES = (token_level_group_average, group_mean_advantage)


def golden_inputs(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = golden.load()[f"{case}:index"].tolist()
    groups = torch.tensor([sorted(set(index)).index(name) for name in index])
    mask_of = case if f"{case}:mask" in golden.load() else f"pol:{case}"
    return golden.tensor(f"{case}:reward"), golden.valid(mask_of).sum(1), groups


def on_tokens(advantages_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    return advantages_B[:, None].expand(mask_BT.shape)[mask_BT]


# ----- golden vectors


@pytest.mark.parametrize("case", golden.cases("adv"))
def test_token_level_group_average_equals_the_golden_values(case):
    """Against the derived target: the released formula, its fallback tested on valid tokens only."""
    rewards, lengths, groups = golden_inputs(f"adv:{case}")
    norm = golden.settings(f"adv/{case}")["norm_by_std"]
    got = token_level_group_average(rewards, lengths, groups, norm_by_std=norm)
    mask = golden.valid(f"adv:{case}")
    golden.assert_close(on_tokens(got, mask), golden.tensor(f"adv:{case}:adv_valid_only")[mask])


# Where the released code's own output differs on valid tokens, and what was decided.
DECIDED = {
    # Padding set off the fallback to (R - 0) / 1, the raw reward; unpadded the same code gives 0. Decided: 0.
    "group_of_one_padded": [0.0, 0.0],
    # |mu / sigma| >= 5 at padded cells set off the fallback (0.5, -1.5); unpadded -1.732. Decided: as unpadded.
    "pad_triggers_fallback": [3**-0.5, 3**-0.5, 3**-0.5, -(3**0.5)],
}


@pytest.mark.parametrize("case", golden.cases("adv"))
def test_the_released_code_agrees_but_for_the_decided_cases(case):
    rewards, lengths, groups = golden_inputs(f"adv:{case}")
    got = token_level_group_average(rewards, lengths, groups)
    mask = golden.valid(f"adv:{case}")
    released = golden.tensor(f"adv:{case}:adv_hapo_masked")[mask]
    if case not in DECIDED:
        golden.assert_close(on_tokens(got, mask), released)
        return
    assert not torch.allclose(on_tokens(got, mask), released, rtol=1e-3)
    golden.assert_close(got, torch.tensor(DECIDED[case]), rtol=1e-4)


def test_decided_cases_exist():
    assert set(DECIDED) <= set(golden.cases("adv"))


@pytest.mark.parametrize("case", golden.cases("adv"))
def test_group_mean_advantage_equals_the_released_code(case):
    rewards, lengths, groups = golden_inputs(f"adv:{case}")
    got = group_mean_advantage(rewards, lengths, groups)
    mask = golden.valid(f"adv:{case}")
    if case.startswith("group_of_one"):
        assert (got == 0).all()  # decided; the released code takes mean 0 and deviation 1, hence the raw reward
    else:
        golden.assert_close(on_tokens(got, mask), golden.tensor(f"adv:{case}:adv_grpo")[mask])


def test_advantages_of_the_end_to_end_case_equal_the_golden_values():
    rewards, lengths, groups = golden_inputs("e2e")
    mask = golden.valid("pol:e2e")
    got = token_level_group_average(rewards, lengths, groups)
    golden.assert_close(on_tokens(got, mask), golden.tensor("pol:e2e:advantages")[mask])


@pytest.mark.parametrize("case", golden.cases("overlong"))
def test_overlong_penalty_equals_the_golden_values(case):
    config = golden.settings(f"overlong/{case}")
    lengths, penalties = golden.tensor(f"overlong:{case}:length"), golden.tensor(f"overlong:{case}:penalty")
    for length, penalty in zip(lengths.tolist(), penalties.tolist(), strict=True):
        got = overlong_penalty(
            length,
            max_response_tokens=config["max_resp_len"],
            buffer_tokens=config["buffer"],
            factor=config["factor"],
        )
        assert got == pytest.approx(penalty, rel=1e-8, abs=1e-12)


# ----- by hand


def test_hand_worked_token_level_average():
    """mu = (3 x 1 + 1 x 0) / 4 = 3/4, sigma = sqrt(3)/4; longer responses weigh more."""
    got = token_level_group_average(torch.tensor([1.0, 0.0]), torch.tensor([3, 1]), torch.tensor([0, 0]))
    golden.assert_close(got, torch.tensor([3**-0.5, -(3**0.5)]))
    plain = token_level_group_average(
        torch.tensor([1.0, 0.0]), torch.tensor([3, 1]), torch.tensor([0, 0]), norm_by_std=False
    )
    golden.assert_close(plain, torch.tensor([0.25, -0.75]))


def test_hand_worked_group_mean():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    got = group_mean_advantage(rewards, torch.tensor([1, 5, 9, 2]), torch.zeros(4, dtype=torch.long))
    golden.assert_close(got, torch.tensor([1.5, -0.5, -0.5, -0.5]))


def test_the_fallback_starts_at_its_bound():
    """One token right of n: |A| = sqrt(n - 1), below 5 at 26 (the eps in the denominator) and above at 27."""
    for size, falls_back in ((26, False), (27, True)):
        rewards = torch.zeros(size)
        rewards[0] = 1
        args = rewards, torch.ones(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
        got = token_level_group_average(*args)
        golden.assert_close(got[0], (size - 1) / size**0.5 if falls_back else (size - 1) ** 0.5)
        assert torch.equal(got, group_mean_advantage(*args)) == falls_back
        assert token_level_group_average(*args, fallback=math.inf)[0] == pytest.approx((size - 1) ** 0.5, rel=1e-4)


# ----- properties


def random_groups(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(40) // 8
    rewards = torch.randn(40, generator=generator).round(decimals=1)
    return rewards, torch.randint(1, 900, (40,), generator=generator), groups


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_order_of_responses_and_names_of_groups_do_not_matter(advantage):
    rewards, lengths, groups = random_groups()
    want = advantage(rewards, lengths, groups)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(advantage(rewards[order], lengths[order], groups[order]), want[order])
    assert torch.equal(advantage(rewards, lengths, 1000 - 7 * groups), want)
    alone = torch.cat([advantage(rewards[groups == g], lengths[groups == g], groups[groups == g]) for g in range(5)])
    assert torch.equal(alone, want)


def test_token_advantages_of_a_group_sum_to_zero_and_have_unit_variance():
    rewards, lengths, groups = random_groups()
    got = token_level_group_average(rewards.double(), lengths, groups)
    assert got.dtype == torch.float64
    for group in range(5):
        rows = groups == group
        assert float((got * lengths)[rows].sum()) == pytest.approx(0, abs=1e-9)
        assert float((got**2 * lengths)[rows].sum() / lengths[rows].sum()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("norm", [True, False])
def test_equal_rewards_and_groups_of_one_give_exactly_zero(advantage, norm):
    rewards = torch.tensor([0.1] * 7 + [0.3])  # 0.1 is no binary fraction, so its mean is rounded
    lengths = torch.tensor([3, 7, 11, 13, 17, 19, 23, 5])
    groups = torch.tensor([0] * 7 + [1])
    assert (advantage(rewards, lengths, groups, norm_by_std=norm) == 0).all()


def test_responses_without_tokens_have_no_part():
    rewards, groups = torch.tensor([1.0, 0.0, 50.0]), torch.zeros(3, dtype=torch.long)
    got = token_level_group_average(rewards, torch.tensor([3, 1, 0]), groups)
    want = token_level_group_average(rewards[:2], torch.tensor([3, 1]), groups[:2])
    assert torch.equal(got[:2], want)
    assert (token_level_group_average(rewards, torch.tensor([3, 0, 0]), groups) == 0).all()
    assert (token_level_group_average(rewards, torch.tensor([0, 0, 0]), groups) == 0).all()
    assert token_level_group_average(torch.ones(0), torch.ones(0), torch.ones(0)).shape == (0,)


# ----- bad input


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_bad_input_is_refused(advantage):
    ones, groups = torch.ones(3), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"got \(3,\), \(2,\), \(3,\)"):
        advantage(ones, ones[:2], groups)
    with pytest.raises(ValueError, match=r"1-d.*got \(1, 3\)"):
        advantage(ones[None], ones[None], groups[None])
    with pytest.raises(ValueError, match="reward of response 1 is nan; it must be finite"):
        advantage(torch.tensor([1.0, math.nan, math.inf]), ones, groups)
    with pytest.raises(ValueError, match="length of response 2 is -4; it must be at least 0"):
        advantage(ones, torch.tensor([1, 2, -4]), groups)
