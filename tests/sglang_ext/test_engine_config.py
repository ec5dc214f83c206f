"""What an engine's config becomes in SGLang's arguments, and what is refused before SGLang starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hapo.errors import RolloutError
from sglang_ext.engine_config import EngineConfig, check_engine_config, server_arguments


@pytest.fixture
def on_gpu(tiny_qwen3: Path) -> EngineConfig:
    return EngineConfig(
        model_path=tiny_qwen3,
        device="cuda",
        dtype="bfloat16",
        tp=1,
        max_running_requests=64,
        memory_fraction=0.5,
        kv_cache_tokens=None,
        context_tokens=512,
        seed=0,
    )


def test_float32_is_refused_on_a_gpu(on_gpu: EngineConfig) -> None:
    check_engine_config(on_gpu)
    with pytest.raises(RolloutError, match=r"^dtype=float32 is for CPUs: .*; set rollout.dtype: bfloat16$"):
        check_engine_config(replace(on_gpu, dtype="float32"))
    check_engine_config(replace(on_gpu, dtype="float32", device="cpu", kv_cache_tokens=4096))


def test_prefills_have_no_graphs_on_a_gpu(on_gpu: EngineConfig) -> None:
    """They would stay allocated while a trainer uses the GPU."""
    assert server_arguments(on_gpu, returns_routes=False)["disable_prefill_cuda_graph"] is True
    on_cpu = server_arguments(replace(on_gpu, device="cpu"), returns_routes=False)
    assert "disable_prefill_cuda_graph" not in on_cpu


def test_float32_logits_are_asked_of_sglang(on_gpu: EngineConfig) -> None:
    assert server_arguments(on_gpu, returns_routes=False)["enable_fp32_lm_head"] is False
    wide = replace(on_gpu, float32_logits=True)
    assert server_arguments(wide, returns_routes=False)["enable_fp32_lm_head"] is True


def test_float8_is_allocated_as_such_in_an_engine_without_weights(on_gpu: EngineConfig) -> None:
    """One that reads a folder loads 16 bits and rounds them layer by layer."""
    assert "quantization" not in server_arguments(on_gpu, returns_routes=False)
    quantized = replace(on_gpu, quantization="fp8")
    arguments = server_arguments(quantized, returns_routes=False)
    assert arguments["quantization"] == "w8a8_fp8"
    assert "json_model_override_args" not in arguments
    without = server_arguments(replace(quantized, read_weights=False), returns_routes=False)
    assert json.loads(without["json_model_override_args"])["quantization_config"]["quant_method"] == "w8a8_fp8"
    on_cpu = replace(quantized, device="cpu", kv_cache_tokens=4096)
    check_engine_config(on_cpu)
    with pytest.raises(RolloutError, match=r"quantization=fp8 needs dtype=bfloat16, got float32; set rollout.dtype"):
        check_engine_config(replace(on_cpu, dtype="float32"))


def test_deterministic_inference_is_asked_of_sglang_on_a_gpu(on_gpu: EngineConfig) -> None:
    """With its own choice of the attention backend; on a CPU, where SGLang refuses it, `batch_invariance` is used."""
    assert server_arguments(on_gpu, returns_routes=False)["enable_deterministic_inference"] is False
    exact = replace(on_gpu, deterministic=True)
    arguments = server_arguments(exact, returns_routes=False)
    assert arguments["enable_deterministic_inference"] is True
    assert "attention_backend" not in arguments
    on_cpu = replace(exact, device="cpu", kv_cache_tokens=4096, tp=2)
    assert "enable_deterministic_inference" not in server_arguments(on_cpu, returns_routes=False)
    check_engine_config(on_cpu)
    with pytest.raises(RolloutError, match=r"tp=4 must be 1 or 2 with deterministic: true on a CPU"):
        check_engine_config(replace(on_cpu, tp=4))
