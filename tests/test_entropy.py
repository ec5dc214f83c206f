from __future__ import annotations

import math

import pytest
import torch

from megatron_hapo.entropy import (
    EntropyStats,
    Sign,
    adaptive_temperature,
    entropy_from_logits,
    entropy_modulation,
    entropy_stats,
)
from tests import golden


def test_every_golden_family_has_tests():
    """Cases are parametrised from the file, so a family that nobody reads would be the only way to miss one."""
    families = {key.split(":")[0] for key in golden.load()} - {"manifest", "versions"}
    assert families == {"ent", "quantile_index", "temp", "adv", "overlong", "pol", "layout", "e2e"}
    counts = {family: len(golden.cases(family)) for family in ("ent", "temp", "adv", "overlong", "pol")}
    assert counts == {"ent": 11, "temp": 5, "adv": 12, "overlong": 1, "pol": 14}


# ----- golden vectors


def golden_entropies(case: str) -> torch.Tensor:
    """[N] valid tokens."""
    entropy = golden.tensor(f"ent:{case}:entropy")
    # Without a mask the released code takes the tokens with positive entropy.
    mask = entropy > 0 if golden.settings(f"ent/{case}")["mask"].startswith("None") else golden.valid(f"ent:{case}")
    return entropy[mask]


def golden_modulation(case: str, name: str) -> torch.Tensor:
    entropy = golden.tensor(f"ent:{case}:entropy")
    mask = entropy > 0 if golden.settings(f"ent/{case}")["mask"].startswith("None") else golden.valid(f"ent:{case}")
    return golden.tensor(f"ent:{case}:{name}")[mask]


def golden_stats(case: str) -> EntropyStats:
    entropy_N = golden_entropies(case)
    pivot = golden.settings(f"ent/{case}")["pivot"]
    if pivot < 1:
        return entropy_stats(entropy_N, pivot=pivot, floor=golden.FLOOR)
    # By decision pivot 1 is refused, since no token lies above it; the formula for h holds there as well.
    with pytest.raises(ValueError, match=r"pivot must lie in \(0, 1\), got 1.0"):
        entropy_stats(entropy_N, pivot=pivot, floor=golden.FLOOR)
    log_N = entropy_N.log()
    std = float(golden.tensor(f"ent:{case}:std"))
    return EntropyStats(float(log_N.max()), float(log_N.max()), float(log_N.min()), std, len(log_N))


@pytest.mark.parametrize("case", golden.cases("ent"))
def test_statistics_equal_the_released_code(case):
    stats = golden_stats(case)
    assert stats.num_tokens == len(golden_entropies(case))
    std = float(golden.tensor(f"ent:{case}:std"))
    golden.assert_close(stats.pivot, golden.tensor(f"ent:{case}:median"))
    # By decision rms has no lower bound; the released code's std stops at 1e-4.
    golden.assert_close(max(stats.rms, 1e-4), std)
    if stats.log_max > stats.pivot:
        golden.assert_close(std / (stats.log_max - stats.pivot), golden.tensor(f"ent:{case}:scale_pos"))
    if stats.log_min < stats.pivot:
        golden.assert_close(std / (stats.pivot - stats.log_min), golden.tensor(f"ent:{case}:scale_neg_signed"))
        golden.assert_close(std / (stats.log_min - stats.pivot), golden.tensor(f"ent:{case}:scale_neg"))


@pytest.mark.parametrize("case", golden.cases("ent"))
def test_modulation_equals_the_released_code(case):
    entropy_N, stats = golden_entropies(case), golden_stats(case)
    names: dict[Sign, str] = {"reference": "h_hat", "signed": "h_hat_signed"}
    for sign, name in names.items():
        h_N = entropy_modulation(entropy_N, stats, sign=sign, floor=golden.FLOOR)
        golden.assert_close(h_N, golden_modulation(case, name))


def test_the_pivot_is_the_released_codes_order_statistic():
    sizes, at_80, at_50 = (golden.tensor(f"quantile_index:{name}").tolist() for name in ("N", "idx80", "idx50"))
    for size, k80, k50 in zip(sizes, at_80, at_50, strict=True):
        entropy_N = torch.arange(1, size + 1, dtype=torch.float64)
        assert entropy_stats(entropy_N, pivot=0.8).pivot == pytest.approx(math.log(k80 + 1), rel=1e-12)
        assert entropy_stats(entropy_N, pivot=0.5).pivot == pytest.approx(math.log(k50 + 1), rel=1e-12)


@pytest.mark.parametrize("case", golden.cases("temp"))
def test_temperatures_equal_the_released_code(case):
    logits, base = golden.tensor(f"temp:{case}:logits"), golden.tensor(f"temp:{case}:base")
    entropy = entropy_from_logits(logits)
    golden.assert_close(entropy, golden.tensor(f"temp:{case}:entropy"), atol=2e-6)
    config = golden.settings(f"temp/{case}")
    if f"temp:{case}:median" not in golden.load() or not config["adaptive"]:
        # Nothing adapts before the first statistics exist or when it is off: tau 0 is exactly the base temperature.
        any_stats = EntropyStats(0.0, 1.0, -1.0, 1.0, 1)
        got = adaptive_temperature(entropy, base, any_stats, tau=0.0)
        assert torch.equal(got, golden.tensor(f"temp:{case}:temperature"))
        return
    median, std, above, below = (
        float(golden.tensor(f"temp:{case}:{name}")) for name in ("median", "std", "scale_pos", "scale_neg")
    )
    # The released code keeps the spreads as scales of std and adds 1e-6 to std in the sampler; here they are exact,
    # which is within the tolerance unless all entropies were equal (std at its bound 1e-4, saturated anyway).
    stats = EntropyStats(median, median + std / above, median + std / below, std, 1)
    names: dict[Sign, str] = {"reference": "temperature", "signed": "temperature_signed"}
    for sign, name in names.items():
        # The sampler's floor is 1e-6 in the released code too.
        got = adaptive_temperature(entropy, base, stats, tau=config["tau"], sign=sign, floor=1e-6)
        golden.assert_close(got, golden.tensor(f"temp:{case}:{name}"))


# ----- by hand


def test_hand_worked_statistics_and_modulation():
    entropy_N = torch.tensor([1.0, 4.0, 2.0, 16.0, 8.0]) / 4  # logs: multiples of log 2
    stats = entropy_stats(entropy_N, pivot=0.5)
    log2 = math.log(2)
    assert (stats.pivot, stats.num_tokens) == (0.0, 5)
    assert (stats.log_max, stats.log_min) == pytest.approx((2 * log2, -2 * log2))
    assert stats.rms == pytest.approx(math.sqrt(2) * log2, rel=1e-6)
    signed = entropy_modulation(entropy_N, stats)
    torch.testing.assert_close(signed, torch.tensor([-1.0, 0.0, -0.5, 1.0, 0.5]))
    assert torch.equal(entropy_modulation(entropy_N, stats, sign="reference"), signed.abs())


def test_hand_worked_temperatures():
    stats = EntropyStats(0.0, math.log(4), -math.log(4), 1.0, 5)
    entropy_R = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0, 100.0])
    got = adaptive_temperature(entropy_R, 2.0, stats, tau=0.1)
    torch.testing.assert_close(got, torch.tensor([2.2, 2.1, 2.0, 1.9, 1.8, 2.2]))
    per_row = adaptive_temperature(entropy_R, torch.full((6,), 2.0), stats, tau=0.1)
    assert torch.equal(per_row, got)


def test_unscaled_temperatures_follow_the_papers_equation_within_their_bound():
    stats = EntropyStats(pivot=0.0, log_max=math.log(4), log_min=-8.0, rms=2 * math.log(2), num_tokens=5)
    entropy_R = torch.tensor([4.0, 2.0, 1.0, 0.5, 2.0**-20])  # log H / rms: 1, 0.5, 0, -0.5, -10
    got = adaptive_temperature(entropy_R, 2.0, stats, tau=0.1, rule="z_score", floor=1e-9)
    torch.testing.assert_close(got, torch.tensor([2.2, 2.1, 2.0, 1.9, 0.2]))  # the last would be 0
    unsigned = adaptive_temperature(entropy_R, 2.0, stats, tau=0.1, rule="z_score", sign="reference", floor=1e-9)
    assert torch.equal(unsigned, got)
    assert (adaptive_temperature(entropy_R, 2.0, stats, tau=0.0, rule="z_score") == 2).all()
    flat = EntropyStats(pivot=0.0, log_max=0.0, log_min=0.0, rms=0.0, num_tokens=2)
    assert float(adaptive_temperature(torch.tensor([1.0]), 1.0, flat, tau=0.1, rule="z_score")) == 1.0


def test_entropies_below_the_floor_count_as_the_floor():
    entropy_N = torch.tensor([0.0, -1e-7, 1e-6, 1.0])
    stats = entropy_stats(entropy_N, pivot=0.5)
    assert stats.log_min == pytest.approx(math.log(1e-6))
    h_N = entropy_modulation(entropy_N, stats)
    assert h_N[0] == h_N[1] == h_N[2]


# ----- properties


def random_entropies(size: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Mostly certain, as in a language model; many exact ties.
    entropy = torch.rand(size, generator=generator).pow(8) * 6
    return torch.where(torch.rand(size, generator=generator) < 0.2, entropy.round(decimals=1), entropy)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 4097, 50_001])
def test_statistics_are_bit_identical_for_every_order_and_partition(size):
    """Catches a sum or an interpolation that depends on the order, which would make a layout visible."""
    entropy_N = random_entropies(size)
    want = entropy_stats(entropy_N)
    for seed in range(3):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        shuffled = entropy_N[order]
        assert entropy_stats(shuffled) == want
        h_N = torch.cat([entropy_modulation(part, want) for part in shuffled.split(7)])
        assert torch.equal(h_N, entropy_modulation(entropy_N, want)[order])
        parts = sorted(shuffled.split(max(1, size // 3)), key=lambda part: float(part[0]))
        assert entropy_stats(torch.cat(parts)) == want


def test_modulation_spans_its_range_and_orders_tokens_as_their_entropy():
    entropy_N = random_entropies(5000).sort().values
    stats = entropy_stats(entropy_N, pivot=0.8)
    h_N = entropy_modulation(entropy_N, stats)
    assert (h_N.min(), h_N.max()) == (-1, 1)
    assert (h_N.diff() >= 0).all()
    assert (h_N[entropy_N.log() == stats.pivot] == 0).all()
    assert (h_N > 0).float().mean() == pytest.approx(0.2, abs=0.01)


def test_modulation_is_clamped_outside_the_statistics():
    stats = EntropyStats(0.0, 1.0, -1.0, 1.0, 2)
    far_N = torch.tensor([1e-30, 1e30])
    assert entropy_modulation(far_N, stats).tolist() == [-1, 1]
    assert entropy_modulation(far_N, stats, sign="reference").tolist() == [1, 1]


def test_equal_entropies_give_zero():
    entropy_N = torch.full((9,), 0.37)
    stats = entropy_stats(entropy_N)
    assert stats.rms == 0
    assert (entropy_modulation(entropy_N, stats) == 0).all()
    assert (adaptive_temperature(entropy_N, 1.0, stats, tau=0.5) == 1).all()


def test_precision_and_shape_follow_the_entropies_and_no_gradient_flows():
    entropy = random_entropies(12).double().reshape(3, 4).requires_grad_()
    stats = entropy_stats(entropy)
    h = entropy_modulation(entropy, stats)
    assert (h.dtype, h.shape, h.requires_grad) == (torch.float64, (3, 4), False)
    log = entropy.detach().clamp_min(1e-6).log()
    want = torch.where(
        log > stats.pivot,
        (log - stats.pivot) / (stats.log_max - stats.pivot),
        (log - stats.pivot) / (stats.pivot - stats.log_min),
    )
    torch.testing.assert_close(h, want, rtol=1e-12, atol=0)
    assert entropy_modulation(entropy.bfloat16(), stats).dtype == torch.float32


def test_entropy_from_logits_knows_forbidden_tokens():
    logits = torch.tensor([[0.0, 0.0, -torch.inf, 0.0, 0.0], [0.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf]])
    torch.testing.assert_close(entropy_from_logits(logits), torch.tensor([math.log(4), 0.0]))


# ----- bad input


@pytest.mark.parametrize("pivot", [0.0, 1.0, -0.1, 80.0, math.nan])
def test_a_pivot_outside_its_range_is_refused(pivot):
    with pytest.raises(ValueError, match=rf"pivot must lie in \(0, 1\), got {pivot}"):
        entropy_stats(torch.ones(3), pivot=pivot)


@pytest.mark.parametrize("tau", [-0.1, 1.0, 5.0, math.nan])
def test_a_tau_outside_its_range_is_refused(tau):
    with pytest.raises(ValueError, match=rf"tau must lie in \[0, 1\), got {tau}"):
        adaptive_temperature(torch.ones(3), 1.0, EntropyStats(0.0, 1.0, -1.0, 1.0, 1), tau=tau)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_entropy_that_is_not_finite_is_named(value):
    entropy_N = torch.ones(5)
    entropy_N[3] = value
    stats = EntropyStats(0.0, 1.0, -1.0, 1.0, 1)
    for call in (
        lambda: entropy_stats(entropy_N),
        lambda: entropy_modulation(entropy_N, stats),
        lambda: adaptive_temperature(entropy_N, 1.0, stats, tau=0.1),
    ):
        with pytest.raises(ValueError, match=f"entropy of token 3 is {value}; it must be finite"):
            call()


def test_other_bad_input_is_refused():
    stats = EntropyStats(0.0, 1.0, -1.0, 1.0, 1)
    with pytest.raises(ValueError, match="at least one token"):
        entropy_stats(torch.ones(0))
    with pytest.raises(ValueError, match="floor must be positive, got 0"):
        entropy_stats(torch.ones(3), floor=0)
    with pytest.raises(ValueError, match="sign must be 'signed' or 'reference', got 'minus'"):
        entropy_modulation(torch.ones(3), stats, sign="minus")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(2,\)"):
        adaptive_temperature(torch.ones(3), torch.ones(2), stats, tau=0.1)
