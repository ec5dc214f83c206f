from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import megatron_hapo.loss
from megatron_hapo.algorithm.microbatches import MicroBatch
from megatron_hapo.algorithm.objective import policy_loss
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.entropy import entropy_modulation, entropy_stats
from megatron_hapo.loss import MAX_LOG_RATIO, adaptive_clip_range, redistribute_advantage
from megatron_hapo.types import Sign
from tests import golden

SIGNS: dict[str, Sign] = {"ref": "reference", "signed": "signed"}
POLICY_VARIANTS = [
    (case, sign) for case in golden.cases("pol") for sign in SIGNS if f"pol:{case}:{sign}:pg_loss" in golden.load()
]
CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}


def hapo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    h: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_alpha: float = 1.0,
    adv_beta: float = 1.0,
    dual_clip: float = 10.0,
    num_tokens: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of HAPO's settings and its sums, which `loss.hapo_loss` must equal bit for bit.

    An alpha or beta of 0 switches that part off.
    """
    default, empty = AlgorithmConfig(), torch.zeros(0, dtype=torch.int64)
    changes: dict[str, Any] = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "adaptive_clip": default.adaptive_clip.model_copy(update={"enabled": clip_alpha != 0, "alpha": clip_alpha}),
        "redistribution": default.redistribution.model_copy(update={"enabled": adv_beta != 0, "beta": adv_beta}),
    }
    microbatch = MicroBatch(
        rows=[], sequence_lengths=[], num_response_tokens=len(log_probs), input_ids=empty, position_ids=empty,
        predicting_positions=empty, response_index=empty, response_rows=empty, targets=empty,
        per_token={"old_log_probs": old_log_probs, "advantages": advantages, "modulation": h},
    )  # fmt: skip
    settings = default.model_copy(update=changes)
    loss, sums = policy_loss(log_probs, empty, microbatch, settings, num_tokens=num_tokens)
    assert torch.equal(sums.pop("loss"), loss)
    public, public_sums = megatron_hapo.loss.hapo_loss(
        log_probs, old_log_probs, advantages, h, clip_low=clip_low, clip_high=clip_high, clip_alpha=clip_alpha,
        adv_beta=adv_beta, dual_clip=dual_clip, num_tokens=num_tokens,
    )  # fmt: skip
    assert torch.equal(public, loss)
    assert sums.keys() == public_sums.keys()
    assert all(torch.equal(sums[name], public_sums[name]) for name in sums)
    return public, public_sums


def loss_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Our arguments for a golden case's settings."""
    return {
        "clip_low": config["cliprange_low"],
        "clip_high": config["cliprange_high"],
        "clip_alpha": config["clip_alpha"] if config["adaptive_clip"] else 0.0,
        "adv_beta": config["adv_beta"] if config["adaptive_advantage"] else 0.0,
        "dual_clip": config["clip_ratio_c"],
    }


def aggregation_weights(mask_BT: torch.Tensor, mode: str) -> tuple[torch.Tensor, int]:
    """[N] weights on the advantages and the denominator that give the released code's aggregations."""
    rows, width = mask_BT.shape
    lengths_B1 = mask_BT.sum(1, keepdim=True)
    weights_BT, count = {
        "token-mean": (torch.ones(rows, width), int(mask_BT.sum())),
        "seq-mean-token-mean": ((1 / lengths_B1).expand(rows, width), rows),
        "seq-mean-token-sum-norm": (torch.ones(rows, width), width),
    }[mode]
    return weights_BT[mask_BT], count


def run_golden(name: str, sign: str, config: dict[str, Any], *, dtype: torch.dtype) -> dict[str, Any]:
    """Entropy to loss to gradient of a golden case through the public functions, on valid tokens only. [N]"""
    mask = golden.valid(name)
    log_probs, old, advantages, entropy = (
        golden.tensor(f"{name}:{array}")[mask].to(dtype)
        for array in ("log_prob", "old_log_prob", "advantages", "entropy")
    )
    log_probs.requires_grad_()
    stats = entropy_stats(entropy, pivot=config["entropy_pivot"], floor=golden.FLOOR)
    h = entropy_modulation(entropy, stats, sign=SIGNS[sign], floor=golden.FLOOR)
    weights, count = aggregation_weights(mask, config["loss_agg_mode"])
    arguments = loss_arguments(config)
    loss, sums = hapo_loss(log_probs, old, advantages * weights, h, **arguments, num_tokens=count)
    loss.backward()
    ratio = (log_probs.detach() - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = adaptive_clip_range(h, **CLIP | {k: arguments[k] for k in CLIP}, alpha=arguments["clip_alpha"])
    return {
        "pg_loss": loss.detach(),
        "grad_log_prob": log_probs.grad,
        "h_hat": h,
        "clip_low": low,
        "clip_high": high,
        "adv_mod": redistribute_advantage(advantages, h, ratio, low, high, beta=arguments["adv_beta"]),
        "ratio": ratio,
        "sums": {key: float(value) for key, value in sums.items()},
        "num_valid": int(mask.sum()),
    }


# ----- golden vectors


@pytest.mark.parametrize(("case", "sign"), POLICY_VARIANTS)
def test_loss_and_gradient_equal_the_released_code(case, sign):
    name = f"pol:{case}"
    mask, config = golden.valid(name), golden.settings(f"pol/{case}")
    got = run_golden(name, sign, config, dtype=torch.float32)
    want = {key: golden.tensor(f"{name}:{sign}:{key}") for key in got if key not in ("sums", "num_valid")}
    # Decided: the log-ratio is clamped, where the released code overflows to inf and has NaN gradients.
    overflows = ~want["grad_log_prob"][mask].isfinite()
    assert bool(overflows.any()) == (case == "overflow_ratio_nan")
    log_ratio = (golden.tensor(f"{name}:log_prob") - golden.tensor(f"{name}:old_log_prob"))[mask]
    clamped = log_ratio.abs() > MAX_LOG_RATIO
    assert bool(clamped.any()) == (case == "overflow_ratio_nan")
    assert (log_ratio[overflows] > 88).all()

    golden.assert_close(got["pg_loss"], want["pg_loss"])
    golden.assert_close(got["grad_log_prob"][~clamped], want["grad_log_prob"][mask][~clamped], atol=golden.GRAD_ATOL)
    assert (got["grad_log_prob"][clamped] == 0).all()
    golden.assert_close(got["ratio"][clamped], (MAX_LOG_RATIO * log_ratio[clamped].sign()).exp())
    golden.assert_close(got["ratio"][~clamped], want["ratio"][mask][~clamped])
    for key in ("h_hat", "clip_low", "clip_high", "adv_mod"):
        # A range that does not adapt is stored as one number.
        expected = want[key][mask] if want[key].dim() else want[key].expand(len(log_ratio))
        golden.assert_close(got[key], expected)


@pytest.mark.parametrize(("case", "sign"), POLICY_VARIANTS)
def test_metrics_equal_the_released_code(case, sign):
    name = f"pol:{case}"
    got = run_golden(name, sign, golden.settings(f"pol/{case}"), dtype=torch.float32)
    sums, count = got["sums"], got["num_valid"]
    golden.assert_close(
        (sums["clipped_low"] + sums["clipped_high"]) / count, golden.tensor(f"{name}:{sign}:pg_clipfrac")
    )
    golden.assert_close(sums["dual_clipped"] / count, golden.tensor(f"{name}:{sign}:pg_clipfrac_lower"))
    golden.assert_close(-sums["log_ratio"] / count, golden.tensor(f"{name}:{sign}:ppo_kl"))
    golden.assert_close(sums["ratio"], float(got["ratio"].sum()))


@pytest.mark.parametrize("variant", [key.rpartition(":")[0] for key in golden.load() if "_f64:pg_loss" in key])
def test_loss_and_gradient_equal_the_released_code_in_float64(variant):
    _, case, sign = variant.removesuffix("_f64").split(":")
    mask = golden.valid(f"pol:{case}")
    got = run_golden(f"pol:{case}", sign, golden.settings(f"pol/{case}"), dtype=torch.float64)
    assert got["pg_loss"].dtype == got["grad_log_prob"].dtype == torch.float64
    golden.assert_close(got["pg_loss"], golden.tensor(f"{variant}:pg_loss"), rtol=1e-8, atol=1e-12)
    golden.assert_close(got["grad_log_prob"], golden.tensor(f"{variant}:grad_log_prob")[mask], rtol=1e-8, atol=1e-12)


def test_only_the_case_without_modulation_has_no_signed_variant():
    every = {(case, sign) for case in golden.cases("pol") for sign in SIGNS}
    assert every - set(POLICY_VARIANTS) == {("dapo_plain", "signed")}
    ref, signed = (
        run_golden("pol:dapo_plain", sign, golden.settings("pol/dapo_plain"), dtype=torch.float64) for sign in SIGNS
    )
    assert torch.equal(ref["pg_loss"], signed["pg_loss"])
    assert torch.equal(ref["grad_log_prob"], signed["grad_log_prob"])


def layout_losses(sign: str, rows: int, *, global_statistics: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient [B, T] of the `layout` mini-batch, cut into micro-batches of this many rows."""
    config = golden.settings("pol/full")
    mask, entropy = golden.valid("layout"), golden.tensor("layout:entropy")
    log_probs = golden.tensor("layout:log_prob").clone().requires_grad_()
    step_stats = entropy_stats(entropy[mask], pivot=config["entropy_pivot"], floor=golden.FLOOR)
    total = torch.tensor(0.0)
    for start in range(0, len(mask), rows):
        part = slice(start, start + rows)
        keep = mask[part]
        own_stats = entropy_stats(entropy[part][keep], pivot=config["entropy_pivot"], floor=golden.FLOOR)
        stats = step_stats if global_statistics else own_stats
        loss, _ = hapo_loss(
            log_probs[part][keep],
            golden.tensor("layout:old_log_prob")[part][keep],
            golden.tensor("layout:advantages")[part][keep],
            entropy_modulation(entropy[part][keep], stats, sign=SIGNS[sign], floor=golden.FLOOR),
            **loss_arguments(config),
            num_tokens=int(mask.sum()) if global_statistics else int(keep.sum()),
        )
        total = total + (loss if global_statistics else loss * len(keep) / len(mask))
    total.backward()
    assert log_probs.grad is not None
    return total.detach(), log_probs.grad


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_micro_batches_do_not_change_the_loss(sign, rows):
    """Decided: statistics and denominator are the mini-batch's; the released code's are each micro-batch's."""
    loss, grad = layout_losses(sign, rows, global_statistics=True)
    golden.assert_close(loss, golden.tensor(f"layout:{sign}:mb8:pg_loss"))
    mask = golden.valid("layout")
    want = golden.tensor(f"layout:{sign}:mb8:grad_log_prob")
    golden.assert_close(grad[mask], want[mask], atol=golden.GRAD_ATOL)
    assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("rows", [8, 4, 2])
def test_the_released_codes_micro_batches_can_be_reproduced(sign, rows):
    """Its statistics and token mean are each micro-batch's own, weighted by rows."""
    loss, grad = layout_losses(sign, rows, global_statistics=False)
    mask = golden.valid("layout")
    golden.assert_close(loss, golden.tensor(f"layout:{sign}:mb{rows}:pg_loss"))
    want = golden.tensor(f"layout:{sign}:mb{rows}:grad_log_prob")
    golden.assert_close(grad[mask], want[mask], atol=golden.GRAD_ATOL)


# ----- by hand


def test_hand_worked_clip_ranges():
    low, high = adaptive_clip_range(torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]), clip_low=0.2, clip_high=0.3, alpha=0.5)
    torch.testing.assert_close(low, torch.tensor([0.3, 0.25, 0.2, 0.2, 0.2]))
    torch.testing.assert_close(high, torch.tensor([0.3, 0.3, 0.3, 0.375, 0.45]))


def test_hand_worked_redistribution():
    """Ranges of 0.2: the neutral zone is the open interval (0.9, 1.1)."""
    h = torch.tensor([0.5, 0.5, -0.5, -0.5, -1.0, 0.0])
    ratio = torch.tensor([1.0, 1.5, 1.0, 1.5, 1.0, 1.0])
    ranges = torch.full((6,), 0.2)
    got = redistribute_advantage(torch.full((6,), 2.0), h, ratio, ranges, ranges)
    torch.testing.assert_close(got, torch.tensor([2.0, 3.0, 1.0, 2.0, 0.0, 2.0]))
    edge = torch.tensor([0.875, 1.125], dtype=torch.float64)  # exact: the edge itself is outside
    quarter = torch.full((2,), 0.25, dtype=torch.float64)
    h = torch.full((2,), 0.5, dtype=torch.float64)
    got = redistribute_advantage(torch.ones(2, dtype=torch.float64), h, edge, quarter, quarter, beta=2.0)
    assert got.tolist() == [2.0, 2.0]


def test_hand_worked_loss_of_plain_dual_clip_ppo():
    """(A, r) to loss: free, clipped above, clipped below, and beyond the dual clip."""
    ratio = torch.tensor([1.1, 1.5, 0.5, 1.5, 0.5, 30.0])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -2.0])
    want = -1.1 - 1.2 + 0.8 + 1.5 - 0.5 + 20.0
    log_probs = ratio.log().requires_grad_()
    loss, sums = hapo_loss(log_probs, torch.zeros(6), advantages, torch.zeros(6), **CLIP, num_tokens=4)
    assert float(loss.detach()) == pytest.approx(want / 4, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([-1.1, 0, 0, 1.5, -0.5, 0]) / 4)
    assert {k: int(v) for k, v in sums.items() if k != "log_ratio"} == {
        "clipped_low": 1,
        "clipped_high": 1,
        "dual_clipped": 1,
        "ratio": int(ratio.sum()),
    }
    assert float(sums["log_ratio"]) == pytest.approx(float(ratio.log().sum()), rel=1e-6)


# ----- properties


def random_inputs(size: int = 200, *, seed: int = 0) -> list[torch.Tensor]:
    """log_probs, old_log_probs, advantages, h; float64."""
    generator = torch.Generator().manual_seed(seed)
    old, advantages = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    log_probs = old + 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)
    return [log_probs, old, advantages, torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1]


def test_gradient_is_that_of_the_ratio_alone():
    """The loss is piecewise smooth, so numerical differences agree away from the kinks; h gets no gradient."""
    log_probs, old, advantages, h = random_inputs(40)

    def loss_of(log_probs: torch.Tensor) -> torch.Tensor:
        return hapo_loss(log_probs, old, advantages, h, **CLIP, num_tokens=40)[0]

    assert torch.autograd.gradcheck(loss_of, (log_probs.clone().requires_grad_(),), eps=1e-7)
    tensors = [x.clone().requires_grad_() for x in (log_probs, old, advantages, h)]
    hapo_loss(*tensors, **CLIP, num_tokens=40)[0].backward()
    assert tensors[3].grad is None


def test_order_and_partition_do_not_change_the_loss():
    tensors = random_inputs()
    want, want_sums = hapo_loss(*tensors, **CLIP, num_tokens=200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    parts = zip(*(x[order].split(33) for x in tensors), strict=True)
    results = [hapo_loss(*part, **CLIP, num_tokens=200) for part in parts]
    torch.testing.assert_close(sum(loss for loss, _ in results), want)
    for key, value in want_sums.items():
        torch.testing.assert_close(sum(sums[key] for _, sums in results), value)


def test_the_loss_is_homogeneous_in_the_advantages():
    """Which lets other aggregations be weights on the advantages."""
    log_probs, old, advantages, h = random_inputs()
    weights = torch.rand(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    per_token = [hapo_loss(*(x[i : i + 1] for x in random_inputs()), **CLIP, num_tokens=1)[0] for i in range(200)]
    got, _ = hapo_loss(log_probs, old, advantages * weights, h, **CLIP, num_tokens=1)
    torch.testing.assert_close(got, (torch.stack(per_token) * weights).sum())


def test_switched_off_parts_leave_plain_clipping():
    log_probs, old, advantages, h = random_inputs()
    off, _ = hapo_loss(log_probs, old, advantages, h, **CLIP, clip_alpha=0, adv_beta=0, num_tokens=7)
    ratio = (log_probs - old).exp()
    plain = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).sum() / 7
    torch.testing.assert_close(off, plain)


def test_an_empty_micro_batch_has_zero_loss_that_goes_backward():
    empty = torch.zeros(0, requires_grad=True)
    loss, sums = hapo_loss(empty, *(torch.zeros(0) for _ in range(3)), **CLIP, num_tokens=5)
    loss.backward()
    assert loss == 0
    assert all(value == 0 for value in sums.values())


# ----- bad input


@pytest.mark.parametrize("count", [0, -3])
def test_a_token_count_that_is_not_positive_is_refused(count):
    with pytest.raises(ValueError, match=f"must be positive, got {count}"):
        hapo_loss(*random_inputs(), **CLIP, num_tokens=count)


@pytest.mark.parametrize("which", range(4))
def test_shapes_that_differ_are_refused(which):
    tensors = random_inputs()
    tensors[which] = tensors[which][:-1]
    with pytest.raises(ValueError, match=r"one shape, got .*\(199,\)"):
        hapo_loss(*tensors, **CLIP, num_tokens=200)
    with pytest.raises(ValueError, match=r"advantages \(200,\), h \(3,\)"):
        redistribute_advantage(*(torch.ones(size) for size in (200, 3, 200, 200, 200)))


@pytest.mark.parametrize("bound", [1.0, 0.0, math.nan])
def test_a_dual_clip_that_would_cut_free_tokens_is_refused(bound):
    with pytest.raises(ValueError, match=f"dual_clip must be greater than 1, got {bound}"):
        hapo_loss(*random_inputs(), **CLIP, dual_clip=bound, num_tokens=200)
