"""Runs that a machine cannot hold are refused in one line before anything starts; the tests say what it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hapo import cli
from megatron_hapo.checks.machine import Machine, check_gpus, machine_faults, this_machine
from megatron_hapo.checks.preflight import load_checked_config
from megatron_hapo.config import load_config
from megatron_hapo.errors import ConfigError
from megatron_hapo.model.families import Shape, read_shape
from megatron_hapo.sizing.memory import GIB
from megatron_hapo.sizing.processes import processes_of
from tests.tiny_model import write_tiny_qwen3

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/demo_cpu.yaml"
BIG = Machine(cores=64, host_bytes=512 * GIB, gpus=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def shape(model) -> Shape:
    return read_shape(model)


def faults(shape: Shape, on: Machine, *overrides: str, trains: bool = True) -> list[str]:
    return [str(fault) for fault in machine_faults(load_config(DEMO, overrides), shape, on, trains=trains)]


def test_fifty_engines_on_two_cores_are_refused_in_one_line(shape) -> None:
    on = Machine(cores=2, host_bytes=24 * GIB, gpus=0)
    assert faults(shape, on) == []
    assert faults(shape, on, "rollout.engines=50", "parallel.dp=1") == [
        "rollout.engines: 1 trainer rank and 50 engines of tp=1 are 51 computing processes, too many for 2 cores, "
        "which can hold 32"
    ]
    (ranks,) = faults(shape, on, "parallel.dp=32", "rollout.engines=1")
    assert ranks.startswith("parallel: 32 trainer ranks and 1 engine of tp=1 are 33 computing processes")
    (memory,) = faults(shape, on, "rollout.engines=30", trains=False)
    assert memory.startswith("rollout.engines: 30 engines of tp=1 need at least 37.")
    assert faults(shape, BIG, "rollout.engines=30", "parallel.dp=4", trains=False) == []


def test_memory_counts_every_process_with_its_share_of_the_model(shape) -> None:
    """Of a tiny model mostly the programs count: 400 + 2 * 450 + 3 * (600 + 650) + 40 = 5090 MiB."""
    overrides = ("rollout.engines=3", "parallel.dp=2", "reward.workers=1", "trainer.distributed_optimizer=true")
    config = load_config(DEMO, overrides)
    processes = {kind.name: kind for kind in processes_of(config, shape, device="cpu")}
    assert {name: kind.count for name, kind in processes.items()} == {
        "driver": 1, "trainer rank": 2, "engine": 3, "engine rank": 3, "reward worker": 1
    }  # fmt: skip
    cache = config.rollout.kv_cache_tokens
    assert cache is not None
    kv = cache * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
    weights = 4 * parameters(shape)
    assert processes["engine rank"].host_bytes == (650 << 20) + weights + kv
    # Float32 weights and gradients; two moments, sharded over the two ranks.
    assert processes["trainer rank"].host_bytes == pytest.approx((450 << 20) + 2 * weights + weights, rel=1e-6)
    needed = sum(kind.count * kind.host_bytes for kind in processes.values())
    assert needed == pytest.approx(5090 << 20, rel=0.02)
    assert faults(shape, Machine(cores=2, host_bytes=needed, gpus=0), *overrides) == []
    (fault,) = faults(shape, Machine(cores=2, host_bytes=needed - 1, gpus=0), *overrides)
    assert fault.startswith("rollout.engines: 2 trainer ranks and 3 engines of tp=1 need at least 5.")
    assert " GiB of memory, and this machine has 5." in fault


def parameters(shape: Shape) -> int:
    """Counted by hand for a Qwen3 with tied embeddings."""
    h, f, d = shape.hidden_size, shape.ffn_size, shape.head_dim
    attention = 2 * h * d * (shape.num_heads + shape.num_kv_heads) + 2 * d
    tied = shape.vocab_size * h * (1 if shape.tied_embeddings else 2)
    return tied + shape.num_layers * (attention + 3 * h * f + 2 * h) + h


def test_a_machine_with_too_few_gpus_is_found_before_ray_starts(shape) -> None:
    gpu = ("device=auto", "parallel.tp=2", "parallel.dp=2", "rollout.engines=3")
    eight, six, two = (Machine(cores=8, host_bytes=64 * GIB, gpus=count) for count in (8, 6, 2))
    assert faults(shape, eight, *gpu) == []
    (fault,) = faults(shape, six, *gpu)
    assert "3 engines of tp=1 need 3 GPUs beside the 4 of the trainer, and there are 6 in all" in fault
    (fault,) = faults(shape, two, *gpu)
    assert fault.startswith(
        "parallel: 4 trainer ranks need as many GPUs, and this node has 2; start the run with torchrun"
    )
    (fault,) = faults(shape, two, *gpu, trains=False)
    assert "3 engines of tp=1 need 3 GPUs, and there are 2 in all" in fault
    assert faults(shape, BIG, *gpu) == []  # device=auto without GPUs: the CPU


def test_rays_gpus_are_checked_where_it_joins_a_cluster() -> None:
    config = load_config(DEMO, ["parallel.tp=2", "parallel.dp=2", "rollout.engines=3"])
    check_gpus(config, here=4, everywhere=7)
    with pytest.raises(ConfigError, match=r"parallel: 4 trainer ranks need .* this node has 2; .*torchrun"):
        check_gpus(config, here=2, everywhere=16)
    with pytest.raises(
        ConfigError, match=r"3 engines of tp=1 need 3 GPUs beside the 4 of the trainer, and there are 6"
    ):
        check_gpus(config, here=4, everywhere=6)
    check_gpus(config.model_copy(update={"placement": "colocated"}), here=4, everywhere=4)


def test_this_machine_is_known() -> None:
    here = this_machine()
    assert here.cores >= 1
    assert here.host_bytes > GIB


@pytest.mark.parametrize("command", ["train", "check", "eval"])
def test_every_command_that_starts_processes_refuses_at_once(model, tmp_path, monkeypatch, capsys, command) -> None:
    monkeypatch.setattr("megatron_hapo.checks.preflight.this_machine", lambda: Machine(2, 24 * GIB, 0))
    arguments = [command, str(DEMO), f"model.path={model}", f"output_dir={tmp_path}", "rollout.engines=50"]
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("command line: rollout.engines: ")
    assert "too many for 2 cores" in line


def test_a_cluster_that_ray_joins_may_be_larger_than_this_machine(model, monkeypatch) -> None:
    monkeypatch.setattr("megatron_hapo.checks.preflight.this_machine", lambda: Machine(2, 24 * GIB, 0))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    overrides = [f"model.path={model}", "rollout.engines=50"]
    assert load_checked_config(DEMO, overrides, writes=False, starts="all").rollout.engines == 50
