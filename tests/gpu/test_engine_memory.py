"""GPU memory of an engine, and of a run whose engine and rank hold it in turn."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hapo.errors import RolloutError
from megatron_hapo.memory_turns import KV_CACHE, WEIGHTS
from megatron_hapo.types import Prompt, Sampling
from tests.gpu.test_trainer_memory import LARGE, in_own_process
from tests.tiny_model import write_tiny_qwen3

pytestmark = pytest.mark.needs("sglang", "sgl_kernel", "ray")


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


def device_bytes_in_use() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]) << 20


@pytest.mark.parametrize("method", ["direct", "gather"])
def test_a_run_on_one_gpu_never_holds_the_sum_of_both(tmp_path: Path, method: str) -> None:
    """One engine and one rank on one GPU, with weights verified at every sync, while the GPU's memory is sampled."""
    import torch

    from tests.test_loop import make_config as make_run_config

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
