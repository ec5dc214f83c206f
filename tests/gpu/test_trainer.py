"""One trainer rank on a GPU: NCCL, bfloat16, and Transformer Engine if it is installed."""

from __future__ import annotations

import importlib.util
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hapo.config import Config
from megatron_hapo.types import merge_scores
from tests.tiny_model import write_tiny_qwen3
from tests.trainer.test_trainer import make_batch, make_config

pytestmark = pytest.mark.needs("megatron.core")
SPECS = [
    "local",
    pytest.param(
        "te",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed"
        ),
    ),
]


def config_for(model: Path, *, dtype: str, spec: str) -> Config:
    values = make_config(model, {"tp": 1}).model_dump()
    values["device"] = "cuda"
    values["model"]["spec"] = spec
    values["trainer"]["dtype"] = dtype
    values["rollout"]["temperature"] = 1.0
    return Config.model_validate(values)


def train(config: Config, rendezvous: str) -> dict[str, Any]:
    from megatron_hapo.trainer.rank_process import start_rank

    rank = start_rank(config, device="cuda", rank=0, world_size=1, init_method=rendezvous)
    batch = make_batch()
    before = merge_scores([rank.log_probs(batch)], batch)
    scored = replace(batch, old_log_probs=before.log_probs, token_data={"modulation": np.zeros_like(before.log_probs)})
    updates = [rank.update(scored, step=step) for step in range(1, 6)]
    after = merge_scores([rank.log_probs(batch)], batch)
    return {
        "before": before,
        "after": after,
        "updates": updates,
        "cpu_module": "megatron_hapo.model.megatron_on_cpu" in sys.modules,
    }


def in_own_process(config: Config, folder: Path) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(train, config, f"file://{folder / 'rendezvous'}").result(timeout=300)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_a_rank_scores_like_transformers_and_learns(tmp_path: Path, spec: str, dtype: str, tolerance: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    if spec == "te" and dtype == "float32":
        pytest.skip("Transformer Engine's packed attention supports 16-bit types only")
    # A head dimension that the fused attention kernels support.
    model_path = write_tiny_qwen3(tmp_path / "model", hidden=256, heads=4, kv_heads=2, head_dim=64)
    result = in_own_process(config_for(model_path, dtype=dtype, spec=spec), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    batch, start, expected = make_batch(), 0, []
    for length, response in zip(batch.sequence_lengths, batch.response_lengths, strict=True):
        tokens = torch.from_numpy(batch.token_ids[start : start + length].astype(np.int64))
        start += length
        with torch.no_grad():
            log_probs = torch.log_softmax(model(tokens[None]).logits[0, -response - 1 : -1], -1)
        expected.append(log_probs.gather(1, tokens[-response:, None])[:, 0])
    difference = np.abs(result["before"].log_probs - torch.cat(expected).numpy())
    assert difference.mean() < tolerance
    advantages = np.repeat(batch.advantages, batch.response_lengths)
    change = result["after"].log_probs - result["before"].log_probs
    assert (change * np.sign(advantages)).mean() > 0
    assert not result["cpu_module"], "the CPU compatibility module was imported on a GPU"


@pytest.mark.parametrize("spec", SPECS)
def test_a_rank_reads_what_convert_wrote(tmp_path: Path, spec: str) -> None:
    """Conversion uses local layers on CPUs; Transformer Engine's layers have extra state that it does not write."""
    model = write_tiny_qwen3(tmp_path / "model", hidden=256, heads=4, kv_heads=2, head_dim=64, dtype="bfloat16")
    megatron = tmp_path / "megatron"
    command = [sys.executable, "-m", "megatron_hapo", "convert", "hf-to-megatron", str(model), str(megatron)]
    subprocess.run(command, check=True, timeout=300)
    scores = []
    for folder in (model, megatron):
        (tmp_path / folder.name / "run").mkdir()
        config = config_for(folder, dtype="bfloat16", spec=spec)
        scores.append(in_own_process(config, tmp_path / folder.name / "run")["before"].log_probs)
    assert np.array_equal(*scores)
