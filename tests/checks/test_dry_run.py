"""`train --dry-run`: a config that loads as the same job, with its processes in comments, and nothing started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hapo import cli
from megatron_hapo.checks.dry_run import dry_run
from megatron_hapo.checks.machine import Machine
from megatron_hapo.config import load_config
from megatron_hapo.model.families import read_model_config, read_shape, shape_of
from megatron_hapo.sizing.memory import GIB
from tests.tiny_model import write_tiny_qwen3

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/demo_cpu.yaml"
HERE = Machine(cores=2, host_bytes=24 * GIB, gpus=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model") / "tiny")


def comments(text: str) -> list[str]:
    return [line[2:] for line in text.splitlines() if line.startswith("# ")]


def test_the_command_prints_a_config_of_the_same_job_and_writes_nothing(model, tmp_path, capsys) -> None:
    overrides = [f"model.path={model}", f"output_dir={tmp_path}/runs", "optimizer.lr=1e-4", "rollout.engines=2"]
    assert cli.main(["train", str(DEMO), "--dry-run", *overrides]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_config(tmp_path / "printed.yaml") == load_config(DEMO, overrides)
    assert "max_running_requests:" in printed  # a default
    assert not (tmp_path / "runs").exists()
    rows = {line[:14].strip(): line[14:].split("  ")[0:] for line in comments(printed)}
    assert {"driver", "trainer rank", "engine", "engine rank", "reward worker", "together"} <= rows.keys()


def test_a_cpu_job_counts_processes_and_memory_and_says_whether_it_fits(model) -> None:
    shape = read_shape(model)
    lines = comments(dry_run(load_config(DEMO, ["parallel.dp=2", "rollout.engines=3"]), shape, HERE))
    table = [line.split() for line in lines[lines.index(next(x for x in lines if x.startswith("process "))) + 1 :]]
    assert table[:2] == [
        ["driver", "1", "at", "least", "400", "MiB"],
        ["trainer", "rank", "2", "at", "least", "452", "MiB;", "dp", "2"],
    ]
    assert table[-1][:2] == ["together", "10"]
    assert "nodes: this one, 2 cores and 24.0 GiB of memory" in lines
    over = comments(dry_run(load_config(DEMO, ["rollout.engines=50"]), shape, HERE))
    assert over[-1].startswith("this machine cannot hold it: rollout.engines: 2 trainer ranks and 50 engines")


def test_a_gpu_job_shows_the_planners_memory_and_its_nodes() -> None:
    config = load_config(ROOT / "configs/recipe/qwen3_8b_hapo.yaml", ["device=cuda"])
    shape = shape_of(read_model_config(ROOT / "tests/fixtures/hf_configs/Qwen--Qwen3-8B-Base.json"))
    lines = comments(dry_run(config, shape, replace(HERE, gpus=0)))
    text = "\n".join(lines)
    ranks, engines = config.parallel.world_size, config.rollout.engines * config.rollout.tp
    nodes = -(-(ranks + engines) // 8)
    assert (
        f"nodes: {nodes} with 8 GPUs each; {ranks + engines} GPUs are used ({ranks} trainer, {engines} engines)" in text
    )
    (trainer,) = [line for line in lines if line.startswith("trainer rank")]
    assert " of 80.0 GiB on its GPU: weights " in trainer
    (engine,) = [line for line in lines if line.startswith("engine rank")]
    # Of 0.8 of 80 GiB the weights of 8.19 billion parameters take 15.3 GiB, shared by tp ranks.
    weights = 2 * 8_190_735_360 / config.rollout.tp / GIB
    fraction = config.rollout.memory_fraction
    assert f"{80 * 1.0:.1f} GiB of 80.0 GiB" in engine
    assert f"weights {weights:.1f}" in engine
    assert f"kv cache {80 * fraction - weights:.1f}" in engine


def test_a_faulty_config_is_refused_as_by_train(model, capsys) -> None:
    assert cli.main(["train", str(DEMO), "--dry-run", f"model.path={model}", "parallel.tp=3"]) == 2
    assert "parallel.tp: " in capsys.readouterr().err
