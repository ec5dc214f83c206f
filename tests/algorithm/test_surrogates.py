"""The surrogates besides PPO's clipping: values and gradients by hand, and their place in the loss."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_hapo.algorithm.methods.ce_gppo import gradient_preserving_loss
from megatron_hapo.algorithm.methods.cispo import clipped_weight_loss
from megatron_hapo.algorithm.methods.sapo import soft_gate
from megatron_hapo.algorithm.objective import policy_loss
from tests.algorithm.test_methods import algorithm, as_microbatch, scored_batch, with_scores

RATIOS = (0.5, 1.0, 1.5, 0.5, 1.0, 1.5, 20.0)
ADVANTAGES = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0])


def log_probs_at(*ratios: float) -> torch.Tensor:
    """Of a policy whose old log-probs are -1."""
    return (torch.tensor(ratios).log() - 1).requires_grad_()


def ranges(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((len(RATIOS),), low), torch.full((len(RATIOS),), high)


def test_cispo_keeps_every_tokens_gradient_at_the_clipped_weight():
    """Weights clipped to [0.8, 1.28], whatever the sign of the advantage: 0.8, 1, 1.28, 0.8, 1, 1.28, 1.28."""
    log_probs = log_probs_at(*RATIOS)
    losses, sums = clipped_weight_loss(log_probs, (log_probs + 1).exp(), ADVANTAGES, *ranges(0.2, 0.28))
    weights = torch.tensor([0.8, 1.0, 1.28, 0.8, 1.0, 1.28, 1.28])
    torch.testing.assert_close(losses, -weights * ADVANTAGES * log_probs.detach())
    losses.sum().backward()
    torch.testing.assert_close(log_probs.grad, -weights * ADVANTAGES)
    assert {name: int(value) for name, value in sums.items()} == {
        "clipped_low": 2, "clipped_high": 3, "dual_clipped": 0,
    }  # fmt: skip


def test_a_clip_low_of_one_is_no_lower_bound():
    log_probs = log_probs_at(*RATIOS)
    clipped_weight_loss(log_probs, (log_probs + 1).exp(), ADVANTAGES, *ranges(1.0, 0.28))[0].sum().backward()
    torch.testing.assert_close(log_probs.grad[:3], -2 * torch.tensor([0.5, 1.0, 1.28]))


def test_sapos_gate_has_slope_one_at_the_old_policy_and_closes_on_both_sides():
    ratio = torch.tensor([1.0, 1.0, 2.0, 0.0], requires_grad=True)
    tau = torch.tensor([1.0, 2.0, math.log(3), math.log(3)])
    gate = soft_gate(ratio, tau)
    # sigmoid(0) = 1/2; sigmoid(ln 3) = 3/4 and sigmoid(-ln 3) = 1/4, where the slope is 4 * 3/16.
    torch.testing.assert_close(gate, torch.tensor([2.0, 1.0, 3 / math.log(3), 1 / math.log(3)]))
    gate.sum().backward()
    torch.testing.assert_close(ratio.grad, torch.tensor([1.0, 1.0, 0.75, 0.75]))


def test_sapo_in_the_loss_gates_by_the_sign_of_the_advantage():
    batch, scores = scored_batch()
    settings = algorithm(surrogate="sapo", sapo={"tau_positive": 0.5, "tau_negative": 3.0})
    scored, _ = with_scores(batch, scores, settings)
    microbatch = as_microbatch(scored)
    log_probs = microbatch["old_log_probs"] + torch.linspace(-1, 1, len(scores.log_probs))
    log_probs.requires_grad_()
    loss, sums = policy_loss(log_probs, torch.zeros(0), microbatch, settings, num_tokens=len(log_probs))
    loss.backward()
    gates, weights = [], []
    for ratio, advantage in zip(
        (log_probs - microbatch["old_log_probs"]).exp().tolist(), microbatch["advantages"].tolist(), strict=True
    ):
        tau = 0.5 if advantage > 0 else 3.0
        p = 1 / (1 + math.exp(-tau * (ratio - 1)))
        gates.append(-4 / tau * p * advantage)
        weights.append((4 * p * (1 - p), -4 * p * (1 - p) * ratio * advantage))
    assert loss.item() == pytest.approx(sum(gates) / len(gates), rel=1e-5)
    assert (log_probs.grad * len(gates)).tolist() == pytest.approx([g for _, g in weights], rel=1e-4, abs=1e-6)
    assert float(sums["gate"]) == pytest.approx(sum(weight for weight, _ in weights), rel=1e-5)


def test_ce_gppo_bounds_the_gradient_of_clipped_tokens():
    """0.5 * 0.8 below 0.8 with A < 0, 2 * 1.2 above 1.2 with A > 0, else the ratio; nothing beyond the dual clip."""
    log_probs = log_probs_at(*RATIOS)
    ratio = (log_probs + 1).exp()
    losses, sums = gradient_preserving_loss(
        ratio, ADVANTAGES, *ranges(0.2, 0.2), beta_low=0.5, beta_high=2.0, dual_clip=10.0
    )
    effective = torch.tensor([0.5, 1.0, 2.4, 0.4, 1.0, 1.5, 10.0])
    torch.testing.assert_close(losses, -effective * ADVANTAGES)
    losses.sum().backward()
    torch.testing.assert_close(log_probs.grad, -torch.tensor([0.5, 1.0, 2.4, 0.4, 1.0, 1.5, 0.0]) * ADVANTAGES)
    assert {name: int(value) for name, value in sums.items()} == {
        "clipped_low": 1, "clipped_high": 1, "dual_clipped": 1,
    }  # fmt: skip


def test_ce_gppo_with_weights_of_zero_is_ppos_gradient():
    batch, scores = scored_batch()
    gradients = []
    for options in ({"surrogate": "ce_gppo", "ce_gppo": {"beta_low": 0.0, "beta_high": 0.0}}, {}):
        settings = algorithm(**options)
        scored, _ = with_scores(batch, scores, settings)
        log_probs = torch.from_numpy(scores.log_probs) + torch.linspace(-0.9, 0.9, len(scores.log_probs))
        log_probs.requires_grad_()
        policy_loss(log_probs, torch.zeros(0), as_microbatch(scored), settings, num_tokens=1)[0].backward()
        gradients.append(log_probs.grad)
    torch.testing.assert_close(*gradients)
    assert (gradients[0] == 0).any()


@pytest.mark.parametrize("surrogate", ["clipped", "unclipped", "cispo", "sapo", "ce_gppo"])
def test_every_surrogate_starts_from_the_policy_gradient_and_is_homogeneous(surrogate):
    """At the old policy the gradient is -A; twice the advantages give twice the loss, so weights can be folded in."""
    batch, scores = scored_batch()
    settings = algorithm(surrogate=surrogate)
    scored, _ = with_scores(batch, scores, settings)
    microbatch = as_microbatch(scored)
    old = microbatch["old_log_probs"].clone().requires_grad_()
    policy_loss(old, torch.zeros(0), microbatch, settings, num_tokens=1)[0].backward()
    torch.testing.assert_close(old.grad, -microbatch["advantages"])
    moved = microbatch["old_log_probs"] + torch.linspace(-3, 3, len(old))
    doubled = microbatch.with_per_token({"weights": torch.full_like(moved, 2.0)})
    loss, sums = policy_loss(moved, torch.zeros(0), microbatch, settings, num_tokens=1)
    torch.testing.assert_close(policy_loss(moved, torch.zeros(0), doubled, settings, num_tokens=1)[0], 2 * loss)
    assert sums.keys() >= {"clipped_low", "clipped_high", "dual_clipped"}
