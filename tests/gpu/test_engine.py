"""One SGLang engine on a GPU, with its own kernels, CUDA graphs and bfloat16; the self-test runs when it starts."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_hapo.entropy import EntropyStats
from megatron_hapo.types import AdaptiveTemperature, Prompt, Rollout, Sampling
from tests.sglang_ext.engine_process import generate
from tests.tiny_model import write_tiny_qwen3

pytestmark = pytest.mark.needs("sglang", "sgl_kernel")


def run_engine(model: Path, tp: int = 1, *, deterministic: bool = False) -> dict[str, list[Rollout]]:
    from sglang_ext.engine import Engine
    from sglang_ext.engine_config import EngineConfig

    engine = Engine(
        EngineConfig(
            model_path=model,
            device="cuda",
            dtype="bfloat16",
            tp=tp,
            max_running_requests=64,
            memory_fraction=0.3,
            kv_cache_tokens=None,
            context_tokens=256,
            seed=0,
            deterministic=deterministic,
        )
    )
    try:
        generator = np.random.default_rng(0)
        prompts = [
            Prompt(
                uid=str(number),
                token_ids=generator.integers(0, 250, 12).astype(np.int32),
                ground_truth="",
                data_source="",
            )
            for number in range(16)
        ]
        plain = Sampling(samples=4, temperature=1.0, max_response_tokens=64, seed=1)
        stats = EntropyStats(pivot=1.0, log_max=1.8, log_min=0.0, rms=1.0, num_tokens=1)
        adaptive = replace(plain, adaptive=AdaptiveTemperature(stats=stats, tau=0.3))

        def flat(sampling: Sampling) -> list[Rollout]:
            return [rollout for group in generate(engine, prompts, sampling) for rollout in group]

        return {"first": flat(plain), "again": flat(plain), "adaptive": flat(adaptive)}
    finally:
        engine.shutdown()


def test_an_engine_passes_its_self_test_and_repeats_its_seeds(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model", hidden=256, heads=4, kv_heads=2, head_dim=64)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        rollouts = executor.submit(run_engine, model).result(timeout=600)
    same = [
        np.array_equal(a.response_ids, b.response_ids)
        for a, b in zip(rollouts["first"], rollouts["again"], strict=True)
    ]
    assert np.mean(same) > 0.9  # rounding depends on the batch shape
    temperatures = np.concatenate([rollout.temperatures for rollout in rollouts["adaptive"]])
    assert 0.7 - 1e-6 <= temperatures.min() < temperatures.max() <= 1.3 + 1e-6


def test_deterministic_mode_repeats_every_bit(tmp_path: Path) -> None:
    """Also behind hits in the prefix cache, which the second time serves every prompt; and in another engine."""
    model = write_tiny_qwen3(tmp_path / "model", hidden=256, heads=4, kv_heads=2, head_dim=64)
    bits = []
    for _ in range(2):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
            rollouts = executor.submit(run_engine, model, deterministic=True).result(timeout=600)
        for name in ("first", "again"):
            bits.append([(r.response_ids.tobytes(), r.rollout_log_probs.tobytes()) for r in rollouts[name]])
    assert bits[0] == bits[1] == bits[2] == bits[3]
