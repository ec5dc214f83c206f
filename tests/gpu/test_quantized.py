"""Quantized folders, made on a GPU and served by SGLang's own kernels."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hapo.checkpoint.quantize import Agreement, Quantization, quantize
from megatron_hapo.types import Prompt, Rollout, Sampling
from tests.quantized_model import write_prompts
from tests.sglang_ext.engine_process import generate
from tests.tiny_families import write_family

pytestmark = pytest.mark.needs("sglang", "sgl_kernel", "modelopt")
PROMPTS = [
    Prompt(uid=str(n), token_ids=ids.astype(np.int32), ground_truth="", data_source="")
    for n, ids in enumerate(np.random.default_rng(0).integers(0, 250, (16, 12)))
]


def serve(folder: Path) -> list[Rollout]:
    from sglang_ext.engine import Engine, EngineConfig

    engine = Engine(
        EngineConfig(
            model_path=folder,
            device="cuda",
            dtype="bfloat16",
            tp=1,
            max_running_requests=64,
            memory_fraction=0.3,
            kv_cache_tokens=None,
            context_tokens=128,
            seed=0,
        )
    )
    try:
        sampling = Sampling(samples=2, temperature=1.0, max_response_tokens=32, seed=1)
        return [rollout for group in generate(engine, PROMPTS, sampling) for rollout in group]
    finally:
        engine.shutdown()


def quantize_and_serve(source: Path, fmt: str) -> tuple[Agreement, list[Rollout]]:
    folder = source.with_name(fmt)
    prompts = write_prompts(source.with_name("prompts.jsonl"))
    job = Quantization(source=source, target=folder, format=fmt, calibration=prompts)  # type: ignore[arg-type]
    agreement = quantize(job)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return agreement, executor.submit(serve, folder).result(timeout=600)


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("fmt", ["fp8", "int8", "nvfp4"])
def test_a_quantized_folder_is_served_close_to_the_original(tmp_path: Path, fmt: str, experts: bool) -> None:
    if fmt == "nvfp4" and torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("SGLang serves nvfp4 natively on Blackwell only")
    case = "qwen3_moe" if experts else "qwen3"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 64, "vocab_size": 264, **({"moe_intermediate_size": 128} if experts else {})}
    source = write_family(tmp_path / "source", case, dtype="bfloat16", tokenizer=True, **sizes)
    agreement, rollouts = quantize_and_serve(source, fmt)
    assert agreement.kl < {"fp8": 0.05, "int8": 0.02, "nvfp4": 0.5}[fmt]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).cuda()
    differences = []
    for rollout in rollouts:
        tokens = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids])).long().cuda()
        with torch.no_grad():
            log_probs_TV = model(tokens[None]).logits[0].log_softmax(-1)
        picked = log_probs_TV[len(rollout.prompt.token_ids) - 1 : -1].gather(
            1, tokens[-len(rollout.response_ids) :, None]
        )
        differences.append(picked[:, 0].cpu() - torch.from_numpy(rollout.rollout_log_probs))
    assert float(torch.cat(differences).abs().mean()) < {"fp8": 0.2, "int8": 0.1, "nvfp4": 0.7}[fmt]
