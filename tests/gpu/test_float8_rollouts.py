"""Engines with `rollout.quantization: fp8` on a GPU: the bits of the rounding, of a sync, and SGLang's own products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hapo.resharding.float8_rows import quantize_rows
from megatron_hapo.types import Prompt, Rollout, Sampling
from tests.gpu.test_trainer_memory import in_own_process
from tests.quantized_model import float8_row_model
from tests.tiny_families import write_family

pytestmark = pytest.mark.needs("sglang", "sgl_kernel")
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 264,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_rounds_to_the_same_bits_as_a_cpu(dtype: torch.dtype) -> None:
    """Over all magnitudes of bfloat16, subnormals too, and values half-way between two float8 numbers."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 1 << 16, (4096, 512), generator=generator).to(torch.uint16).view(torch.bfloat16)
    anything = torch.where(patterns.isfinite(), patterns, 0)
    ties = torch.randint(-512, 512, (512, 512), generator=generator).bfloat16()
    ties[:, 0] = 448  # the scale 1
    for matrix in (anything, ties, torch.randn(300, 1000, generator=generator).bfloat16()):
        ours, theirs = quantize_rows(matrix.to(dtype)), quantize_rows(matrix.to(dtype).cuda())
        assert torch.equal(ours.scale, theirs.scale.cpu())
        assert torch.equal(ours.weight.view(torch.uint8), theirs.weight.cpu().view(torch.uint8))


def serve(model: Path, folder: Path, *, read_weights: bool) -> list[Rollout]:
    """Verified rollouts of an engine that has read the folder, or got its weights in two syncs."""
    from sglang_ext.engine import Engine
    from sglang_ext.engine_config import EngineConfig
    from tests.resharding.test_direct_sync import OneEngine, make_sync
    from tests.resharding.test_float8_sync import checksums_of_export
    from tests.resharding.threaded_trainer import ThreadedTrainer
    from tests.sglang_ext.engine_process import generate

    engine: Any = Engine(
        EngineConfig(
            model_path=model, device="cuda", dtype="bfloat16", quantization="fp8", tp=1, max_running_requests=64,
            memory_fraction=0.3, kv_cache_tokens=None, context_tokens=128, seed=0, read_weights=read_weights,
            releases_memory=True, float32_logits=True,
        )
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(0, 250, (16, 12)).astype(np.int32)
    prompts = [Prompt(uid=str(n), token_ids=row, ground_truth="", data_source="") for n, row in enumerate(ids)]
    try:
        if not read_weights:
            trainer = ThreadedTrainer(model, engine_tp=1, tp=2, quantized=True)
            sync = make_sync(trainer, OneEngine(engine), folder, model, dtype="bfloat16")
            sync.sync(policy_version=1)
            engine.release_memory(("kv_cache", "weights"))
            engine.take_memory(("weights", "kv_cache"))
            sync.sync(policy_version=2)
        engine.begin_weight_update()
        engine.verify(checksums_of_export(model, tp=1))
        engine.end_weight_update(3)
        sampling = Sampling(samples=2, temperature=1.0, max_response_tokens=32, seed=1)
        return [rollout for group in generate(engine, prompts, sampling) for rollout in group]
    finally:
        engine.shutdown()


@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("read_weights", [False, True], ids=["synced", "read"])
def test_sglangs_products_agree_with_float8_arithmetic(tmp_path: Path, case: str, read_weights: bool) -> None:
    """The prefix cache and the batch are SGLang's own; only rounding that float8 amplifies separates the two."""
    from tests.resharding.test_float8_sync import log_probs_of

    experts = {"moe_intermediate_size": 128} if case == "qwen3_moe" else {}
    model = write_family(tmp_path / "model", case, tokenizer=True, **SIZES, **experts)
    rollouts = in_own_process(_serve, model, tmp_path / "s", read_weights)
    found = torch.from_numpy(np.concatenate([rollout.rollout_log_probs for rollout in rollouts]))
    exact, simulated = (
        log_probs_of(float8_row_model(model, quantized=quantized), rollouts) for quantized in (False, True)
    )
    assert (found - simulated).abs().mean() < (found - exact).abs().mean() / 2


def _serve(model: Path, folder: Path, read_weights: bool) -> list[Rollout]:
    return serve(model, folder, read_weights=read_weights)
