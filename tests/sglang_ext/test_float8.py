"""An engine on the CPU serves a folder that `megatron-hapo quantize --format fp8` wrote, with its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hapo.launch.quantize import Quantization, quantize
from megatron_hapo.types import Sampling
from tests.quantized_model import quantized_logits, write_prompts
from tests.sglang_ext.engine_process import running_engine
from tests.sglang_ext.test_engine import make_prompts
from tests.tiny_model import write_tiny_qwen3


@pytest.mark.slow
def test_a_quantized_folder_is_served_with_its_scales(tmp_path: Path) -> None:
    source, folder = write_tiny_qwen3(tmp_path / "source", dtype="bfloat16"), tmp_path / "fp8"
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    quantize(Quantization(source=source, target=folder, format="fp8", calibration=prompts))
    with running_engine(folder, dtype="bfloat16") as engine:
        groups = engine.generate(make_prompts(8), Sampling(samples=2, temperature=1.0, max_response_tokens=24, seed=1))
    rollouts = [rollout for group in groups for rollout in group]
    sequences = [np.concatenate([rollout.prompt.token_ids, rollout.response_ids]).tolist() for rollout in rollouts]

    def mean_difference(logits: list[torch.Tensor]) -> float:
        """Of the response tokens' log-probs from those that the engine reports."""
        differences = []
        for rollout, logits_TV in zip(rollouts, logits, strict=True):
            log_probs_RV = logits_TV[len(rollout.prompt.token_ids) - 1 : -1].log_softmax(-1)
            tokens_R = torch.from_numpy(rollout.response_ids).long()[:, None]
            differences.append(log_probs_RV.gather(1, tokens_R)[:, 0] - torch.from_numpy(rollout.rollout_log_probs))
        return float(torch.cat(differences).abs().mean())

    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        unquantized = mean_difference([original(torch.tensor([tokens])).logits[0] for tokens in sequences])
    found = mean_difference(quantized_logits(folder, source, sequences, exact_kv=True))
    assert found < 0.02  # of bfloat16, in which the engine computes
    assert found < unquantized / 2
