"""The entropy bonus: its term of the loss, and the controller of its coefficient."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hapo.algorithm.controllers import next_state, step_controls
from megatron_hapo.algorithm.methods.entropy_bonus import next_coefficient
from megatron_hapo.algorithm.objective import policy_loss
from megatron_hapo.config import load_config
from megatron_hapo.errors import ConfigError
from megatron_hapo.types import TokenScores
from tests.algorithm.test_methods import algorithm, as_microbatch, scored_batch, with_scores

ADAPTIVE = {"enabled": True, "coefficient": 0.25, "target": 2.0, "delta": 0.5, "max_coefficient": 1.0}


def scores_with(*entropies: float) -> TokenScores:
    values = np.array(entropies, np.float32)
    return TokenScores(log_probs=-values, rollout_temperature_log_probs=-values, entropies=values)


def test_the_bonus_raises_the_mean_entropy_of_the_current_policy():
    batch, scores = scored_batch()
    plain, bonus = algorithm(), algorithm(entropy_bonus={"enabled": True, "coefficient": 0.5})
    scored, _ = with_scores(batch, scores, bonus)
    controls = step_controls({}, scores, bonus)
    assert controls == {"entropy_coefficient": 0.5}
    log_probs = torch.from_numpy(scores.log_probs)
    entropies = torch.linspace(0.1, 0.9, len(log_probs), requires_grad=True)
    microbatch, count = as_microbatch(scored), len(log_probs)
    without, _ = policy_loss(log_probs, entropies, microbatch, plain, num_tokens=count)
    loss, sums = policy_loss(log_probs, entropies, microbatch, bonus, num_tokens=count, controls=controls)
    torch.testing.assert_close(loss, without - 0.5 * entropies.mean())
    (gradient,) = torch.autograd.grad(loss, entropies)
    torch.testing.assert_close(gradient, torch.full_like(entropies, -0.5 / count))
    torch.testing.assert_close(sums["entropy"], entropies.sum().detach())


@pytest.mark.parametrize(
    ("coefficient", "entropy", "after"),
    [(0.25, 1.0, 0.75), (0.75, 1.0, 1.0), (0.75, 3.0, 0.25), (0.25, 3.0, 0.0), (0.25, 2.0, 0.25)],
)
def test_the_coefficient_follows_the_target_within_its_bounds(coefficient, entropy, after):
    assert next_coefficient(coefficient, entropy, target=2.0, delta=0.5, max_coefficient=1.0) == after


def test_there_is_no_bonus_above_the_target_and_the_state_goes_on():
    """Mean entropies 1, 1, 3, 2: the coefficient is c_k at or below the target 2, else 0; worked out by hand."""
    settings = algorithm(entropy_bonus=ADAPTIVE)
    steps = [scores_with(0.5, 1.5), scores_with(1.0), scores_with(2.0, 4.0), scores_with(2.0)]
    state: dict[str, float] = {}
    seen = []
    for scores in steps:
        seen.append(step_controls(state, scores, settings)["entropy_coefficient"])
        state = json.loads(json.dumps(next_state(state, scores, [], settings)))  # as a checkpoint holds it
    assert seen == [0.25, 0.75, 0.0, 0.5]
    assert state == {"entropy_bonus/coefficient": 0.5}


def test_a_fixed_coefficient_has_no_state():
    settings = algorithm(entropy_bonus={"enabled": True})
    assert next_state({"entropy_bonus/coefficient": 9.0}, scores_with(1.0), [], settings) == {}
    assert step_controls({"entropy_bonus/coefficient": 9.0}, scores_with(1.0), settings) == {
        "entropy_coefficient": 0.001
    }


def test_the_state_of_a_controller_that_is_not_enabled_is_dropped():
    assert next_state({"entropy_bonus/coefficient": 0.5}, scores_with(1.0), [], algorithm()) == {}
    assert step_controls({"entropy_bonus/coefficient": 0.5}, scores_with(1.0), algorithm()) == {}


def test_a_first_coefficient_beyond_its_bound_is_refused(tmp_path: Path):
    job = tmp_path / "job.yaml"
    demo = Path(__file__).parents[2] / "configs/demo_cpu.yaml"
    job.write_text(f"base: {demo}\nalgorithm: {{entropy_bonus: {{enabled: true, target: 0.3, coefficient: 0.1}}}}\n")
    with pytest.raises(
        ConfigError, match=r"entropy_bonus.coefficient: must be at most .*max_coefficient=0.005, got 0.1"
    ):
        load_config(job)
