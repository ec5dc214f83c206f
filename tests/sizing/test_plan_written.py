"""`plan --write` writes a config of the planned job that `train` accepts, or nothing and a one-line error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_hapo import cli
from megatron_hapo.checks import preflight
from megatron_hapo.checks.preflight import check_run
from megatron_hapo.config import Config, load_config
from megatron_hapo.sizing import from_config
from megatron_hapo.sizing.memory import GIB
from tests.sizing.test_planner import HF_CONFIGS, QWEN3_8B_CONFIG
from tests.test_cli import run_folder, started  # noqa: F401  # fixtures

ON_GPUS = ["device=cuda", "model.spec=te"]
QWEN3_30B_A3B = HF_CONFIGS / "Qwen--Qwen3-30B-A3B.json"


@pytest.fixture
def folder(run_folder: Path) -> Path:  # noqa: F811
    """The current directory, which has run.yaml and an 8B model."""
    (run_folder / "model/config.json").write_text(Path(QWEN3_8B_CONFIG).read_text())
    return run_folder


def planned(*arguments: str) -> Config:
    """The config that `plan ... --write` wrote; checks that `train` accepts it."""
    assert cli.main(["plan", *arguments, "--write", "planned.yaml", "--json"]) == 0
    config = load_config("planned.yaml", ON_GPUS)
    on_known_gpus = [] if config.parallel.gpu_memory else ["parallel.gpu_memory=80GiB"]
    assert check_run(load_config("planned.yaml", [*ON_GPUS, *on_known_gpus])) == []
    return config


def test_the_file_has_the_overrides_of_the_command_line(folder: Path) -> None:
    (folder / "model").rename(folder / "other")
    asked = ["seed=7", "optimizer.lr=2e-6", "parallel.gpu_memory=60GiB", "data.train.limit=5"]
    lengths = ["--max-response", "3000", "--max-prompt", "200"]
    config = planned("run.yaml", *asked, "--gpus", "8", "--model", "other/config.json", *lengths)
    assert (config.seed, config.optimizer.lr, config.parallel.gpu_memory) == (7, 2e-6, "60GiB")
    assert (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens) == (200, 3000)
    assert config.model.path == Path("other")
    # A flag takes precedence over key=value, as in the plan itself.
    config = planned(
        "run.yaml", "rollout.max_response_tokens=90", "model.path=none", "--gpus", "8", "--model", "other", *lengths
    )
    assert (config.rollout.max_response_tokens, config.model.path) == (3000, Path("other"))


def test_the_memory_of_a_gpu_is_the_configs_unless_a_flag_overrides_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "large.yaml").write_text("base: run.yaml\nparallel: {gpu_memory: 141GB}\n")
    assert cli.main(["plan", "large.yaml", "--gpus", "8"]) == 0
    assert "8 x h100 of 131 GiB" in capsys.readouterr().out
    assert planned("large.yaml", "--gpus", "8", "--gpu-memory", "80GiB").parallel.gpu_memory == "80GiB"


SETTINGS_IN_THE_WAY = {
    "uneven stages": (
        "parallel: {pp: 2, vpp: 1, first_stage_layers: 17}",
        ["--gpus", "8", "--placement", "colocated"],
    ),
    "generation ahead": (
        "async: {max_staleness: 1}\nalgorithm: {importance_correction: {level: token}}\n"
        "weight_sync: {in_flight: pause}",
        ["--gpus", "8", "--placement", "colocated"],
    ),
    "engines on separate nodes": ("launch: {engines: own_nodes}", ["--gpus", "8", "--placement", "colocated"]),
    "statistics of a micro-batch": (
        "algorithm: {entropy: {source: micro_batch}}\nrollout: {max_response_tokens: 12288}",
        ["--gpus", "8"],
    ),
    "an unsharded optimizer": ("trainer: {distributed_optimizer: false}", ["--gpus", "8"]),
}


@pytest.mark.parametrize("case", SETTINGS_IN_THE_WAY)
def test_the_plan_overrides_contradicting_settings_of_the_base(case: str, folder: Path) -> None:
    text, arguments = SETTINGS_IN_THE_WAY[case]
    (folder / "base.yaml").write_text(f"base: run.yaml\n{text}\n")
    planned("base.yaml", *arguments)


@pytest.mark.parametrize("parallel", ["{dp: 8}", "auto"])
def test_engine_sizes_are_consistent(
    parallel: str,
    folder: Path,
    started: list[Config],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The base has rollout.ep=8; a plan with fewer engine ranks must override it, also when `train` plans."""
    (folder / "model/config.json").write_text(QWEN3_30B_A3B.read_text())
    (folder / "base.yaml").write_text(f"base: run.yaml\nparallel: {parallel}\nrollout: {{tp: 8, ep: 8}}\n")
    config = planned("base.yaml", "--gpus", "32")
    assert config.rollout.tp < 8
    if parallel == "auto":
        monkeypatch.setattr(from_config, "local_gpus", lambda: [80 * GIB] * 32)
        monkeypatch.setattr(preflight, "compiler_faults", lambda: iter(()))  # this machine may have no nvcc
        assert cli.main(["train", "base.yaml", "device=cuda"]) == 0
        assert started[0].rollout.tp < 8
        assert started[0].rollout.ep in (1, started[0].rollout.tp)


def test_plan_resolves_an_automatic_layout_for_other_machines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the error of `train` suggests; settings that need several ranks are accepted before the sizes are known."""
    (folder / "auto.yaml").write_text("base: run.yaml\nparallel: auto\n")
    config = planned("auto.yaml", "trainer.overlap_communication=true", "--gpus", "8")
    assert config.parallel.world_size > 1
    assert config.trainer.overlap_communication
    assert "auto" not in (folder / "planned.yaml").read_text().replace("auto.yaml", "")
    assert planned("run.yaml", "parallel=auto", "--gpus", "8").parallel == config.parallel
    capsys.readouterr()
    assert cli.main(["plan", "auto.yaml"]) == cli.EXIT_FAULT
    assert capsys.readouterr().err == "--gpus: is required, because auto.yaml has parallel: auto\n"


def test_the_default_number_of_gpus_is_that_of_the_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["parallel.tp=2", "parallel.dp=4", "rollout.engines=4", "rollout.tp=2"]
    assert cli.main(["plan", "run.yaml", *asked]) == 0
    assert "16 x h100" in capsys.readouterr().out
    assert cli.main(["plan", "run.yaml", *asked, "placement=colocated"]) == 0
    assert "8 x h100" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_a_one_line_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target, reason in (
        ("none/planned.yaml", "cannot be written: No such file or directory"),
        ("run.yaml/planned.yaml", "cannot be written: Not a directory"),
        ("model", "is not a file"),
        ("run.yaml", "base.yaml builds on this file; write to another one"),
    ):
        (folder / "base.yaml").write_text("base: run.yaml\n")
        assert cli.main(["plan", "base.yaml", "--gpus", "8", "--write", target]) == cli.EXIT_FAULT
        output = capsys.readouterr()
        assert (output.out, output.err) == ("", f"--write: {target}: {reason}\n")


def test_a_config_that_train_would_reject_is_not_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An existing file is kept."""
    (folder / "planned.yaml").write_text("name: before\n")
    (folder / "base.yaml").write_text("base: run.yaml\nlaunch: {ray_worker_ports: [20000, 20010]}\n")
    names = sorted(path.name for path in folder.iterdir())
    assert cli.main(["plan", "base.yaml", "--gpus", "64", "--write", "planned.yaml"]) == cli.EXIT_FAULT
    (line,) = capsys.readouterr().err.splitlines()
    assert "base.yaml: launch.ray_worker_ports: must span at least" in line
    assert (folder / "planned.yaml").read_text() == "name: before\n"
    assert sorted(path.name for path in folder.iterdir()) == names


def test_the_file_is_written_before_the_tables_are_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader such as `head` may close the pipe early."""

    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("megatron_hapo.sizing.command.print_plans", closed)
    with pytest.raises(BrokenPipeError):
        cli.main(["plan", "run.yaml", "--gpus", "8", "--write", "planned.yaml"])
    load_config("planned.yaml")


def test_without_a_config_the_file_can_be_used_as_a_base(folder: Path) -> None:
    arguments = ["--model", "model", "--gpus", "8", "--max-response", "2000"]
    assert cli.main(["plan", *arguments, "--write", "part.yaml", "--json"]) == 0
    (folder / "whole.yaml").write_text("base: [run.yaml, part.yaml]\n")
    config = load_config("whole.yaml", ON_GPUS)
    assert config.rollout.max_response_tokens == 2000
    assert check_run(config) == []


def test_the_plan_in_the_file_is_the_best_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = planned("run.yaml", "--gpus", "16")
    best = json.loads(capsys.readouterr().out)["plans"][0]["layout"]
    layout = from_config.layout_of(config)
    found = {**layout.sizes.model_dump(), **vars(layout)}
    assert {name: found[name] for name in best} == best
