"""Clip-Cov and KL-Cov: the covariance by hand, the selection over the whole step, and both in the loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_hapo.algorithm.methods.covariance import drawn_tokens, largest_tokens, token_covariance
from megatron_hapo.algorithm.objective import policy_loss
from megatron_hapo.observe.step_metrics import weight_metrics
from tests.algorithm.test_methods import algorithm, as_microbatch, scored_batch, with_scores


def test_the_covariance_of_a_token_by_hand():
    """Means -2 and 0.5; the mean of the products is the covariance."""
    log_probs = torch.tensor([-1.0, -1.0, -2.0, -4.0])
    advantages = torch.tensor([1.0, 0.0, 1.0, 0.0])
    covariance = token_covariance(log_probs, advantages)
    assert covariance.tolist() == [0.5, -0.5, 0.0, 1.0]
    assert float(covariance.mean()) == pytest.approx(np.cov(log_probs, advantages, bias=True)[0, 1])


def test_the_largest_covariances_are_selected_with_ties():
    covariance = torch.tensor([0.1, 3.0, 0.2, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert largest_tokens(covariance, share=0.1).nonzero()[:, 0].tolist() == [1, 3]
    assert largest_tokens(covariance, share=0.3).nonzero()[:, 0].tolist() == [1, 3, 4]
    assert largest_tokens(covariance, share=0.001).sum() == 2
    assert not len(largest_tokens(torch.zeros(0), share=0.1))


def test_tokens_are_drawn_within_the_range_by_a_seed():
    covariance = torch.linspace(0, 10, 1001)

    def draw(share: float, seed: int = 0) -> list[int]:
        return drawn_tokens(covariance, share=share, lower=1.0, upper=5.0, seed=seed).nonzero()[:, 0].tolist()

    assert len(draw(0.02)) == 20
    assert all(100 < token < 500 for token in draw(0.02))
    assert draw(0.02) == draw(0.02) != draw(0.02, seed=1)
    assert len(draw(1.0)) == 399  # all candidates
    assert len(draw(1e-6)) == 1
    assert set(draw(0.01)) < set(draw(0.02))
    assert not drawn_tokens(torch.zeros(5), share=0.5, lower=1.0, upper=5.0, seed=0).any()


def test_a_token_that_enters_the_range_displaces_at_most_one_other():
    covariance = torch.linspace(0, 10, 1001)
    nudged = covariance.clone()
    nudged[100] = 1.001
    before, after = (drawn_tokens(each, share=0.05, lower=1.0, upper=5.0, seed=3) for each in (covariance, nudged))
    assert int((before != after).sum()) <= 2


def test_clip_cov_drops_the_gradient_of_the_drawn_tokens_alone():
    batch, scores = scored_batch()
    settings = algorithm(clip_cov={"enabled": True, "share": 0.2, "lower": 0.01, "upper": 5.0})
    scored, _ = with_scores(batch, scores, settings)
    microbatch = as_microbatch(scored)
    log_probs = torch.from_numpy(scores.log_probs).requires_grad_()
    policy_loss(log_probs, torch.zeros(0), microbatch, settings, num_tokens=1)[0].backward()
    covariance = token_covariance(log_probs.detach(), microbatch["advantages"])
    dropped = log_probs.grad == 0
    assert int(dropped.sum()) == int(0.2 * len(dropped))
    assert (covariance[dropped] > 0.01).all()
    torch.testing.assert_close(log_probs.grad[~dropped], -microbatch["advantages"][~dropped])
    assert weight_metrics(scored)["weights/zero_fraction"] == pytest.approx(float(dropped.float().mean()))


def test_kl_cov_is_the_unclipped_objective_with_a_penalty_on_the_selected_tokens():
    batch, scores = scored_batch()
    settings = algorithm(surrogate="unclipped", kl_cov={"enabled": True, "share": 0.2, "coefficient": 0.5})
    scored, _ = with_scores(batch, scores, settings)
    microbatch = as_microbatch(scored)
    old = microbatch["old_log_probs"]
    log_probs = (old + torch.linspace(-1, 1, len(old))).requires_grad_()
    loss, sums = policy_loss(log_probs, torch.zeros(0), microbatch, settings, num_tokens=len(old))
    covariance = token_covariance(old, microbatch["advantages"])
    selected = set(covariance.argsort(descending=True)[: int(0.2 * len(old))].tolist())
    expected = torch.zeros(())
    for i in range(len(old)):
        expected = expected - (log_probs[i] - old[i]).exp() * microbatch["advantages"][i]
        if i in selected:
            expected = expected + 0.5 * (log_probs[i] - old[i]).abs()
    torch.testing.assert_close(loss, expected / len(old))
    (got,) = torch.autograd.grad(loss, log_probs, retain_graph=True)
    (want,) = torch.autograd.grad(expected / len(old), log_probs)
    torch.testing.assert_close(got, want)
    distances = (log_probs - old).detach().abs()
    torch.testing.assert_close(sums["kl_cov_distance"], distances[sorted(selected)].sum())


def test_kl_covs_penalty_follows_the_weights_of_the_tokens():
    batch, scores = scored_batch()
    settings = algorithm(surrogate="unclipped", kl_cov={"enabled": True, "share": 0.5})
    scored, _ = with_scores(batch, scores, settings)
    moved = torch.from_numpy(scores.log_probs) + 0.5
    loss, _ = policy_loss(moved, torch.zeros(0), as_microbatch(scored), settings, num_tokens=1)
    doubled = replace(scored, weights=np.full_like(scores.log_probs, 2.0))
    torch.testing.assert_close(
        policy_loss(moved, torch.zeros(0), as_microbatch(doubled), settings, num_tokens=1)[0], 2 * loss
    )


def test_the_selection_is_the_steps_whatever_the_mini_batches():
    """Selected over the step, then split: the same tokens as when each response is looked at alone."""
    batch, scores = scored_batch(groups=3)
    settings = algorithm(
        surrogate="unclipped", kl_cov={"enabled": True, "share": 0.1},
        clip_cov={"enabled": True, "share": 0.1, "lower": 0.01},
    )  # fmt: skip
    scored, _ = with_scores(batch, scores, settings)
    parts = [scored.select([row]) for row in range(len(scored))]
    for name in ("kl_cov", None):
        whole = scored.weights if name is None else scored.token_data[name]
        pieces = [part.weights if name is None else part.token_data[name] for part in parts]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert scored.token_data["kl_cov"].sum() == int(0.1 * len(scores.log_probs))
