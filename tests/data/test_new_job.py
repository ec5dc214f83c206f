"""The job that `init` writes is the one in examples/own_reward, and its reward is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hapo import cli
from megatron_hapo.checks.preflight import load_checked_config
from megatron_hapo.data.new_job import job_files, write_job
from megatron_hapo.errors import HapoError
from megatron_hapo.reward.own_scorer import load_own_scorer

EXAMPLE = Path(__file__).parents[2] / "examples/own_reward"


def test_the_example_holds_the_files_that_init_writes() -> None:
    assert {name: (EXAMPLE / name).read_text() for name in job_files()} == job_files()
    assert len((EXAMPLE / "README.md").read_text().splitlines()) < 60


def test_the_reward_counts_right_answers_and_steps() -> None:
    score = load_own_scorer(f"{EXAMPLE}/my_reward.py:score")
    assert score("7+8=15 15-3=12 Answer: 12", {"answer": "12"}) == {"total": 1.5, "correct": 1.0, "steps": 1.0}
    assert score("7+8=15 15-3=13 Answer: 13", {"answer": "12"}) == {"total": 0.25, "correct": 0.0, "steps": 0.5}
    assert score("", {"answer": "12"})["total"] == 0.0


def test_a_written_job_passes_the_checks_and_is_not_overwritten(tmp_path, monkeypatch, capsys) -> None:
    lines: list[str] = []
    write_job(tmp_path / "job", model_steps=0, progress=lines.append)
    assert len(lines) == 5
    monkeypatch.chdir(tmp_path / "job")
    config = load_checked_config(Path("config.yaml"))
    assert config.reward.scorer == f"{tmp_path}/job/my_reward.py:score"
    with pytest.raises(HapoError, match="is not empty; choose a new folder"):
        write_job(tmp_path / "job", model_steps=0)
    assert cli.main(["init", str(tmp_path / "job")]) == 2
    assert "choose a new folder" in capsys.readouterr().err


def test_version_is_printed(capsys) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith("megatron-hapo 0.")
