"""Updates of the weights on one rank: right direction, none after a fault, steps below bfloat16's resolution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hapo.types import merge_scores
from tests.distributed import run_ranks
from tests.trainer.test_trainer import make_batch, make_config, make_grid, weights_of


def learn(model: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from megatron_hapo.trainer.trainer_rank import TrainerRank

    config = make_config(model, {"tp": 1})
    trainer = TrainerRank(config, make_grid(config))
    batch = make_batch()

    def score() -> np.ndarray:
        part = trainer.log_probs(batch)
        return merge_scores([part], batch).log_probs

    before = score()
    scored = replace(batch, old_log_probs=before, token_data={"modulation": np.zeros_like(before)})
    for step in range(5):
        trainer.update(scored, step=step + 1)
    return before, score(), np.repeat(batch.advantages, batch.response_lengths)


def diverge(model: Path) -> tuple[str, bool]:
    from megatron_hapo.errors import TrainingError
    from megatron_hapo.trainer.trainer_rank import TrainerRank

    config = make_config(model, {"tp": 1})
    trainer = TrainerRank(config, make_grid(config))
    before = weights_of(trainer)
    batch = make_batch()
    zeros = np.zeros(batch.num_response_tokens, np.float32)
    broken = replace(batch, advantages=batch.advantages * np.nan, old_log_probs=zeros, token_data={"modulation": zeros})
    try:
        trainer.update(broken, step=7)
        message = ""
    except TrainingError as error:
        message = str(error)
    after = weights_of(trainer)
    return message, all(np.array_equal(before[name], after[name]) for name in before)


def take_small_steps(model: Path) -> list[dict[str, float]]:
    """Movement of masters and weights after each of several updates whose steps are far below bfloat16's resolution."""
    from megatron_hapo.trainer.trainer_rank import TrainerRank

    config = make_config(model, {"tp": 1}, lr=1e-6)
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"dtype": "bfloat16"})})
    trainer = TrainerRank(config, make_grid(config))
    parameters = [parameter for chunk in trainer.model for parameter in chunk.parameters()]

    def masters() -> torch.Tensor:
        return torch.cat([parameter.main_param.detach().clone() for parameter in parameters])  # type: ignore[attr-defined]

    def weights() -> torch.Tensor:
        return torch.cat([parameter.detach().flatten().clone() for parameter in parameters])

    first_masters, first_weights = masters(), weights()
    batch = make_batch()
    zeros = np.zeros_like(batch.rollout_log_probs)
    scored = replace(batch, old_log_probs=batch.rollout_log_probs - 5, token_data={"modulation": zeros})
    seen = []
    for step in range(4):
        trainer.update(scored, step=step + 1)
        seen.append(
            {
                "moved": float((masters() - first_masters).abs().mean()),
                "changed": float((weights() != first_weights).float().mean()),
                "rounded": float((weights() == masters().bfloat16()).float().mean()),
            }
        )
    return seen


def on_one_rank(rank: int, model: Path) -> dict[str, Any]:
    from megatron.core import parallel_state

    seen = {}
    for check in (learn, diverge, take_small_steps):
        seen[check.__name__] = check(model)
        parallel_state.destroy_model_parallel()
    return seen


@pytest.fixture(scope="module")
def one_rank(tiny_qwen3: Path) -> dict[str, Any]:
    return run_ranks(1, on_one_rank, tiny_qwen3)[0]


def test_an_update_raises_responses_with_positive_advantage(one_rank: dict[str, Any]) -> None:
    """Catches a flipped sign or a mix-up of rows, which equal layouts would not show."""
    before, after, advantages = one_rank["learn"]
    change = after - before
    for sign in (1, -1):
        assert (sign * change[np.sign(advantages) == sign]).mean() > 0.01


def test_a_non_finite_gradient_stops_before_the_optimizer(one_rank: dict[str, Any]) -> None:
    message, unchanged = one_rank["diverge"]
    assert "step 7" in message
    assert "nan" in message
    assert unchanged


def test_float32_masters_keep_steps_that_bfloat16_would_lose(one_rank: dict[str, Any]) -> None:
    steps = one_rank["take_small_steps"]
    assert 0.5e-6 < steps[0]["moved"] < 1.1e-6  # Adam's first step is the learning rate
    assert steps[0]["changed"] < 0.01
    assert steps[3]["moved"] > 2.5 * steps[0]["moved"]
    assert all(step["rounded"] == 1 for step in steps)
