"""KL to a reference model: estimates and gradients by hand, in the loss and in the reward; the adaptive coefficient."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hapo.algorithm.controllers import next_state, step_controls
from megatron_hapo.algorithm.methods.reference_kl import adapted_coefficient, kl_estimate, mean_kl, response_kl
from megatron_hapo.algorithm.microbatches import MicroBatch, pack
from megatron_hapo.algorithm.minibatches import minibatches
from megatron_hapo.algorithm.objective import policy_loss
from megatron_hapo.algorithm.step_statistics import step_statistics
from megatron_hapo.algorithm.training_batch import training_batch
from megatron_hapo.config import AlgorithmConfig, BatchConfig
from megatron_hapo.observe.step_metrics import reference_metrics
from megatron_hapo.types import Score, ScoredGroup, TokenScores, TrainBatch
from tests.algorithm.test_methods import ROLLOUT, algorithm, as_microbatch, scored_batch

LOG2, LOG3 = math.log(2), math.log(3)


def with_kl(**settings: Any) -> AlgorithmConfig:
    """GRPO's objective with a mean over tokens, and the KL."""
    return algorithm(aggregation="token_mean", kl={"enabled": True, **settings})


def with_reference(scores: TokenScores) -> TokenScores:
    noise = np.random.default_rng(3).normal(-1, 0.4, len(scores.log_probs))
    return replace(scores, reference_log_probs=noise.astype(np.float32))


def groups_of(rewards: list[list[float]]) -> list[ScoredGroup]:
    return [ScoredGroup([ROLLOUT] * len(r), [Score(reward=x, correctness=0.0) for x in r]) for r in rewards]


REWARDS = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]


def trained_on(settings: AlgorithmConfig) -> TrainBatch:
    """A batch with everything that the updates of the first step read."""
    batch, scores = scored_batch()
    scores = with_reference(scores)
    controls = step_controls({}, scores, settings)
    return training_batch(batch, groups_of(REWARDS), scores, step_statistics(scores, settings), settings, controls)


# ----- estimates


def test_estimates_and_their_gradients_by_hand() -> None:
    """Policy probabilities 1/2, 1/2, 1/6 where the reference has 1/4, 1/2, 1/2: d = log 2, 0, -log 3."""
    reference = -torch.tensor([2 * LOG2, LOG2, LOG2], dtype=torch.float64)
    want = {
        "k1": ([LOG2, 0, -LOG3], [1, 1, 1]),
        "k2": ([LOG2**2 / 2, 0, LOG3**2 / 2], [LOG2, 0, -LOG3]),
        "k3": ([1 / 2 - 1 + LOG2, 0, 3 - 1 - LOG3], [1 / 2, 0, -2]),
    }
    for estimator, (values, gradients) in want.items():
        log_probs = -torch.tensor([LOG2, LOG2, LOG2 + LOG3], dtype=torch.float64)
        log_probs.requires_grad_()
        got = kl_estimate(log_probs, reference, estimator=estimator)  # type: ignore[arg-type]
        got.sum().backward()
        torch.testing.assert_close(got.detach(), torch.tensor(values, dtype=torch.float64))
        torch.testing.assert_close(log_probs.grad, torch.tensor(gradients, dtype=torch.float64))


def test_k1_and_k3_have_the_mean_of_the_kl_and_the_gradients_have_the_means_that_are_stated() -> None:
    """Exact expectations over a vocabulary of five tokens, against autograd of the two KL divergences."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7], dtype=torch.float64, requires_grad=True)
    log_ref = torch.log_softmax(torch.tensor([0.0, 0.5, 1.0, -0.4, 0.7], dtype=torch.float64), -1)
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp().detach()
    reverse, forward = (log_p.exp() * (log_p - log_ref)).sum(), (log_ref.exp() * (log_ref - log_p)).sum()
    estimates = {name: kl_estimate(log_p, log_ref, estimator=name) for name in ("k1", "k2", "k3")}
    for name in ("k1", "k3"):
        torch.testing.assert_close((p * estimates[name]).sum(), reverse)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    as_loss = {name: gradient((p * value).sum()) for name, value in estimates.items()}
    torch.testing.assert_close(as_loss["k1"], torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(as_loss["k2"], gradient(reverse))
    torch.testing.assert_close(as_loss["k3"], gradient(forward))
    in_reward = gradient((p * estimates["k1"].detach() * log_p).sum())
    torch.testing.assert_close(in_reward, gradient(reverse))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_is_finite_far_from_the_reference(estimator: Any) -> None:
    far = torch.tensor([-1.0, -200.0, -1.0], requires_grad=True)
    kl = kl_estimate(far, torch.tensor([-1.0, -1.0, -200.0]), estimator=estimator)
    kl.sum().backward()
    assert kl[0] == 0
    assert (kl >= 0).all()
    assert far.grad is not None
    assert far.grad.isfinite().all()


# ----- in the loss


def loss_of(
    log_probs: torch.Tensor, microbatch: MicroBatch, settings: AlgorithmConfig, batch: TrainBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    num_tokens = batch.num_response_tokens
    return policy_loss(log_probs, torch.zeros(0), microbatch, settings, num_tokens=num_tokens, controls=batch.controls)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_loss_gets_the_coefficient_times_the_tokens_mean(estimator: Any) -> None:
    settings = with_kl(coefficient=0.3, estimator=estimator)
    batch = trained_on(settings)
    microbatch = as_microbatch(batch)
    log_probs = (microbatch["old_log_probs"] + 0.05).requires_grad_()
    loss, sums = loss_of(log_probs, microbatch, settings, batch)
    without, _ = loss_of(log_probs, microbatch, with_kl(enabled=False), batch)
    kl_N = kl_estimate(log_probs, microbatch["reference_log_probs"], estimator=estimator)
    torch.testing.assert_close(loss, without + 0.3 * kl_N.mean())
    assert sums["loss"] == loss.detach()
    k3_N = kl_estimate(log_probs.detach(), microbatch["reference_log_probs"], estimator="k3")
    torch.testing.assert_close(sums["kl"], k3_N.sum())
    (got,) = torch.autograd.grad(loss, log_probs, retain_graph=True)
    (want,) = torch.autograd.grad(without + 0.3 * kl_N.mean(), log_probs)
    torch.testing.assert_close(got, want)


def test_the_kl_is_aggregated_as_the_methods_loss_is() -> None:
    """GRPO's mean over responses of their token means, also of the KL."""
    settings = algorithm(aggregation="sequence_mean_token_mean", kl={"enabled": True, "coefficient": 0.3})
    batch = trained_on(settings)
    sizes = BatchConfig(prompts_per_step=2, samples_per_prompt=3, prompts_per_minibatch=2)
    (part,) = minibatches(batch, settings, sizes, max_tokens=10, seed=0, step=1)
    microbatch = as_microbatch(part)
    log_probs = microbatch["old_log_probs"] + 0.05
    loss, _ = loss_of(log_probs, microbatch, settings, part)
    without, _ = loss_of(log_probs, microbatch, algorithm(aggregation="sequence_mean_token_mean"), part)
    kl_N = kl_estimate(log_probs, microbatch["reference_log_probs"], estimator="k3")
    means = [response.mean() for response in kl_N.split(part.response_lengths.tolist())]
    torch.testing.assert_close(loss - without, 0.3 * torch.stack(means).mean())


def test_any_split_into_micro_batches_and_ranks_gives_the_same_loss_and_gradient() -> None:
    settings = with_kl(coefficient=0.5)
    batch = trained_on(settings)
    moved = torch.from_numpy(np.random.default_rng(5).normal(0, 0.1, batch.num_response_tokens).astype(np.float32))

    def computed(splits: list[list[int]], cp_size: int = 1) -> tuple[float, torch.Tensor]:
        total, gradient = 0.0, torch.zeros(batch.num_response_tokens)
        starts = np.cumsum(batch.response_lengths) - batch.response_lengths
        for rows in splits:
            index = np.concatenate([starts[row] + np.arange(batch.response_lengths[row]) for row in rows])
            for cp_rank in range(cp_size):
                microbatch = pack(batch, rows, device=torch.device("cpu"), cp_size=cp_size, cp_rank=cp_rank)
                here = torch.from_numpy(index)[microbatch.response_index]
                log_probs = (microbatch["old_log_probs"] + moved[here]).requires_grad_()
                loss, _ = loss_of(log_probs, microbatch, settings, batch)
                loss.backward()
                assert log_probs.grad is not None
                total += float(loss.detach())
                gradient[here] = log_probs.grad
        return total, gradient

    want, want_gradient = computed([[0, 1, 2, 3, 4, 5]])
    for splits, cp_size in (
        ([[3, 0], [5, 1, 2], [4]], 1),
        ([[row] for row in range(6)], 1),
        ([[2, 4, 0], [1, 3, 5]], 2),
    ):
        got, gradient = computed(splits, cp_size)
        assert got == pytest.approx(want, rel=1e-6)
        torch.testing.assert_close(gradient, want_gradient)


# ----- in the reward


def test_the_reward_loses_the_sum_over_the_response() -> None:
    """Two responses of 2 and 1 tokens: d = log 2, -log 3 and 1; k1 sums log(2/3) and 1."""
    old = torch.tensor([-1.0, -1.0 - LOG3, -1.0])
    reference = torch.tensor([-1.0 - LOG2, -1.0, -2.0])
    lengths = torch.tensor([2, 1])
    torch.testing.assert_close(
        response_kl(old, reference, lengths, estimator="k1"),
        torch.tensor([LOG2 - LOG3, 1.0], dtype=torch.float64), rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    none = response_kl(torch.zeros(0), torch.zeros(0), torch.tensor([0, 0]), estimator="k3")
    assert none.tolist() == [0, 0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_advantages_are_those_of_the_rewards_less_the_kl(estimator: Any) -> None:
    settings = with_kl(coefficient=0.2, estimator=estimator, where="reward")
    batch, scores = trained_on(settings), with_reference(scored_batch()[1])
    penalty = 0.2 * response_kl(
        torch.from_numpy(scores.log_probs), torch.from_numpy(scores.reference_log_probs),
        torch.from_numpy(batch.response_lengths), estimator=estimator,
    )  # fmt: skip
    reduced = (torch.tensor(REWARDS).flatten().double() - penalty).view(2, 3)
    want = (reduced - reduced.mean(1, keepdim=True)) / (reduced.std(1, keepdim=True) + 1e-6)
    np.testing.assert_allclose(batch.advantages, want.flatten(), rtol=1e-5)
    # The loss itself has no further term.
    microbatch = as_microbatch(batch)
    loss, _ = loss_of(microbatch["old_log_probs"], microbatch, settings, batch)
    torch.testing.assert_close(loss, -microbatch["advantages"].mean())


# ----- the coefficient


def test_the_coefficient_follows_the_target_by_hand() -> None:
    def next_of(kl: float) -> float:
        return adapted_coefficient(0.1, kl, target=0.02, horizon=10)

    assert next_of(0.022) == pytest.approx(0.1 * (1 + 0.1 / 10))
    assert next_of(0.5) == pytest.approx(0.1 * (1 + 0.2 / 10))
    assert next_of(0.0) == pytest.approx(0.1 * (1 - 0.2 / 10))
    assert next_of(0.02) == pytest.approx(0.1)
    assert adapted_coefficient(0.1, 0.0, target=0.02, horizon=1) == pytest.approx(0.08)


def test_each_step_uses_the_coefficient_that_the_steps_before_have_left() -> None:
    settings = with_kl(coefficient=0.1, target=1e-4, horizon=20)
    scores = with_reference(scored_batch()[1])
    difference = scores.log_probs - scores.reference_log_probs
    assert mean_kl(scores) == pytest.approx(float((np.exp(-difference) - 1 + difference).mean()), rel=1e-5)
    state: dict[str, float] = {}
    assert step_controls(state, scores, settings) == {"kl_coefficient": 0.1}
    state = next_state(state, scores, [], settings)
    assert step_controls(state, scores, settings)["kl_coefficient"] == pytest.approx(0.1 * (1 + 0.2 / 20))
    state = next_state(state, scores, [], settings)
    assert step_controls(state, scores, settings)["kl_coefficient"] == pytest.approx(0.1 * (1 + 0.2 / 20) ** 2)


def test_the_state_of_a_coefficient_is_kept_unless_it_was_set_anew() -> None:
    settings = with_kl(coefficient=0.1, target=1e-4)
    scores = with_reference(scored_batch()[1])
    state = next_state({}, scores, [], settings)
    stored = json.loads(json.dumps(state))
    assert step_controls(stored, scores, settings) == step_controls(state, scores, settings)
    assert step_controls(stored, scores, settings)["kl_coefficient"] != 0.1
    for other, coefficient in ((with_kl(coefficient=0.2, target=1e-4), 0.2), (with_kl(coefficient=0.1), 0.1)):
        assert step_controls(stored, scores, other) == {"kl_coefficient": coefficient}
    assert next_state(stored, scores, [], with_kl(coefficient=0.1)) == {}


def test_metrics_measure_the_distance_from_the_reference() -> None:
    scores = with_reference(scored_batch()[1])
    metrics = reference_metrics(scores)
    difference = scores.log_probs - scores.reference_log_probs
    assert metrics == pytest.approx({"kl/mean": mean_kl(scores), "kl/log_ratio": float(difference.mean())}, rel=1e-5)
    assert reference_metrics(scored_batch()[1]) == {}
