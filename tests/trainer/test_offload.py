"""Releasing memory between updates, or an optimizer on the host, leaves training unchanged bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hapo.config import Config
from megatron_hapo.memory_turns import GRADIENTS, OPTIMIZER
from megatron_hapo.types import merge_scores
from tests.distributed import run_ranks
from tests.tiny_families import write_family
from tests.tiny_model import write_tiny_qwen3
from tests.trainer.test_trainer import make_batch, make_config, make_grid

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    # Model, layout, dtype. With bfloat16 the optimizer's own parameters are master weights, else views of the model's.
    "sharded": ("dense", {"dp": 2}, "float32"),
    "sharded, masters": ("dense", {"dp": 2, "overlap": True}, "bfloat16"),
    "whole": ("dense", {"dp": 2, "distributed_optimizer": False}, "float32"),
    "whole, masters": ("dense", {"tp": 2, "distributed_optimizer": False}, "bfloat16"),
    "experts": ("moe", {"dp": 2, "ep": 2}, "float32"),
}
BOTH = (GRADIENTS, OPTIMIZER)


def config_of(folder: Path, case: str) -> Config:
    model, layout, dtype = CASES[case]
    config = make_config(folder / model, layout)
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={"dtype": dtype})})


def train_both_ways(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Trains with and without engines' turns and compares; returns bytes `freed` by each turn, `held` by gradients."""
    from megatron.core import parallel_state

    seen = {}
    for case in CASES:
        config, trained = config_of(folder, case), {}
        for turns in (False, True):
            trained[turns] = train(config, turns=turns, checkpoint=folder / f"{case} {turns}")
            parallel_state.destroy_model_parallel()
        with_turns, without = trained[True], trained[False]
        assert with_turns["steps"] == without["steps"]
        assert with_turns["tensors"].keys() == without["tensors"].keys()
        for name, tensor in without["tensors"].items():
            assert torch.equal(with_turns["tensors"][name], tensor), (case, name)
        seen[case] = {"freed": with_turns["freed"], "held": with_turns["held"]}
    return seen


def train(config: Config, *, turns: bool, checkpoint: Path, source: Path | None = None) -> dict[str, Any]:
    """Two updates, a checkpoint, and a third update from it, or from another one, with engines' turns or without."""
    import torch.distributed as dist

    from megatron_hapo.trainer.optimizer import wait_for_weights
    from megatron_hapo.trainer.trainer_rank import TrainerRank

    trainer = TrainerRank(config, make_grid(config))
    batch = make_batch()
    scores: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(scores, trainer.log_probs(batch))
    before = merge_scores(scores, batch)
    batch = replace(batch, old_log_probs=before.log_probs, token_data={"modulation": np.zeros_like(before.log_probs)})
    freed: list[int] = []

    def engines_turn() -> None:
        if turns:
            freed.append(release_and_check(trainer))
            trainer.take_memory(BOTH[::-1])

    engines_turn()  # before the first step Adam has no moments
    steps = [trainer.update(batch, step=1)]
    engines_turn()
    steps.append(trainer.update(batch, step=2))
    if dist.get_rank() == 0:
        checkpoint.mkdir()
    dist.barrier()
    trainer.save_checkpoint(checkpoint)
    trainer.load_checkpoint(source or checkpoint)
    engines_turn()
    steps.append(trainer.update(batch, step=3))
    wait_for_weights(trainer._chunks)
    return {
        "steps": steps,
        "inner": getattr(trainer._optimizer, "chained_optimizers", [trainer._optimizer])[0].optimizer,
        "tensors": {f"{kind} {number}": t for kind, ts in kept(trainer).items() for number, t in enumerate(ts)},
        "freed": freed,
        "held": sum(buffer.grad_data.nbytes for buffer in buffers_of(trainer)),
    }


def release_and_check(trainer: Any) -> int:
    """Releases all memory; returns the bytes of the optimizer that this freed. Weights can still be read."""
    from megatron_hapo.trainer.optimizer import wait_for_weights

    wait_for_weights(trainer._chunks)
    before = {name: value.detach().clone() for name, value in trainer._named_parameters()}
    storages = list({s._cdata: s for s in trainer._memory.optimizer_storages()}.values())
    num_bytes = sum(storage.nbytes() for storage in storages)
    trainer.release_memory(BOTH)
    trainer.release_memory(BOTH)  # the second call has no effect
    assert [storage.nbytes() for storage in storages] == [0] * len(storages)
    assert [buffer.grad_data.untyped_storage().nbytes() for buffer in buffers_of(trainer)] == [0] * len(
        buffers_of(trainer)
    )
    for parameter in trainer.model[0].parameters():
        assert parameter.main_grad.untyped_storage().nbytes() == 0
    for call in (lambda: trainer.update(make_batch(), step=1), lambda: trainer.save_checkpoint(Path("nowhere"))):
        with pytest.raises(AssertionError, match="call take_memory first"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in trainer._named_parameters())
    list(trainer.weight_buckets(verify=False))  # weights can be read
    return num_bytes


def buffers_of(trainer: Any) -> list[Any]:
    return [buffer for chunk in trainer._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def kept(trainer: Any) -> dict[str, list[torch.Tensor]]:
    from megatron_hapo.trainer.offload import optimizer_tensors

    return {
        "weight": [value.detach().clone() for _, value in trainer._named_parameters()],
        "optimizer": [tensor.detach().clone() for tensor in optimizer_tensors(trainer._optimizer)],
    }


class HostTensor(torch.Tensor):
    """Stands for a tensor in host memory, as does whatever is computed from it; all other tensors stand for a GPU's."""


def simulate_a_gpu_in_the_hybrid_optimizer() -> None:
    """Megatron's HybridDeviceOptimizer offloads only CUDA tensors: let it see all but its own copies as such."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    find_parameters = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def find_parameters_on_the_gpu(self: Any, offload_fraction: float) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: not isinstance(tensor, HostTensor)))
            patch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.as_subclass(HostTensor))
            return find_parameters(self, offload_fraction)

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = find_parameters_on_the_gpu


def train_with_and_without_host(rank: int, folder: Path) -> None:
    """Neither the place of the optimizer's state nor that of the run that wrote the checkpoint changes anything."""
    from megatron.core import parallel_state
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    simulate_a_gpu_in_the_hybrid_optimizer()
    trained: list[dict[str, Any]] = []
    for offload in (False, True):
        config = config_of(folder, "sharded, masters")
        config = config.model_copy(
            update={"optimizer": config.optimizer.model_copy(update={"cpu_offload": offload, "weight_decay": 0.1})}
        )
        trained.append(train(config, turns=False, checkpoint=folder / f"{offload}", source=folder / "False"))
        assert isinstance(trained[-1]["inner"], HybridDeviceOptimizer) == offload
        parallel_state.destroy_model_parallel()
    kept, moved = trained
    assert moved["steps"] == kept["steps"]
    for name in (name for name in kept["tensors"] if name.startswith("weight")):
        assert torch.equal(moved["tensors"][name], kept["tensors"][name]), name


def test_an_optimizer_on_the_host_gives_the_same_training(tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path / "dense")
    run_ranks(2, train_with_and_without_host, tmp_path, timeout_seconds=240)


def test_releasing_memory_does_not_change_training(tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path / "dense")
    write_family(tmp_path / "moe", "qwen3_moe")
    for seen in run_ranks(2, train_both_ways, tmp_path, timeout_seconds=240):
        for case, (_, _, dtype) in CASES.items():
            at_first, after_a_step, after_loading = seen[case]["freed"]
            held = seen[case]["held"]  # 4 bytes a parameter
            masters = 4 if dtype == "bfloat16" else 0
            share = 1 if "whole" in case else 2
            if case != "experts":  # where not everything is shared by two
                assert at_first == pytest.approx(masters * held / 4 / share, rel=0.02)
                assert after_a_step == pytest.approx((masters + 8) * held / 4 / share, rel=0.02)
            assert 0 < after_a_step == pytest.approx(after_loading, rel=0.02)
