"""GPU memory: a trainer rank and an engine that hold it in turn, and the optimizer on the host."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hapo.config import Config
from megatron_hapo.errors import RolloutError
from megatron_hapo.memory_turns import GRADIENTS, KV_CACHE, OPTIMIZER, WEIGHTS
from megatron_hapo.types import Prompt, Sampling, merge_scores
from tests.gpu.test_trainer import config_for
from tests.test_loop import make_config as make_run_config
from tests.tiny_model import write_tiny_qwen3
from tests.trainer.test_trainer import make_batch

LARGE: dict[str, Any] = {"layers": 24, "hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 64, "intermediate": 4096}
"""0.4 billion parameters."""
BOTH = (GRADIENTS, OPTIMIZER)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result(timeout=900)


def turns_of_an_engine(model: Path) -> dict[str, Any]:
    """Free bytes of the GPU after each step, and greedy responses before the first and after the last."""
    import torch
    from safetensors.torch import load_file

    from megatron_hapo.model.families import read_shape
    from megatron_hapo.resharding.weight_buckets import BucketBuilder, engine_cut
    from sglang_ext.engine import Engine
    from sglang_ext.engine_config import EngineConfig
    from tests.sglang_ext.engine_process import generate

    free = {"total": torch.cuda.mem_get_info()[1]}
    engine = Engine(
        EngineConfig(
            model_path=model, device="cuda", dtype="bfloat16", tp=1, max_running_requests=64, memory_fraction=0.5,
            kv_cache_tokens=None, context_tokens=256, seed=0, releases_memory=True,
        )
    )  # fmt: skip

    def greedy() -> list[list[int]]:
        ids = np.random.default_rng(0).integers(0, 250, (8, 12)).astype(np.int32)
        prompts = [Prompt(uid=str(i), token_ids=row, ground_truth="", data_source="") for i, row in enumerate(ids)]
        groups = generate(engine, prompts, Sampling(samples=1, temperature=0.0, max_response_tokens=32, seed=0))
        return [group[0].response_ids.tolist() for group in groups]

    try:
        before = greedy()
        free["all held"] = torch.cuda.mem_get_info()[0]
        engine.release_memory((KV_CACHE, WEIGHTS))
        free["given back"] = torch.cuda.mem_get_info()[0]
        with pytest.raises(RolloutError, match="has released the memory"):
            greedy()
        engine.take_memory((WEIGHTS,))
        free["weights"] = torch.cuda.mem_get_info()[0]
        bucket = BucketBuilder(max_bytes=64 << 20, checksums=engine_cut(read_shape(model), tp=1, ep=1))
        checksums: dict[str, list[int]] = {}
        engine.begin_weight_update()
        buckets = [
            b for name, tensor in load_file(model / "model.safetensors").items() for b in bucket.add(name, tensor)
        ]
        for full in [*buckets, *bucket.rest()]:
            engine.load_bucket(full)
            checksums |= full.checksums or {}
        engine.verify(checksums)
        engine.end_weight_update(1)
        engine.take_memory((KV_CACHE,))
        free["all held again"] = torch.cuda.mem_get_info()[0]
        return {"free": free, "before": before, "after": greedy()}
    finally:
        engine.shutdown()


def test_an_engine_releases_its_memory_and_is_restored_by_a_sync(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model", dtype="bfloat16", **LARGE)
    seen = in_own_process(turns_of_an_engine, model)
    free, weights = seen["free"], (model / "model.safetensors").stat().st_size
    assert free["given back"] - free["all held"] > 0.4 * free["total"]
    assert free["given back"] - free["weights"] == pytest.approx(weights, rel=0.2)
    assert abs(free["all held again"] - free["all held"]) < 0.01 * free["total"]
    assert seen["after"] == seen["before"]


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


def device_bytes_in_use() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]) << 20


@pytest.mark.parametrize("method", ["direct", "gather"])
def test_a_run_on_one_gpu_never_holds_the_sum_of_both(tmp_path: Path, method: str) -> None:
    """One engine and one rank on one GPU, with weights verified at every sync, while the GPU's memory is sampled."""
    import torch

    model, total = write_tiny_qwen3(tmp_path / "model", dtype="bfloat16", **LARGE), torch.cuda.mem_get_info()[1]
    values = make_run_config(model, tmp_path, {"tp": 1, "placement": "colocated"}).model_dump(mode="json")
    values |= {"name": "one_gpu", "device": "cuda", "steps": 3}
    values["trainer"] |= {"dtype": "bfloat16", "timeout_seconds": 900}
    values["rollout"] |= {"dtype": "bfloat16", "kv_cache_tokens": None, "memory_fraction": 0.5, "timeout_seconds": 900}
    values["weight_sync"] |= {"method": method, "bucket_bytes": 64 << 20}
    values["checkpoint"] |= {"every": 2, "hf_at_end": False}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(values))
    before, peak, ended = device_bytes_in_use(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, device_bytes_in_use())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        subprocess.run([sys.executable, "-m", "megatron_hapo", "train", str(config)], check=True, timeout=1800)
    finally:
        ended.set()
        watcher.join()
    rows = [json.loads(line) for line in (tmp_path / "one_gpu/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["rollout/logprob_abs_diff"] < 0.05 for row in rows[1:])
    parameters = (model / "model.safetensors").stat().st_size / 2
    contexts = 3 << 30  # both processes' CUDA contexts, graphs and work spaces
    in_turn = 0.5 * total + 2 * parameters + contexts
    assert peak - before < in_turn + 8 * parameters  # holding both at once would add 16 bytes per parameter


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
