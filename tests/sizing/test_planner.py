"""The planner: what fits, in which order, why the rest is rejected, and what the command prints and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hapo import cli
from megatron_hapo.checks import preflight
from megatron_hapo.checks.preflight import check_run
from megatron_hapo.config import Config, load_config
from megatron_hapo.errors import HapoError
from megatron_hapo.sizing import from_config
from megatron_hapo.sizing.memory import GIB, engine_memory, trainer_memory, turns_on_shared_gpu
from megatron_hapo.sizing.parameters import model_parameters, stage_layers, stage_parameters
from megatron_hapo.sizing.search import Cluster, LayoutPlan, Limits, Placement, search
from megatron_hapo.sizing.throughput import (
    GPUS,
    Workload,
    decode_parameters,
    generate_seconds,
    model_flops,
    train_seconds,
)
from tests.sizing.test_sizing_memory import QWEN3_8B
from tests.test_cli import run_folder, started  # noqa: F401  # fixtures
from tests.time_limits import patient

HF_CONFIGS = Path(__file__).parents[1] / "fixtures/hf_configs"
QWEN3_8B_CONFIG = str(HF_CONFIGS / "Qwen--Qwen3-8B.json")
WORKLOAD = Workload(
    prompts_per_step=512,
    samples_per_prompt=16,
    prompts_per_minibatch=32,
    mean_prompt_tokens=200,
    mean_response_tokens=3000,
    max_prompt_tokens=1024,
    max_response_tokens=12288,
)


def plans_for(gpus: int, *, gib: int = 80, placement: Placement = "disaggregated", max_cp: int = 1) -> list[LayoutPlan]:
    cluster = Cluster(gpus=gpus, gpu_bytes=gib * GIB, gpu=GPUS["h100"], placement=placement)
    return search(QWEN3_8B, WORKLOAD, cluster, Limits(max_cp=max_cp))[0]


@pytest.mark.parametrize("gpus", [8, 64, 512])
def test_every_plan_fits_its_gpus_and_the_longest_sequence(gpus: int) -> None:
    plans = plans_for(gpus, max_cp=4)
    assert plans == sorted(plans, key=lambda plan: plan.rank)
    for plan in plans:
        assert plan.trainer.total <= 80 * GIB
        assert plan.layout.sizes.world_size + plan.engines * plan.rollout_tp <= gpus
        assert plan.layout.tokens_per_microbatch >= WORKLOAD.longest
        assert plan.layout.sizes.tp <= 8
        assert list(plan.layout.sizes.faults(QWEN3_8B.num_layers)) == []
        assert plan.engine.kv_tokens >= WORKLOAD.longest
        assert 0 < plan.time.mfu < 0.6


def test_layers_that_do_not_divide_give_the_end_stages_fewer() -> None:
    cluster = Cluster(gpus=64, gpu_bytes=80 * GIB, gpu=GPUS["h100"], placement="colocated")
    shape = replace(QWEN3_8B, num_layers=94)
    plans, _ = search(shape, WORKLOAD, cluster, Limits())
    sizes = {
        plan.layout.sizes.pp: [len(stage_layers(shape, plan.layout, stage)) for stage in range(plan.layout.sizes.pp)]
        for plan in plans
    }
    assert sizes[4] == [23, 24, 24, 23]
    assert sizes[2] == [47, 47]


def test_more_gpus_and_shared_gpus_are_faster() -> None:
    times = [plans_for(gpus)[0].time.total for gpus in (8, 64, 512)]
    assert times == sorted(times, reverse=True)
    # Taking turns on all GPUs is faster than two halves that wait for each other, as long as nothing overlaps.
    assert plans_for(64, placement="colocated")[0].time.total < times[1]


def test_a_rejection_names_the_largest_part() -> None:
    cluster = Cluster(gpus=8, gpu_bytes=80 * GIB, gpu=GPUS["h100"])
    _, rejections = search(QWEN3_8B, WORKLOAD, cluster, Limits())
    reasons = {rejection.what: rejection.reason for rejection in rejections}
    alone = reasons["tp=1 pp=1 cp=1 ep=1 dp=1, 13312 tokens, recompute none, optimizer on the host"]
    assert "but a GPU has 80.0 GiB; the largest part is activations with 63.1 GiB" in alone


def test_a_model_that_fits_nowhere_is_one_error() -> None:
    with pytest.raises(HapoError, match=r"no layout of 2 GPUs of 40 GiB fits; nearest: .* the largest part is"):
        plans_for(2, gib=40)
    with pytest.raises(
        HapoError, match=r"has room for an engine: rollout.tp=8: weights of 1.9 GiB leave room for 0 tokens"
    ):
        plans_for(8, gib=2)


def test_the_optimizer_is_offloaded_only_if_it_does_not_fit() -> None:
    """With two GPUs, one trains, and cannot hold 91.5 GiB of master weights and moments."""
    for plan in plans_for(2):
        assert plan.layout.cpu_offload
        assert plan.trainer.optimizer == 0
    for plan in plans_for(8):
        gpu_bytes, kept = 80 * GIB, replace(plan.layout, cpu_offload=False)
        without = trainer_memory(QWEN3_8B, kept, gpu_bytes=gpu_bytes, num_microbatches=1)
        assert without.optimizer > 0
        if plan.layout.cpu_offload:
            assert trainer_memory(QWEN3_8B, kept, gpu_bytes=gpu_bytes).total > gpu_bytes


@pytest.mark.parametrize("gpus", [8, 64])
def test_on_shared_gpus_every_turn_fits(gpus: int) -> None:
    for plan in plans_for(gpus, placement="colocated"):
        assert plan.layout.sizes.world_size == gpus
        assert plan.engines * plan.rollout_tp <= gpus
        assert plan.engine.kv_tokens >= WORKLOAD.longest
        turns = turns_on_shared_gpu(plan.trainer, plan.engine)
        assert max(turns.values()) <= 80 * GIB
        alone = engine_memory(
            QWEN3_8B, tp=plan.rollout_tp, gpu_bytes=80 * GIB, memory_fraction=Limits().memory_fraction,
            num_parameters=model_parameters(QWEN3_8B),
        )  # fmt: skip
        # The trainer's weights reduce the engine's cache, not what it needs besides weights and cache.
        assert plan.engine.kv_cache <= alone.kv_cache - plan.trainer.resting()
        assert plan.engine.runtime >= alone.runtime


def test_engines_in_float8_are_smaller_and_read_less() -> None:
    """On GPUs of 16 GiB the weights of Qwen3-8B leave no room in 16 bits; in float8 an engine needs one GPU."""
    choices: dict[str, LayoutPlan] = {}
    for quantization in ("none", "fp8"):
        limits = Limits(rollout_quantization=quantization)
        cluster = Cluster(gpus=64, gpu_bytes=16 * GIB, gpu=GPUS["h100"])
        plans, rejections = search(QWEN3_8B, WORKLOAD, cluster, limits)
        choices[quantization] = min(plans, key=lambda plan: plan.rollout_tp)
        assert ("rollout.tp=1" in {rejection.what for rejection in rejections}) == (quantization == "none")
    assert choices["none"].rollout_tp > choices["fp8"].rollout_tp == 1
    sizes = {"tp": 1, "engines": 4, "running": 64}
    plain = generate_seconds(QWEN3_8B, WORKLOAD, GPUS["h100"], **sizes)
    assert generate_seconds(QWEN3_8B, WORKLOAD, GPUS["h100"], **sizes, bytes_per_linear_weight=1) < 0.9 * plain


def test_a_reference_model_costs_host_memory_and_a_forward_pass_and_nothing_on_the_gpu() -> None:
    cluster = Cluster(gpus=64, gpu_bytes=80 * GIB, gpu=GPUS["h100"])
    plans = {has: search(QWEN3_8B, WORKLOAD, cluster, Limits(has_reference=has))[0] for has in (False, True)}
    assert all(plan.trainer.host_reference == 0 for plan in plans[False])
    for plan in plans[True]:
        alone = replace(plan.layout, has_reference=False)
        assert plan.trainer.host_reference == plan.trainer.weights
        without = trainer_memory(QWEN3_8B, alone, gpu_bytes=80 * GIB)
        assert trainer_memory(QWEN3_8B, plan.layout, gpu_bytes=80 * GIB).total == without.total
        score, update, bubble = train_seconds(QWEN3_8B, alone, WORKLOAD, GPUS["h100"], nvlink_size=8)
        with_reference = train_seconds(QWEN3_8B, plan.layout, WORKLOAD, GPUS["h100"], nvlink_size=8)
        # Two exchanges; in each the weights of both models cross a link of 0.7 x 55 GB/s.
        weights = 2 * max(stage_parameters(QWEN3_8B, alone, stage).total for stage in range(alone.sizes.pp))
        assert with_reference == pytest.approx((2 * score + 4 * weights / (0.7 * 55e9), update, bubble))


def test_no_more_data_parallel_ranks_than_responses() -> None:
    cluster = Cluster(gpus=64, gpu_bytes=80 * GIB, gpu=GPUS["h100"])
    plans, rejections = search(QWEN3_8B, replace(WORKLOAD, prompts_per_minibatch=1), cluster, Limits())
    assert max(plan.layout.sizes.dp for plan in plans) <= 16
    assert any("a mini-batch has 16 responses, fewer than dp=" in rejection.reason for rejection in rejections)


def test_a_token_costs_two_operations_per_weight_and_the_attention() -> None:
    """8.19 billion parameters, without the embedding, which is not a matrix product; norms are within the tolerance."""
    flops = model_flops(QWEN3_8B, tokens=1, length=0, response_share=1)
    assert flops == pytest.approx(2 * (8.19e9 - 151936 * 4096), rel=0.001)
    attention = model_flops(QWEN3_8B, tokens=1, length=1000, response_share=1) - flops
    assert attention == 2 * 1000 * 4096 * 36


def test_generation_waits_for_the_longest_response_and_gains_from_more_engines() -> None:
    def seconds(**options: int) -> float:
        return generate_seconds(QWEN3_8B, WORKLOAD, GPUS["h100"], **{"tp": 1, "engines": 8, "running": 256, **options})

    assert seconds(engines=16) < seconds() < seconds(running=64)
    # With any number of engines, every token of the longest response reads all weights once.
    least = WORKLOAD.max_response_tokens * 2 * decode_parameters(QWEN3_8B, tokens=1) / GPUS["h100"].memory_bandwidth
    assert seconds(engines=4096) > least


def test_the_command_prints_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", QWEN3_8B_CONFIG, "--gpus", "64", "--max-response", "12288"]) == 0
    out = capsys.readouterr().out
    assert "64 x h100 of 80 GiB, disaggregated" in out
    for word in ("weights", "grads", "optim.", "activ.", "logits", "KV", "sync", "MFU", "largest part is"):
        assert word in " ".join(out.split()), word
    assert "…" not in out


def test_json_has_the_same_plans_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", QWEN3_8B_CONFIG, "--gpus", "8", "--json", "--top", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["plans"]) == 2
    best = answer["plans"][0]
    assert best["trainer_bytes"]["total"] <= 80 * GIB
    assert {"reason", "what"} == answer["rejected"][0].keys()


def test_the_written_config_has_a_plan_that_fits(
    run_folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    (run_folder / "plans").mkdir()
    command = [
        "plan",
        "run.yaml",
        "--model",
        QWEN3_8B_CONFIG,
        "--gpus",
        "16",
        "--write",
        "plans/planned.yaml",
        "--json",
    ]
    assert cli.main([*command, "--write", "plans/planned.yaml", "--json"]) == 0
    config = load_config("plans/planned.yaml", [f"model.path={QWEN3_8B_CONFIG}"])
    assert config.name == "small"
    plans = json.loads(capsys.readouterr().out)["plans"]
    layout = from_config.layout_of(config)
    assert layout.sizes.world_size + config.rollout.engines * config.rollout.tp <= 16
    assert layout.tokens_per_microbatch >= 500
    assert any(plan["layout"]["tp"] == layout.sizes.tp for plan in plans)


def test_a_colocated_plan_is_written_and_passes_its_own_check(
    run_folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_model(run_folder)
    command = ["plan", "run.yaml", "--gpus", "8", "--placement", "colocated", "--write", "planned.yaml", "--json"]
    assert cli.main(command) == 0
    best = json.loads(capsys.readouterr().out)["plans"][0]
    on_gpus = ["device=cuda", "parallel.gpu_memory=80GiB", "model.spec=te"]
    config = load_config("planned.yaml", on_gpus)
    assert config.placement == "colocated"
    assert config.parallel.world_size == 8
    assert config.rollout.memory_fraction == best["rollout"]["memory_fraction"] < 0.8
    assert check_run(config) == []
    (fault,) = check_run(load_config("planned.yaml", [*on_gpus, "rollout.memory_fraction=0.95"]))
    assert str(fault).startswith("rollout.memory_fraction: does not fit: an engine with 0.95 of a GPU of 80.0 GiB")
    # Memory that the trainer rank keeps counts during the engine's turn.
    keeps = ["memory_turns.trainer=gradients", f"rollout.memory_fraction={config.rollout.memory_fraction + 0.1:.2f}"]
    assert [fault.key for fault in check_run(load_config("planned.yaml", [*on_gpus, *keeps]))] == [
        "rollout.memory_fraction"
    ]
    # Planning from the written config again gives the same engine.
    assert cli.main(["plan", "planned.yaml", "--gpus", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["rollout"] == best["rollout"]


def test_a_written_plan_may_have_more_engine_ranks_than_key_value_heads(
    run_folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Qwen3-235B-A22B has 4 heads and needs 8 GPUs; on a CPU SGLang does not replicate heads, so this is rejected."""
    model = Path(QWEN3_8B_CONFIG).with_name("Qwen--Qwen3-235B-A22B.json")
    (run_folder / "model/config.json").write_text(model.read_text())
    assert cli.main(["plan", "run.yaml", "--gpus", "256", "--write", "planned.yaml"]) == 0
    on_gpus = ["device=cuda", "parallel.gpu_memory=80GiB", "model.spec=te"]
    config = load_config("planned.yaml", on_gpus)
    assert config.rollout.tp == 8
    assert check_run(config) == []
    faults = check_run(load_config("planned.yaml", ["device=cpu", "rollout.kv_cache_tokens=20000"]))
    assert "4 key-value heads" in next(fault.message for fault in faults if fault.key == "rollout.tp")


BAD_PLANS = {
    "nothing to plan": (["--gpus", "8"], "plan: needs a CONFIG or --model"),
    "invalid memory": (
        ["--model", QWEN3_8B_CONFIG, "--gpus", "8", "--gpu-memory", "eighty"],
        "--gpu-memory: must be a size like 80GiB or 141GB, got 'eighty'",
    ),
    "no GPUs": (["--model", QWEN3_8B_CONFIG, "--gpus", "0"], "--gpus: must be at least 1, got 0"),
    "no number of GPUs": (["--model", QWEN3_8B_CONFIG], "--gpus: is required without a CONFIG"),
    "negative response length": (
        ["--model", QWEN3_8B_CONFIG, "--gpus", "8", "--max-response", "-5"],
        "--max-response: must be at least 1, got -5",
    ),
    "empty prompt": (
        ["--model", QWEN3_8B_CONFIG, "--gpus", "8", "--max-prompt", "0"],
        "--max-prompt: must be at least 1, got 0",
    ),
    "mean of zero": (
        ["--model", QWEN3_8B_CONFIG, "--gpus", "8", "--mean-response", "0"],
        "--mean-response: must be at least 1, got 0",
    ),
    "a mean above the longest": (
        ["--model", QWEN3_8B_CONFIG, "--gpus", "8", "--mean-response", "5000", "--max-response", "1000"],
        "--mean-response: must be at most the longest response of 1000 tokens, got 5000",
    ),
    "too long": (
        ["--model", QWEN3_8B_CONFIG, "--gpus", "8", "--max-response", "100000"],
        "the longest prompt and response together have 101024 tokens, more than the model's 40960 positions; "
        "lower --max-response",
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_invalid_arguments_are_a_one_line_error(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD_PLANS[case]
    assert cli.main(["plan", *arguments]) == cli.EXIT_FAULT
    assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--placement", "colocated"], "rollout.tp=1: engine and trainer rank together need 10.9 GiB"),
        ([], "placement=disaggregated needs at least 2 GPUs, got 1; use placement=colocated to share it\n"),
    ],
)
def test_one_small_gpu_is_rejected_with_a_reason(
    run_folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    sizes = [
        "--gpus",
        "1",
        "--nvlink-size",
        "1",
        "--gpu-memory",
        "10GiB",
        "--max-response",
        "300",
        "--max-prompt",
        "100",
    ]
    assert cli.main(["plan", "--model", "model", *sizes, *arguments]) == cli.EXIT_FAULT
    assert message in capsys.readouterr().err


def write_model(folder: Path) -> None:
    (folder / "model/config.json").write_text(Path(QWEN3_8B_CONFIG).read_text())


def test_train_rejects_a_layout_that_cannot_fit(
    run_folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is loaded; on a CPU nothing is rejected."""
    write_model(run_folder)
    fits = ["parallel.tp=4", "parallel.dp=4", "rollout.tp=2"]
    assert check_run(load_config("run.yaml", ["device=cuda", "parallel.gpu_memory=80GiB", *fits])) == []
    assert cli.main(["train", "run.yaml", "device=cuda", "parallel.gpu_memory=80GiB"]) == cli.EXIT_FAULT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("command line: parallel: does not fit: a trainer rank")
    assert "GiB, but a GPU has 80.0 GiB; the largest part is activations with" in line
    assert cli.main(["train", "run.yaml", "device=cuda", "parallel.gpu_memory=9GiB", *fits]) == cli.EXIT_FAULT
    first, second = capsys.readouterr().err.splitlines()
    assert "parallel: does not fit" in first
    assert "rollout.tp: does not fit: at tp=2 the weights take 7.6 GiB of a GPU of 9.0 GiB" in second
    assert check_run(load_config("run.yaml", ["device=cpu", "rollout.kv_cache_tokens=600", "rollout.tp=8"])) == []


@pytest.mark.parametrize(
    ("spec", "installed", "rank", "command"),
    [
        ("auto", False, "a trainer rank without Transformer Engine needs", "plan CONFIG model.spec=local"),
        ("auto", True, "a trainer rank needs", "plan"),
        ("local", True, "a trainer rank without Transformer Engine needs", "plan"),
        ("te", False, "a trainer rank needs", "plan"),
    ],
)
def test_the_error_names_the_layers_that_it_assumes(
    run_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
    installed: bool,
    rank: str,
    command: str,
) -> None:
    write_model(run_folder)
    monkeypatch.setattr(from_config.importlib.util, "find_spec", lambda name: installed or None)
    asked = ["device=cuda", "parallel.gpu_memory=80GiB", f"model.spec={spec}"]
    (fault,) = check_run(load_config("run.yaml", asked))
    assert fault.message.startswith(f"does not fit: {rank} ")
    assert fault.message.endswith(f"; `megatron-hapo {command}` finds layouts that fit")


def test_the_plan_names_the_layers_that_it_assumes(
    run_folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_model(run_folder)
    word = "Layers: Transformer Engine is assumed"
    for asked, line in (([], True), (["model.spec=te"], False), (["model.spec=local"], False)):
        assert cli.main(["plan", "run.yaml", *asked, "--gpus", "8", "--top", "1"]) == 0
        assert capsys.readouterr().out.startswith(word) is line
    assert cli.main(["plan", "run.yaml", "model.spec=local", "--gpus", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spec"] == "local"


def test_train_rejects_a_model_that_no_engine_can_serve(run_folder: Path) -> None:  # noqa: F811
    experts = json.loads((HF_CONFIGS / "Qwen--Qwen3-30B-A3B.json").read_text())
    asked = ["device=cuda", "parallel.tp=4", "parallel.dp=4", "parallel.ep=4", "rollout.tp=4"]
    for setting in ({}, {"mlp_only_layers": [1]}, {"tie_word_embeddings": True}):
        (run_folder / "model/config.json").write_text(json.dumps(experts | setting))
        faults = [fault for fault in check_run(load_config("run.yaml", asked)) if "no engine can serve" in str(fault)]
        assert [*setting] == [name for fault in faults for name in experts if f"({name}" in str(fault)]


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys\nfrom megatron_hapo import cli\n"
        f"assert cli.main(['plan', '--model', {QWEN3_8B_CONFIG!r}, '--gpus', '8', '--json']) == 0\n"
        "assert not {'torch', 'megatron', 'sglang', 'ray', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=patient(120))


def test_an_automatic_layout_is_resolved_for_the_gpus_of_this_machine(
    run_folder: Path,  # noqa: F811
    started: list[Config],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_model(run_folder)
    (run_folder / "auto.yaml").write_text("base: run.yaml\nparallel: auto\ndevice: cuda\n")
    monkeypatch.setattr(from_config, "local_gpus", lambda: [])
    assert cli.main(["train", "auto.yaml"]) == cli.EXIT_FAULT
    assert "auto.yaml: parallel: auto uses the GPUs of this machine" in capsys.readouterr().err
    monkeypatch.setattr(from_config, "local_gpus", lambda: [80 * GIB] * 8)
    monkeypatch.setattr(preflight, "compiler_faults", lambda: iter(()))  # this machine may have no nvcc
    assert cli.main(["train", "auto.yaml", "seed=3"]) == 0
    (config,) = started
    assert config.seed == 3
    assert config.parallel.world_size + config.rollout.engines * config.rollout.tp <= 8
    assert config.parallel.world_size > 1
    assert check_run(config) == []
    (run_folder / "shared.yaml").write_text("base: auto.yaml\nplacement: colocated\nrollout: {engines: 16}\n")
    assert cli.main(["train", "shared.yaml"]) == 0
    config = started[1]
    assert config.parallel.world_size == config.rollout.engines * config.rollout.tp == 8
    assert config.rollout.memory_fraction < 0.8
    assert check_run(config) == []
