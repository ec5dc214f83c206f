"""An engine on the CPU serves a folder that `megatron-hapo quantize --format fp8` wrote, with its scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hapo.checkpoint.quantize import Quantization, quantize
from megatron_hapo.resharding.float8_rows import quantize_rows
from megatron_hapo.types import Sampling
from sglang_ext.float8 import per_token_quant_fp8, scaled_product
from tests.quantized_model import quantized_logits, write_prompts
from tests.sglang_ext.engine_process import running_engine
from tests.sglang_ext.test_engine import make_prompts
from tests.tiny_model import write_tiny_qwen3


def test_a_product_is_that_of_the_values_that_float8_stands_for() -> None:
    """Inputs with a scale a token, weights with a scale a row, transposed as SGLang holds them."""
    x, w, bias = torch.randn(5, 48).bfloat16(), torch.randn(7, 48).bfloat16(), torch.randn(7).bfloat16()
    x[2] = 0
    quantized, x_scale = per_token_quant_fp8(x, 48)
    weight, weight_scale = quantize_rows(w)
    got = scaled_product(quantized, weight.t(), x_scale, weight_scale, x.shape, [5, 7], bias, torch.bfloat16)
    values = [(rows.double() * scale.double()) for rows, scale in ((quantized, x_scale), (weight, weight_scale))]
    expected = values[0] @ values[1].t() + bias.double()
    torch.testing.assert_close(got, expected.bfloat16(), rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(values[0], x.double(), rtol=2**-4, atol=float(x_scale.max()) * 2**-9)


@pytest.mark.slow
def test_a_quantized_folder_is_served_with_its_scales(tmp_path: Path) -> None:
    source, folder = write_tiny_qwen3(tmp_path / "source", dtype="bfloat16"), tmp_path / "fp8"
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    quantize(Quantization(source=source, target=folder, format="fp8", calibration=prompts))
    with running_engine(folder, dtype="bfloat16") as engine:
        groups = engine.generate(make_prompts(8), Sampling(samples=2, temperature=1.0, max_response_tokens=24, seed=1))
    rollouts = [rollout for group in groups for rollout in group]
    sequences = [np.concatenate([rollout.prompt.token_ids, rollout.response_ids]).tolist() for rollout in rollouts]

    def log_probs(logits: list[torch.Tensor]) -> torch.Tensor:
        """[N] float32, log-probs of all response tokens under these logits."""
        picked = []
        for rollout, logits_TV in zip(rollouts, logits, strict=True):
            log_probs_RV = logits_TV[len(rollout.prompt.token_ids) - 1 : -1].log_softmax(-1)
            picked.append(log_probs_RV.gather(1, torch.from_numpy(rollout.response_ids).long()[:, None])[:, 0])
        return torch.cat(picked)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        original = log_probs([model(torch.tensor([tokens])).logits[0] for tokens in sequences])
    found = torch.from_numpy(np.concatenate([rollout.rollout_log_probs for rollout in rollouts])) - original
    expected = log_probs(quantized_logits(folder, source, sequences, exact_kv=True)) - original
    # In bfloat16 some activations round to the other neighbour in float8, each a difference of 6%: the errors are not
    # equal, but those of the same quantization. If the scales were ignored, there would be no correlation.
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.5
    assert 0.5 < found.std() / expected.std() < 1.5
