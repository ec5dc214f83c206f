"""Controllers worked out by hand over several steps, their state passed on as a checkpoint holds it.

The entropy bonus's is in test_entropy_bonus.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hapo.algorithm.controllers import next_state, step_controls
from megatron_hapo.algorithm.methods.adapo import next_clip_high
from megatron_hapo.algorithm.methods.bapo import balanced_bounds, steps
from megatron_hapo.algorithm.methods.entropic import likely_token_weights
from megatron_hapo.algorithm.methods.repo import decorrelated_advantages, next_zeta, rescaled_advantages
from megatron_hapo.algorithm.objective import policy_loss
from megatron_hapo.config import AlgorithmConfig, load_config
from megatron_hapo.errors import ConfigError
from megatron_hapo.observe.step_metrics import update_metrics
from megatron_hapo.types import TrainBatch
from tests.algorithm.test_entropy_bonus import scores_with
from tests.algorithm.test_methods import CONFIGS, algorithm, as_microbatch, scored_batch, with_scores
from tests.observe.test_metrics import documented_metrics

State = Mapping[str, float]


def run(settings: AlgorithmConfig, entropies: list[float], state: State | None = None) -> tuple[list[Any], State]:
    """The controls of steps with these mean entropies, and the state after them."""
    seen, state = [], state or {}
    for entropy in entropies:
        scores = scores_with(entropy)
        seen.append(step_controls(state, scores, settings))
        state = json.loads(json.dumps(next_state(state, scores, [], settings)))
    return seen, state


# ----- EntroPIC


def test_entropic_follows_the_error_and_its_integral():
    """Errors 0.5, -0.25, -0.25, 0.125: alpha = 2 e + 0.5 * (sum of the earlier errors), within [-1, 1]."""
    settings = algorithm(entropic={"enabled": True, "target": 1.0, "proportional": 2.0, "integral": 0.5})
    seen, state = run(settings, [1.5, 0.75, 0.75, 1.125])
    assert [each["entropic_alpha"] for each in seen] == [1.0, -0.25, -0.375, 0.25]
    assert state == {"entropic/integral": 0.125}
    low, _ = run(settings, [0.0])
    assert low == [{"entropic_alpha": -1.0}]


def test_entropic_weighs_likely_tokens_by_the_sign_of_their_advantage():
    log_probs = torch.tensor([0.96, 0.96, 0.96, 0.5, 0.95]).log()
    advantages = torch.tensor([2.0, -3.0, 0.0, 2.0, 2.0])
    weights = likely_token_weights(log_probs, advantages, alpha=0.5, probability=0.95)
    assert weights.tolist() == [1.5, 0.5, 1.0, 1.0, 1.0]
    assert weights.dtype == torch.float32


def test_entropics_weights_reach_the_batch():
    batch, scores = scored_batch()
    settings = algorithm(entropic={"enabled": True, "target": 0.0, "probability": 0.3})
    controls = step_controls({}, scores, settings)
    scored, _ = with_scores(batch, scores, settings, controls)
    assert controls["entropic_alpha"] == pytest.approx(float(scores.entropies.mean()), rel=1e-6)
    likely = np.exp(scores.log_probs) > 0.3
    signs = np.sign(np.repeat(batch.advantages, batch.response_lengths))
    np.testing.assert_allclose(scored.weights, np.where(likely, 1 + controls["entropic_alpha"] * signs, 1), rtol=1e-6)


# ----- REPO


def test_repo_raises_unlikely_right_tokens_and_spares_unlikely_wrong_ones():
    log_probs = torch.tensor([-1.0, -4.0, -1.0, -4.0, -100.0, -4.0])
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0, 0.0])
    got = rescaled_advantages(advantages, log_probs, zeta=0.1)
    torch.testing.assert_close(got, torch.tensor([2.2, 2.8, -1.8, -1.2, 6.0, 0.0]))
    # Beyond zeta |log pi| = 1 an advantage becomes 0; it never turns.
    torch.testing.assert_close(
        rescaled_advantages(advantages, log_probs, zeta=0.5), torch.tensor([3.0, 6.0, -1.0, 0.0, 22.0, 0.0])
    )
    torch.testing.assert_close(
        rescaled_advantages(advantages, log_probs, zeta=-0.5), torch.tensor([1.0, 0.0, -3.0, -6.0, 0.0, 0.0])
    )


@pytest.mark.parametrize(
    ("zeta", "entropy", "after"),
    [
        (0.01, 0.5, 0.02), (0.04, 0.5, 0.05), (-0.01, 0.5, -0.005), (-0.0015, 0.5, 0.001), (0.0, 0.5, 0.001),
        (0.01, 2.0, 0.005), (0.0015, 2.0, -0.001), (-0.01, 2.0, -0.02), (-0.04, 2.0, -0.05), (0.01, 1.0, 0.01),
    ],
)  # fmt: skip
def test_zeta_halves_and_doubles_towards_the_target_and_turns_at_the_smallest(zeta, entropy, after):
    assert next_zeta(zeta, entropy, target=1.0, zeta_min=0.001, zeta_max=0.05) == after


def test_repo_keeps_the_entropy_of_the_first_step_also_after_a_resume():
    settings = algorithm(repo={"enabled": True, "zeta": 0.01})
    seen, state = run(settings, [1.0, 0.5])
    assert [each["repo_zeta"] for each in seen] == [0.01, 0.01]
    assert state == {"repo/zeta": 0.02, "repo/target": 1.0}
    seen, state = run(settings, [0.75, 3.0], state)
    assert [each["repo_zeta"] for each in seen] == [0.02, 0.04]
    assert state == {"repo/zeta": 0.02, "repo/target": 1.0}
    assert run(algorithm(repo={"enabled": True, "zeta": 0.01, "adaptive": False}), [1.0, 0.5])[1] == {}


def test_repos_advantages_follow_the_current_policy():
    batch, scores = scored_batch()
    settings = algorithm(repo={"enabled": True})
    scored, _ = with_scores(batch, scores, settings)
    microbatch = as_microbatch(scored)
    log_probs = microbatch["old_log_probs"].clone().requires_grad_()
    policy_loss(
        log_probs, torch.zeros(0), microbatch, settings, num_tokens=1, controls={"repo_zeta": 0.05}
    )[0].backward()  # fmt: skip
    advantages = microbatch["advantages"]
    torch.testing.assert_close(log_probs.grad, -rescaled_advantages(advantages, log_probs.detach(), zeta=0.05))


def test_repos_general_form_subtracts_the_centred_log_prob():
    """A token of mean log-prob keeps its advantage; less likely ones gain and more likely ones lose."""
    log_probs, entropies = torch.tensor([-1.0, -4.0, -0.5, -100.0]), torch.tensor([1.0, 1.0, 1.0, 2.0])
    advantages = torch.tensor([2.0, 2.0, -2.0, 0.0])
    got = decorrelated_advantages(advantages, log_probs, entropies, zeta=0.1)
    torch.testing.assert_close(got, torch.tensor([2.0, 2.3, -2.05, 1.8]))


def test_what_repo_subtracts_is_weighted_as_the_advantages_are():
    batch, scores = scored_batch()
    settings = algorithm(repo={"enabled": True, "form": "subtracted"})
    scored, _ = with_scores(batch, scores, settings)
    microbatch = as_microbatch(scored)
    weights = torch.arange(len(scores.log_probs), dtype=torch.float32) / 4
    log_probs = microbatch["old_log_probs"].clone().requires_grad_()
    entropies = torch.from_numpy(scores.entropies)
    policy_loss(
        log_probs, entropies, microbatch.with_per_token({"weights": weights}), settings, num_tokens=1,
        controls={"repo_zeta": 0.05},
    )[0].backward()  # fmt: skip
    expected = decorrelated_advantages(microbatch["advantages"], log_probs.detach(), entropies, zeta=0.05)
    torch.testing.assert_close(log_probs.grad, -expected * weights)


# ----- ADAPO


def test_adapo_widens_below_the_entropy_of_the_first_step_and_narrows_above():
    """From 0.28 by 1.5: kept at the first step, then 0.42, the bound 0.56, and back by 1 / 1.5; also after a resume."""
    settings = algorithm(clip_high=0.28, adapo={"enabled": True, "factor": 1.5, "max_change": 2.0})
    seen, state = run(settings, [1.0, 0.5, 0.9])
    assert [each["adapo_clip_high"] for each in seen] == pytest.approx([0.28, 0.28, 0.42])
    assert state == {"adapo/clip_high": 0.56, "adapo/target": 1.0}
    seen, state = run(settings, [1.5, 1.0], state)
    assert [each["adapo_clip_high"] for each in seen] == pytest.approx([0.56, 0.56 / 1.5])
    assert state["adapo/clip_high"] == pytest.approx(0.56 / 1.5)  # exactly at the target: unchanged
    assert next_clip_high(0.15, 2.0, target=1.0, factor=1.5, low=0.14, high=0.56) == 0.14


def test_adapos_range_clips_the_ratio_upwards_only():
    batch, scores = scored_batch()
    settings = algorithm(clip_low=0.2, clip_high=0.28, adapo={"enabled": True})
    scored, _ = with_scores(batch, scores, settings)
    microbatch = as_microbatch(scored)
    log_probs = microbatch["old_log_probs"] + 0.3  # ratio 1.35
    clipped = {}
    for clip_high in (0.28, 0.4):
        controls = {"adapo_clip_high": clip_high}
        _, sums = policy_loss(log_probs, -log_probs, microbatch, settings, num_tokens=1, controls=controls)
        clipped[clip_high] = float(sums["clipped_high"])
    assert clipped == {0.28: float((microbatch["advantages"] > 0).sum()), 0.4: 0.0}


def test_adapo_and_bapo_cannot_both_set_the_upper_bound(tmp_path: Path):
    job = tmp_path / "job.yaml"
    job.write_text(
        f"base: {CONFIGS / 'demo_cpu.yaml'}\nalgorithm: {{adapo: {{enabled: true}}, bapo: {{enabled: true}}}}\n"
    )
    with pytest.raises(ConfigError, match=r"adapo.enabled: must be false with algorithm.bapo.enabled=true"):
        load_config(job)


# ----- BAPO


def test_the_candidates_end_at_the_largest_bound():
    assert steps(0.6, 0.8, 0.05) == pytest.approx([0.6, 0.65, 0.7, 0.75, 0.8])
    assert steps(0.6, 0.8, 0.15) == pytest.approx([0.6, 0.75, 0.8])
    assert steps(0.6, 0.6, 0.05) == [0.6]


@pytest.mark.parametrize(
    ("positives", "target", "bounds"),
    [((4.0, 5.0), 1.0, (0.6, 1.2)), ((3.0, 9.0), 1.0, (0.8, 2.0)), ((3.0, 5.0), 1.0, (0.8, 2.0))],
)
def test_the_lower_bound_rises_before_the_upper_one(positives, target, bounds):
    """N is 4 and 6 at the lower bounds 0.6 and 0.8: met at once; met at the last bounds; never met."""
    assert balanced_bounds([0.6, 0.8], [4.0, 6.0], [1.2, 2.0], positives, target=target) == bounds


def test_without_negative_contributions_the_bounds_stay_at_their_start():
    assert balanced_bounds([0.6, 0.8], [0.0, 0.0], [1.2, 2.0], [0.0, 0.0], target=1.0) == (0.6, 1.2)


def two_tokens(settings: AlgorithmConfig, controls: State) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradient and sums of two responses of one token: advantages 1 and -1 at the ratios 1.5 and 0.5."""
    ones = np.ones(2, np.int64)
    batch = TrainBatch(
        token_ids=np.zeros(4, np.int32), sequence_lengths=2 * ones, response_lengths=ones,
        temperatures=np.ones(2, np.float32), rollout_log_probs=np.zeros(2, np.float32),
        advantages=np.array([1.0, -1.0], np.float32), old_log_probs=np.zeros(2, np.float32),
    )  # fmt: skip
    log_probs = torch.tensor([1.5, 0.5]).log().requires_grad_()
    loss, sums = policy_loss(log_probs, torch.zeros(0), as_microbatch(batch), settings, num_tokens=1, controls=controls)
    loss.backward()
    assert log_probs.grad is not None
    return log_probs.grad, sums


@pytest.mark.parametrize(
    ("target", "low_max", "bounds"), [(1.8, 0.8, (0.6, 1.2)), (2.2, 0.6, (0.6, 1.6)), (2.2, 0.8, (0.8, 2.0))]
)
def test_bapos_bounds_follow_from_the_updates_of_the_step_before(target, low_max, bounds):
    """N is 0.6, 0.7, 0.8 at the lower bounds, P is 1.2, 1.5, 1.5 at 1.2, 1.6, 2.0; over two updates twice that.

    P / N is 2 at the start. With a fixed lower bound it is 2.5 at 1.6; with all of them 1.5, 1.875, 1.875 at 0.8.
    """
    options = {"low_step": 0.1, "high_step": 0.4, "low": 0.6, "high": 1.2}
    settings = algorithm(bapo={"enabled": True, "target": target, "low_max": low_max, **options})
    scores = scores_with(1.0)
    controls = step_controls({}, scores, settings)
    assert controls == {"bapo_low": 0.6, "bapo_high": 1.2}
    gradient, sums = two_tokens(settings, controls)
    assert gradient.tolist() == [0, 0]  # both ratios are beyond the bounds
    measured = {name: float(value) for name, value in sums.items() if name.startswith("measured/")}
    state = next_state({}, scores, [measured, measured], settings)
    controls = step_controls(state, scores, settings)
    assert (controls["bapo_low"], controls["bapo_high"]) == pytest.approx(bounds)
    moving = two_tokens(settings, controls)[0]
    assert (moving[0] != 0) == (bounds[1] > 1.5)


def test_bapos_bounds_must_be_in_order(tmp_path: Path):
    job = tmp_path / "job.yaml"
    job.write_text(f"base: {CONFIGS / 'demo_cpu.yaml'}\nalgorithm: {{bapo: {{enabled: true, low: 0.9}}}}\n")
    with pytest.raises(
        ConfigError, match=r"bapo.low: the bounds must be in the order .* got \[0.9, 0.8, 1.0, 1.2, 2.0\]"
    ):
        load_config(job)


# ----- several controllers


def test_what_controllers_set_and_what_parts_add_up_are_documented_metrics():
    names = ("entropy_bonus", "entropic", "repo", "bapo", "adapo", "kl_cov")
    for surrogate in ("sapo", "clipped"):
        settings = algorithm(surrogate=surrogate, **{name: {"enabled": True} for name in names})
        batch, scores = scored_batch()
        controls = step_controls({}, scores, settings)
        scored, _ = with_scores(batch, scores, settings, controls)
        log_probs = torch.from_numpy(scores.log_probs)
        _, sums = policy_loss(log_probs, -log_probs, as_microbatch(scored), settings, num_tokens=1, controls=controls)
        own = {"loss", "clipped_low", "clipped_high", "dual_clipped", "log_ratio", "ratio"}
        added = {f"loss/{name}" for name in sums.keys() - own if not name.startswith("measured/")}
        assert added >= {"loss/entropy", "loss/kl_cov_distance"}
        assert {f"control/{name}" for name in controls} | added <= documented_metrics()


def test_updates_are_averaged_without_the_sums_for_controllers():
    updates = [{"grad_norm": 1.0, "measured/sum": 5.0}, {"grad_norm": 3.0, "measured/sum": 6.0}]
    assert update_metrics(updates) == {"grad_norm": 2.0}


def test_controllers_go_on_from_their_state_side_by_side():
    """Interrupted at any step and resumed from JSON, three controllers set what they set without interruption."""
    settings = algorithm(
        entropy_bonus={"enabled": True, "target": 1.0}, entropic={"enabled": True, "target": 1.0},
        repo={"enabled": True},
    )  # fmt: skip
    entropies = [float(value) for value in np.random.default_rng(0).uniform(0.5, 1.5, 8)]
    whole, state = run(settings, entropies)
    assert len(state) == 4
    for interrupted in range(1, 8):
        first, restored = run(settings, entropies[:interrupted])
        second, end = run(settings, entropies[interrupted:], restored)
        assert [*first, *second] == whole
        assert end == state
    assert {name for controls in whole for name in controls} == {
        "entropy_coefficient", "entropic_alpha", "repo_zeta",
    }  # fmt: skip
