"""Which models `eval` evaluates, and what is refused before anything starts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_hapo import cli
from megatron_hapo.checks.evaluated_models import check_output, evaluated_configs
from megatron_hapo.checks.preflight import check_run
from megatron_hapo.config import load_config
from megatron_hapo.errors import ConfigError
from tests.test_cli import CONFIG, MODEL, ROW

EVAL = CONFIG + "  eval: {a: {type: file, path: train.jsonl}, b: {type: arithmetic, size: 3}}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with run.yaml, two models of the same name and the exports of a run."""
    (tmp_path / "run.yaml").write_text(EVAL.replace("data: {train: {type: file, path: train.jsonl}}", _DATA))
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    model = tmp_path / "runs/a/hf"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(MODEL))
    (model / "model.safetensors").touch()
    (model / "tokenizer_config.json").write_text("{}")
    for copy in ("runs/b/hf", "runs/b/hf_steps/step_00000010", "runs/b/hf_steps/step_00000005"):
        shutil.copytree(model, tmp_path / copy)
    (tmp_path / "runs/b/hf_steps/step_00000015.partial").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


_DATA = "data:\n  train: {type: file, path: train.jsonl}"


def models(*folders: str) -> dict[str, str]:
    configs = evaluated_configs(Path("run.yaml"), [], [Path(name) for name in folders])
    return {label: str(config.model.path) for label, config in configs.items()}


def test_models_are_called_by_the_ends_of_their_paths(folder: Path) -> None:
    assert models("runs/a/hf") == {"hf": "runs/a/hf"}
    assert models("runs/a/hf", "runs/b/hf") == {"a/hf": "runs/a/hf", "b/hf": "runs/b/hf"}


def test_the_exports_of_a_run_are_evaluated_by_step(folder: Path) -> None:
    assert list(models("runs/b/hf_steps", "runs/b/hf")) == ["step_00000005", "step_00000010", "hf"]


def test_without_a_folder_the_model_is_the_configs(folder: Path) -> None:
    configs = evaluated_configs(Path("run.yaml"), ["model.path=runs/a/hf"], [])
    assert [str(config.model.path) for config in configs.values()] == ["runs/a/hf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "none"], "command line: model.path: no such folder: none"),
        (["--model", "runs/a/hf", "--model", "runs/a/hf"], "--model: runs/a/hf is given twice"),
        (["--model", "runs/a/hf", "eval.samples=0"], "command line: eval.samples: must be greater than 0, got 0"),
        (["--model", "runs/a/hf", "data.eval=null"], "run.yaml: data.eval: must be set to evaluate"),
        (["--model", "runs/a/hf", "--output", "train.jsonl"], "train.jsonl: cannot be written: "),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["eval", "run.yaml", *arguments]) == cli.EXIT_FAULT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_a_folder_that_can_be_written_is_accepted_and_not_made(folder: Path) -> None:
    check_output(folder / "new/results")
    assert not (folder / "new").exists()
    with pytest.raises(ConfigError, match=re.escape("train.jsonl is not a folder")):
        check_output(folder / "train.jsonl/x")


def test_only_the_process_that_trains_reads_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun every rank checks the config."""
    config = load_config("run.yaml", ["model.path=runs/a/hf", "data.train.path=hf:none"])
    (fault,) = check_run(config)
    assert (fault.key, fault.message[:40]) == ("data.train.path", "hf:none must have the form hf:ORG/NAME, ")
    assert check_run(config, reads_hub=False) == []
