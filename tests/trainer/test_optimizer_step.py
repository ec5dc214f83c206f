"""Our own step of Megatron's optimizer: the weights of `optimizer.step()`, without a second norm, and on a CPU those of
AdamW's many passes in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import run_ranks
from tests.tiny_families import write_family
from tests.trainer.small_batches import make_batch, make_config
from tests.trainer.test_trainer import make_grid

LR = 0.05
CASES = [
    # Model, layout, dtype, clip_grad: of a norm of about 0.5, one that clips and one that does not.
    ("dense", {"dp": 2}, "bfloat16", 0.01),
    ("dense", {"dp": 2}, "bfloat16", 100.0),
    ("dense", {"tp": 2, "distributed_optimizer": False}, "bfloat16", 0.01),
    ("dense", {"tp": 2, "distributed_optimizer": False}, "float32", 0.01),
    ("experts", {"dp": 2, "ep": 2}, "float32", 0.01),  # two optimizers in one, whose norm is common
]


def updated(
    models: Path,
    case: tuple[str, dict[str, Any], str, float],
    *,
    by_megatron: bool = False,
    save_to: Path | None = None,
    load_from: Path | None = None,
) -> tuple[Any, float]:
    """This rank's weights after two updates, and the last norm; a checkpoint may be written between them, or take the
    place of the first."""
    from megatron.core import parallel_state

    from megatron_hapo.trainer import trainer_rank

    model, layout, dtype, clip_grad = case
    config = make_config(models / model, layout, lr=LR, clip_grad=clip_grad)
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"dtype": dtype})})
    own_step = trainer_rank.take_step
    if by_megatron:
        trainer_rank.take_step = lambda optimizer, grad_norm: optimizer.step()  # type: ignore[assignment]
    try:
        trainer = trainer_rank.TrainerRank(config, make_grid(config))
        batch = make_batch()
        batch = replace(
            batch,
            old_log_probs=batch.rollout_log_probs - 5,
            token_data={"modulation": batch.rollout_log_probs},
        )
        if load_from is None:
            trainer.update(batch, step=1)
        else:
            trainer.load_checkpoint(load_from)
        if save_to is not None:
            trainer.save_checkpoint(save_to)
        metrics = trainer.update(batch, step=2)
    finally:
        trainer_rank.take_step = own_step
    weights = [parameter.detach().float().numpy().copy() for chunk in trainer.model for parameter in chunk.parameters()]
    parallel_state.destroy_model_parallel()
    assert metrics is not None
    return weights, metrics["grad_norm"]


def compare(rank: int, models: Path, number: int) -> None:
    from megatron_hapo.trainer import optimizer

    ours, norm = updated(models, CASES[number])
    keep, optimizer._norm_on_the_device = optimizer._norm_on_the_device, lambda: None
    clip_grads: Any = optimizer.clip_grads
    clip_grads.l2_norm_impl = optimizer.local_multi_tensor_l2_norm
    try:
        theirs, megatrons_norm = updated(models, CASES[number], by_megatron=True)
    finally:
        optimizer._norm_on_the_device = keep
    assert norm == pytest.approx(megatrons_norm, rel=1e-6)
    for got, want in zip(ours, theirs, strict=True):
        # The norms differ in their last bit, and so may a rounded weight.
        np.testing.assert_allclose(got, want, rtol=1e-2 if CASES[number][2] == "bfloat16" else 1e-5, atol=1e-6)


def all_cases(rank: int, models: Path) -> None:
    for number in range(len(CASES)):
        compare(rank, models, number)


def in_one_pass_or_many(rank: int, folder: Path) -> None:
    import torch.distributed as dist

    from megatron_hapo.trainer import optimizer

    for number, case in enumerate(CASES):
        checkpoint = folder / str(number)
        if rank == 0:
            checkpoint.mkdir()
        dist.barrier()
        keep, optimizer._step_in_one_pass = optimizer._step_in_one_pass, lambda optimizer: None
        many, _ = updated(folder, case, save_to=checkpoint)
        optimizer._step_in_one_pass = keep
        one, _ = updated(folder, case)
        resumed, _ = updated(folder, case, load_from=checkpoint)
        assert any((a != b).any() for a, b in zip(many, one, strict=True)) or case[2] == "bfloat16"
        for others in (one, resumed):
            assert_equal_but_for_rounding(others, many, dtype=case[2])


def assert_equal_but_for_rounding(got: list[np.ndarray], want: list[np.ndarray], *, dtype: str) -> None:
    """Adam divides by the gradient's magnitude. So where a gradient is nearly 0, its rounding counts for more: in
    float32 for one weight of a thousand up to a hundredth of the step."""
    rtol, atol = (1e-2, 1e-4) if dtype == "bfloat16" else (1e-4, 1e-5)
    got_N, want_N = (np.concatenate([weight.ravel() for weight in weights]) for weights in (got, want))
    is_off_N = ~np.isclose(got_N, want_N, rtol=rtol, atol=atol)
    assert is_off_N.mean() <= (0 if dtype == "bfloat16" else 1e-3)
    np.testing.assert_allclose(got_N[is_off_N], want_N[is_off_N], rtol=0, atol=0.01 * LR)


def test_a_step_is_megatrons_without_a_second_norm(tmp_path: Path) -> None:
    write_family(tmp_path / "dense", "qwen3")
    write_family(tmp_path / "experts", "qwen3_moe")
    run_ranks(2, all_cases, tmp_path, timeout_seconds=240)


def test_one_pass_over_the_parameters_takes_the_step_of_many_also_after_a_checkpoint_of_theirs(tmp_path: Path) -> None:
    write_family(tmp_path / "dense", "qwen3")
    write_family(tmp_path / "experts", "qwen3_moe")
    run_ranks(2, in_one_pass_or_many, tmp_path, timeout_seconds=240)
