"""A run whose model.path is a Megatron checkpoint and that exports while it trains, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_hapo import cli
from megatron_hapo.checkpoint.model_folder import INDEX
from megatron_hapo.config import dump_config
from tests.test_loop import make_config
from tests.time_limits import patient


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    assert tensors.keys() == json.loads((folder / INDEX).read_text())["weight_map"].keys()
    return tensors


@pytest.mark.slow
def test_a_run_starts_from_a_megatron_folder_and_exports_while_training(tiny_qwen3: Path, tmp_path: Path) -> None:
    """The engines have no weights to load, so their log-probs depend on the first sync."""
    megatron = tmp_path / "megatron"
    assert cli.main(["convert", "hf-to-megatron", str(tiny_qwen3), str(megatron)]) == 0
    dump_config(make_config(megatron, tmp_path / "runs", {"tp": 2}), tmp_path / "run.yaml")
    command = [sys.executable, "-m", "megatron_hapo", "train", str(tmp_path / "run.yaml"), "checkpoint.hf_every=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(900))
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "tp2"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["rollout/logprob_abs_diff_max"] < 2e-3 for row in steps)

    assert sorted(path.name for path in (run / "hf_steps").iterdir()) == ["step_00000001", "step_00000002"]
    start = load_file(tiny_qwen3 / "model.safetensors")
    first, second = (read_folder(run / "hf_steps" / f"step_0000000{step}") for step in (1, 2))
    last = read_folder(run / "hf")
    for name, value in start.items():
        assert not torch.equal(first[name], value), name
        assert not torch.equal(second[name], first[name]), name
        assert torch.equal(last[name], second[name]), name
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "hf_steps" / "step_00000001")
    tokenizer = AutoTokenizer.from_pretrained(run / "hf_steps" / "step_00000001")
    assert tokenizer.chat_template
    assert torch.equal(model.model.norm.weight, first["model.norm.weight"])

    command = [sys.executable, "-m", "megatron_hapo", "eval", str(tmp_path / "run.yaml"), f"model.path={run / 'hf'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(600))
    assert done.returncode == 0, done.stderr[-3000:]
    printed = dict(line.split(":") for line in done.stdout.splitlines() if line.startswith("eval/"))
    evaluated = {name: value for name, value in steps[-1].items() if name.startswith("eval/")}
    assert {name: f"{value:.4g}" for name, value in evaluated.items()} == {k: v.strip() for k, v in printed.items()}
    assert evaluated["eval/response_length"] > 1
