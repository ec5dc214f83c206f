"""GPU memory of a trainer rank: what it releases for engines and restores, and the optimizer on the host."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hapo.config import Config
from megatron_hapo.memory_turns import GRADIENTS, OPTIMIZER
from megatron_hapo.types import merge_scores
from tests.gpu.test_trainer import config_for
from tests.tiny_model import write_tiny_qwen3
from tests.trainer.test_trainer import make_batch

pytestmark = pytest.mark.needs("megatron.core")

LARGE: dict[str, Any] = {"layers": 24, "hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 64, "intermediate": 4096}
"""0.4 billion parameters."""
BOTH = (GRADIENTS, OPTIMIZER)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result(timeout=900)


def turns_of_a_rank(config: Config, rendezvous: str) -> dict[str, Any]:
    """GPU bytes that torch has reserved, and whether the optimizer's state was restored exactly."""
    import torch

    from megatron_hapo.trainer.offload import optimizer_tensors
    from megatron_hapo.trainer.rank_process import start_rank

    def reserved() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    rank = start_rank(config, device="cuda", rank=0, world_size=1, init_method=rendezvous)
    batch = make_batch()
    scores = merge_scores([rank.log_probs(batch)], batch)
    batch = replace(batch, old_log_probs=scores.log_probs, token_data={"modulation": np.zeros_like(scores.log_probs)})
    first = rank.update(batch, step=1)
    before, held = [tensor.cpu().clone() for tensor in optimizer_tensors(rank._optimizer)], reserved()
    rank.release_memory(BOTH)
    after_release = reserved()
    scores_meanwhile = merge_scores([rank.log_probs(batch)], batch)
    rank.take_memory(BOTH[::-1])
    after = [tensor.cpu() for tensor in optimizer_tensors(rank._optimizer)]
    return {
        "freed": held - after_release,
        "held_again": reserved(),
        "held": held,
        "same": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "parameters": sum(parameter.numel() for parameter in rank.model[0].parameters()),
        "moved": float(np.abs(scores_meanwhile.log_probs - scores.log_probs).mean()),
        "updates": [first, rank.update(batch, step=2)],
    }


def test_a_rank_releases_its_memory_and_restores_it(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model", dtype="bfloat16", **LARGE)
    config = config_for(model, dtype="bfloat16", spec="local")
    seen = in_own_process(turns_of_a_rank, config, f"file://{tmp_path / 'rendezvous'}")
    assert seen["same"]
    # Gradients, master weights and two moments, all in float32.
    assert seen["freed"] == pytest.approx(16 * seen["parameters"], rel=0.05)
    assert seen["held_again"] == pytest.approx(seen["held"], rel=0.05)
    assert seen["moved"] > 0
    assert all(np.isfinite(update["grad_norm"]) for update in seen["updates"])


def updates_of(config: Config, rendezvous: str, folder: Path, source: Path | None) -> dict[str, Any]:
    """Three updates, the third from a checkpoint; the place of the optimizer's state, and the weights."""
    import torch

    from megatron_hapo.trainer.offload import optimizer_tensors
    from megatron_hapo.trainer.rank_process import start_rank

    rank = start_rank(config, device="cuda", rank=0, world_size=1, init_method=rendezvous)
    batch = make_batch()
    scores = merge_scores([rank.log_probs(batch)], batch)
    batch = replace(batch, old_log_probs=scores.log_probs, token_data={"modulation": np.zeros_like(scores.log_probs)})
    updates = [rank.update(batch, step=1), rank.update(batch, step=2)]
    folder.mkdir()
    rank.save_checkpoint(folder)
    rank.load_checkpoint(source or folder)
    updates.append(rank.update(batch, step=3))
    weights = {name: value.detach().float().cpu().numpy() for name, value in rank._named_parameters()}
    model = {id(value) for value in rank.model[0].parameters()}
    state = [t for t in optimizer_tensors(rank._optimizer) if id(t) not in model and t.dtype == torch.float32]
    return {
        "updates": updates,
        "weights": weights,
        "state_on_gpu": sum(tensor.nbytes for tensor in state if tensor.is_cuda),
        "parameters": sum(value.size for value in weights.values()),
    }


def test_an_optimizer_on_the_host_trains_like_one_on_the_gpu_and_reads_its_checkpoints(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model", hidden=256, heads=4, kv_heads=2, head_dim=64, dtype="bfloat16")
    config = config_for(model, dtype="bfloat16", spec="local")
    offloaded = Config.model_validate(
        {**config.model_dump(), "optimizer": {**config.optimizer.model_dump(), "cpu_offload": True}}
    )
    kept = in_own_process(updates_of, config, f"file://{tmp_path / 'a'}", tmp_path / "kept", None)
    moved = in_own_process(updates_of, offloaded, f"file://{tmp_path / 'b'}", tmp_path / "moved", tmp_path / "kept")
    assert kept["state_on_gpu"] > 8 * kept["parameters"]
    assert moved["state_on_gpu"] == 0
    for mine, other in zip(moved["updates"], kept["updates"], strict=True):
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.02)
    # Adam rounds differently on the host; a weight halfway between two bfloat16 values may round either way.
    for name, value in kept["weights"].items():
        close = np.isclose(moved["weights"][name], value, rtol=0.01, atol=1e-4)
        assert close.mean() > 0.999, name
