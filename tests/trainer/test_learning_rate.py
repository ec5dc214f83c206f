"""Learning rates by hand, and runs that resume in the middle of each schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hapo.config import Config
from megatron_hapo.trainer.learning_rate import LearningRate
from tests.distributed import run_ranks
from tests.tiny_model import write_tiny_qwen3
from tests.trainer.test_trainer import make_batch, make_config, make_grid, weights_of, with_everything

STEPS, WARMUP, INTERRUPTED_AT = 10, 2, 6
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {"min_lr": 2e-4},
    "cosine": {},
    "wsd": {"min_lr": 1e-4, "decay_steps": 5},
}


def config_with(model: Path, layout: dict[str, Any], *, steps: int = STEPS, **optimizer: Any) -> Config:
    settings = {"lr": 1e-3, "warmup_steps": WARMUP, "weight_decay": 0.1, **optimizer}
    return make_config(model, layout, **settings).model_copy(update={"steps": steps})


def rates(steps: int = STEPS, **optimizer: Any) -> list[float]:
    """The rate of every step of a run, as the groups of an optimizer get it."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    adam: Any = torch.optim.AdamW([{"params": [parameter], "wd_mult": 0.0}], lr=1.0, weight_decay=0.1)
    schedule = LearningRate(adam, config_with(Path("model"), {"tp": 1}, steps=steps, **optimizer))
    seen = []
    for step in range(1, steps + 1):
        assert schedule.set(step=step) == adam.param_groups[0]["lr"]
        assert adam.param_groups[0]["weight_decay"] == 0.1
        seen.append(adam.param_groups[0]["lr"])
    return seen


def test_the_rate_falls_from_its_peak_towards_the_minimum_at_the_end() -> None:
    """Steps 3 to 10 are made with 0/8 to 7/8 of the way behind them."""
    warm = [5e-4, 1e-3]
    passed = [k / 8 for k in range(8)]
    assert rates(schedule="linear") == pytest.approx([*warm, *(1e-3 * (1 - x) for x in passed)])
    low = [2e-4 + 8e-4 * (1 - x) for x in passed]
    assert rates(schedule="linear", min_lr=2e-4) == pytest.approx([*warm, *low])
    cosine = [1e-3 * (1 + math.cos(math.pi * x)) / 2 for x in passed]
    assert rates(schedule="cosine") == pytest.approx([*warm, *cosine])
    # The first of the five steps of the decay still has the peak.
    decay = [1e-3, 8.2e-4, 6.4e-4, 4.6e-4, 2.8e-4]
    assert rates(schedule="wsd", decay_steps=5, min_lr=1e-4) == pytest.approx([*warm, 1e-3, 1e-3, 1e-3, *decay])
    assert rates(20, schedule="wsd") == pytest.approx([*warm, *[1e-3] * 17, 5e-4])  # a tenth of 20 steps


def test_a_constant_rate_is_to_the_last_bit_what_it_was_before_there_were_schedules() -> None:
    for lr in (1e-6, 3e-4, 7.7e-5):
        for warmup in (0, 1, 3, 7, 10, 49):
            want = [lr * min(1.0, step / max(1, warmup)) for step in range(1, 31)]
            assert rates(30, lr=lr, warmup_steps=warmup) == want


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_curve_starts_exactly_at_the_peak(schedule: str) -> None:
    for lr in (1e-6, 3e-4, 7.7e-5):
        for warmup in (0, 3, 7):
            assert rates(lr=lr, warmup_steps=warmup, schedule=schedule)[warmup] == lr


def resume_in_the_middle(rank: int, folder: Path) -> dict[str, Any]:
    """For each schedule the rates and the final weights of a run, uninterrupted and interrupted."""
    import torch.distributed as dist

    from megatron_hapo.checkpoint.resumable import chained_optimizers
    from megatron_hapo.trainer.trainer_rank import TrainerRank
    from megatron_hapo.types import merge_scores

    def make_trainer(schedule: str, *, steps: int = STEPS) -> TrainerRank:
        settings = {"schedule": schedule, **SCHEDULES[schedule]}
        return TrainerRank(config_with(folder / "model", {"dp": 2}, steps=steps, **settings), grid)

    def train(trainer: TrainerRank, first: int) -> list[float]:
        updates = [trainer.update(batch, step=step) for step in range(first, STEPS + 1)]
        return [metrics["lr"] for metrics in updates if metrics is not None]

    grid = make_grid(config_with(folder / "model", {"dp": 2}))
    trainer = make_trainer("constant")
    scores: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(scores, trainer.log_probs(make_batch()))
    batch = with_everything(make_batch(), merge_scores(scores, make_batch()))
    decays = {group["weight_decay"] for part in chained_optimizers(trainer._optimizer) for group in part.param_groups}
    results: dict[str, Any] = {"weight decays": decays}
    for schedule in SCHEDULES:
        trainer = make_trainer(schedule)
        first_rates = [trainer.update(batch, step=step)["lr"] for step in range(1, INTERRUPTED_AT + 1)]  # type: ignore[index]
        checkpoint = folder / schedule
        if rank == 0:
            checkpoint.mkdir()
        dist.barrier()
        trainer.save_checkpoint(checkpoint)
        whole = [*first_rates, *train(trainer, INTERRUPTED_AT + 1)], weights_of(trainer)
        resumed = make_trainer(schedule)
        resumed.load_checkpoint(checkpoint)
        rest = train(resumed, INTERRUPTED_AT + 1), weights_of(resumed)
        longer = make_trainer(schedule, steps=2 * STEPS)
        longer.load_checkpoint(checkpoint)
        results[schedule] = {"whole": whole, "rest": rest, "longer": train(longer, INTERRUPTED_AT + 1)}
    return results


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("schedules")
    write_tiny_qwen3(folder / "model")
    return run_ranks(2, resume_in_the_middle, folder, timeout_seconds=240)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_resumed_in_the_middle_of_a_schedule_is_the_uninterrupted_one(
    resumed: list[dict[str, Any]], schedule: str
) -> None:
    for rank in resumed:
        (whole_rates, whole), (rest_rates, rest) = rank[schedule]["whole"], rank[schedule]["rest"]
        assert whole_rates == rates(schedule=schedule, **SCHEDULES[schedule])
        assert rest_rates == whole_rates[INTERRUPTED_AT:]
        assert rest.keys() == whole.keys()
        for name, value in whole.items():
            np.testing.assert_array_equal(rest[name], value, err_msg=name)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_run_with_more_steps_follows_their_curve(resumed: list[dict[str, Any]], schedule: str) -> None:
    curve = rates(2 * STEPS, schedule=schedule, **SCHEDULES[schedule])
    assert resumed[0][schedule]["longer"] == curve[INTERRUPTED_AT:STEPS]


def test_weight_decay_spares_no_parameter(resumed: list[dict[str, Any]]) -> None:
    assert resumed[0]["weight decays"] == {0.1}
