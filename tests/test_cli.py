"""The command line: for a run that cannot work it starts nothing, prints one line per fault, and exits with code 2."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_hapo import cli
from megatron_hapo.checks import preflight
from megatron_hapo.config import Config
from megatron_hapo.errors import DataError

CONFIG = """
name: small
steps: 3
model: {path: model}
rollout: {max_prompt_tokens: 100, max_response_tokens: 400}
data: {train: {type: file, path: train.jsonl}}
"""

MODEL = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 300,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
}

ROW = {"prompt": "1+1", "reward_model": {"ground_truth": "2"}, "data_source": "math_dapo"}


@pytest.fixture
def run_folder(tmp_path, monkeypatch) -> Path:
    """The current directory of a run that passes every check: run.yaml, model, train.jsonl."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(MODEL))
    (tmp_path / "model/model.safetensors").touch()
    (tmp_path / "model/tokenizer_config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    pq.write_table(pa.table({"question": ["1+1"], "data_source": ["x"]}), tmp_path / "no_prompt.parquet")
    pq.write_table(pa.Table.from_pylist([ROW]).slice(0, 0), tmp_path / "empty.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def started(monkeypatch) -> list[Config]:
    """The configs of the runs that were started; a stand-in starts them."""
    configs: list[Config] = []
    stand_in = types.SimpleNamespace(run_training=configs.append)
    monkeypatch.setitem(sys.modules, "megatron_hapo.launch", types.SimpleNamespace(run=stand_in))
    monkeypatch.setitem(sys.modules, "megatron_hapo.launch.run", stand_in)
    return configs


def test_a_sound_config_starts_the_run(run_folder, started, capsys):
    assert cli.main(["train", "run.yaml", "parallel.tp=4", "seed=5"]) == 0
    assert [(c.parallel.tp, c.seed) for c in started] == [(4, 5)]
    assert capsys.readouterr().err == ""


def test_settings_may_follow_options(run_folder, monkeypatch, capsys):
    seeds: list[int] = []

    def run_check(config: Config, prompts: int) -> list[object]:
        seeds.append(config.seed + prompts)
        return []

    stand_in = types.SimpleNamespace(run_check=run_check)
    monkeypatch.setitem(sys.modules, "megatron_hapo.launch", types.SimpleNamespace(run=stand_in))
    monkeypatch.setitem(sys.modules, "megatron_hapo.launch.run", stand_in)
    assert cli.main(["check", "run.yaml", "parallel.tp=2", "--prompts", "2", "seed=5"]) == 0
    assert seeds == [7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "run.yaml", "--promts", "2"], "unrecognized arguments: --promts 2"),
        (["check", "run.yaml", "--prompts", "0"], "argument --prompts: must be a whole number of at least 1, got '0'"),
        (["report", "runs/a", "--seed=1"], "unrecognized arguments: --seed=1"),
        (["train"], "the following arguments are required: CONFIG\n"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err


BAD_INPUT = {
    "unknown key": (["optimizer.lrr=1"], "command line: optimizer.lrr: unknown key; did you mean lr?"),
    "tp does not divide heads": (
        ["parallel.tp=8"],
        "command line: parallel.tp: 12 attention heads do not split over tp=8\n"
        "command line: parallel.tp: 4 key-value heads do not split over tp=8",
    ),
    "tp does not divide key-value heads": (
        ["parallel.tp=3"],
        "command line: parallel.tp: 4 key-value heads do not split over tp=3",
    ),
    "engine tp does not divide key-value heads": (
        ["rollout.tp=6"],
        "command line: rollout.tp: 4 key-value heads do not split over tp=6",
    ),
    "pp does not divide layers": (
        ["parallel.pp=3"],
        "command line: parallel.pp: 4 layers do not split evenly over pp=3",
    ),
    "stages do not hold the layers": (
        ["parallel.pp=3", "parallel.first_stage_layers=1"],
        "command line: parallel.pp: 4 layers do not split evenly over pp=3, first_stage_layers=1",
    ),
    "vpp does not divide a stage": (
        ["parallel.pp=2", "parallel.vpp=3"],
        "command line: parallel.vpp: the 2 layers of a stage do not split evenly into vpp=3 chunks",
    ),
    "etp does not divide tp": (
        ["parallel.tp=2", "parallel.etp=4"],
        "command line: parallel.etp: must divide parallel.tp=2, got 4",
    ),
    "etp and ep are more than the ranks": (
        ["parallel.tp=2", "parallel.etp=2", "parallel.ep=2"],
        "command line: parallel.ep: must divide parallel.tp * parallel.dp / parallel.etp = 1, got 2\n"
        "command line: parallel.etp: etp=2, but the model has no experts (model_type qwen3)",
    ),
    "steps to profile after the last": (
        ["profile.steps=[1,9]", "steps=8"],
        "command line: profile.steps: must be steps of the run, 1 to steps=8, got [9]",
    ),
    "too few positions": (
        ["rollout.max_response_tokens=600"],
        "command line: rollout.max_response_tokens: max_prompt_tokens + max_response_tokens = 700 is more than the "
        "model's 512 positions (max_position_embeddings in its config.json)",
    ),
    "missing model folder": (["model.path=models/none"], "command line: model.path: no such folder: models/none"),
    "name on the Hub": (
        ["model.path=Qwen/Qwen3-8B"],
        "command line: model.path: no such folder: Qwen/Qwen3-8B; to use a model from the Hub: "
        "hf download Qwen/Qwen3-8B --local-dir models/Qwen3-8B, then model.path=models/Qwen3-8B",
    ),
    "missing data": (["data.train.path=none.parquet"], "command line: data.train.path: no such file: none.parquet"),
    "missing column": (
        ["data.train.path=no_prompt.parquet"],
        "command line: data.train.path: no_prompt.parquet has no column prompt; its columns: question, data_source "
        "(columns.prompt chooses one)\n"
        "command line: data.train.path: no_prompt.parquet has no column answer; its columns: question, data_source "
        "(columns.answer chooses one)",
    ),
    "empty data": (["data.train.path=empty.parquet"], "command line: data.train.path: empty.parquet has no rows"),
    "group of one": (
        ["batch.samples_per_prompt=1"],
        "command line: batch.samples_per_prompt: must be at least 2, got 1: algorithm.advantage="
        "token_level_group_average compares the responses to one prompt with each other",
    ),
    "no override": (["steps"], "command line: steps: must have the form key=value, e.g. optimizer.lr=1e-6"),
    "unknown task": (
        ["data.train={type: reasoning_gym, name: chain_sums, size: 3}"],
        "command line: data.train.name: reasoning-gym has no dataset 'chain_sums'; did you mean chain_sum?",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_reported_in_one_line_and_nothing_starts(run_folder, started, capsys, case):
    overrides, message = BAD_INPUT[case]
    assert cli.main(["train", "run.yaml", *overrides]) == cli.EXIT_FAULT
    assert capsys.readouterr().err == message + "\n"
    assert started == []


def test_a_requested_package_that_is_not_installed_is_one_line(run_folder, started, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "is_installed", lambda package: package != "wandb")  # it may be, on this machine
    assert cli.main(["train", "run.yaml", "metrics.wandb_project=mine"]) == cli.EXIT_FAULT
    assert capsys.readouterr().err == (
        "command line: metrics.wandb_project: wandb is not installed: pip install wandb\n"
    )
    assert started == []


def test_a_folder_is_not_mistaken_for_a_package_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "left_by_earlier_runs").mkdir()  # as runs of wandb leave a folder of that name
    monkeypatch.syspath_prepend(tmp_path)
    assert not preflight.is_installed("left_by_earlier_runs")
    assert not preflight.is_installed("no_such_package")
    assert preflight.is_installed("pytest")


def test_faults_of_config_model_and_data_come_together(run_folder, started, capsys):
    overrides = ["optimizer.lr=-1", "parallel.tp=3", "data.train.path=none.jsonl"]
    assert cli.main(["train", "run.yaml", *overrides]) == cli.EXIT_FAULT
    assert capsys.readouterr().err.splitlines() == [
        "command line: optimizer.lr: must be greater than 0, got -1",
        "command line: parallel.tp: 4 key-value heads do not split over tp=3",
        "command line: data.train.path: no such file: none.jsonl",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: "),
        ({"rms_norm_eps": None}, "model/config.json has no rms_norm_eps\n"),
        ("{", "model/config.json is not JSON: "),
        ("[]", "model/config.json must contain a JSON object\n"),
    ],
)
@pytest.mark.parametrize("command", [["train", "run.yaml"], ["convert", "hf-to-megatron", "model", "out"]])
def test_a_model_that_cannot_be_trained_is_one_line(run_folder, capsys, command, change, message):
    if isinstance(change, dict):
        change = json.dumps({key: value for key, value in (MODEL | change).items() if value is not None})
    (run_folder / "model/config.json").write_text(change)
    assert cli.main(command) == cli.EXIT_FAULT
    error = capsys.readouterr().err.removeprefix("run.yaml: ")
    assert error.startswith(f"model.path: {message}")
    assert error.count("\n") == 1


def test_an_incomplete_model_folder_reports_what_is_missing(run_folder, started, capsys):
    for name in ("model.safetensors", "tokenizer_config.json", "config.json"):
        (run_folder / "model" / name).unlink()
    assert cli.main(["train", "run.yaml"]) == cli.EXIT_FAULT
    assert capsys.readouterr().err.splitlines() == [
        "run.yaml: model.path: model has no safetensors file",
        "run.yaml: model.path: model has no tokenizer (tokenizer_config.json)",
        "run.yaml: model.path: no config.json in model; it must be a Hugging Face model folder",
    ]


def test_a_fault_found_during_the_run_is_one_line_too(run_folder, monkeypatch, capsys):
    def run_training(config: Config) -> None:
        raise DataError("train.jsonl: 1 of 1 prompts are longer than rollout.max_prompt_tokens=100; nothing is left")

    monkeypatch.setitem(sys.modules, "megatron_hapo.launch", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "megatron_hapo.launch.run", types.SimpleNamespace(run_training=run_training))
    assert cli.main(["train", "run.yaml"]) == cli.EXIT_FAULT
    assert capsys.readouterr().err.startswith("train.jsonl: 1 of 1 prompts are longer")


def test_an_unexpected_error_keeps_its_traceback_and_ctrl_c_its_exit_code(run_folder, monkeypatch):
    errors: list[BaseException] = [ZeroDivisionError(), KeyboardInterrupt()]

    def run_training(config: Config) -> None:
        raise errors.pop(0)

    monkeypatch.setitem(sys.modules, "megatron_hapo.launch", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "megatron_hapo.launch.run", types.SimpleNamespace(run_training=run_training))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "run.yaml"])
    assert cli.main(["train", "run.yaml"]) == 130


def test_report_of_a_folder_that_is_not_a_run_is_one_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == cli.EXIT_FAULT
    assert capsys.readouterr().err == f"{tmp_path}: no metrics in metrics.jsonl; it must be the folder of a run\n"


def test_bad_input_imports_nothing_heavy(run_folder):
    """Checks run before torch, Ray and the engines are imported: a fault shows within a second, on any machine."""
    code = (
        "import json, sys\n"
        "from megatron_hapo import cli\n"
        "for overrides in json.loads(sys.argv[1]):\n"
        "    assert cli.main(['train', 'run.yaml', *overrides]) == 2\n"
        "print(sorted({'torch', 'ray', 'sglang', 'megatron', 'transformers'} & set(sys.modules)))\n"
    )
    cases = json.dumps([overrides for name, (overrides, _) in BAD_INPUT.items() if name != "unknown task"])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, cases],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(cli.__file__).parents[1])},
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_module_is_the_command(run_folder):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hapo", "train", "none.yaml"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(cli.__file__).parents[1])},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "none.yaml: no such config file\n")


def test_view_of_a_folder_without_records_is_one_line(tmp_path, capsys):
    assert cli.main(["view", str(tmp_path)]) == cli.EXIT_FAULT
    assert (
        capsys.readouterr().err
        == f"{tmp_path}: no records in rollouts/; it must be the folder of a run that records responses\n"
    )
