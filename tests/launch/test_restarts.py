"""Runs under the Ray launcher in which a process is killed while they train."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from megatron_hapo.config import Config
from tests.launch.test_torchrun import RESUMED, assert_same
from tests.launch.torchrun_process import kill_hard, launched, metrics_of, train_command, write_config
from tests.test_loop import make_config

pytestmark = pytest.mark.slow

START_SECONDS = 900
STEPS = 6


def run_config(model: Path, folder: Path, name: str) -> Config:
    config = make_config(model, folder, {"dp": 2})
    checkpoint = config.checkpoint.model_copy(update={"every": 1, "hf_at_end": False})
    return config.model_copy(update={"name": name, "steps": STEPS, "checkpoint": checkpoint})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("restarts")


@pytest.fixture(scope="module")
def undisturbed(tiny_qwen3: Path, folder: Path) -> list[dict[str, float]]:
    config = run_config(tiny_qwen3, folder, "undisturbed")
    with launched([sys.executable, *train_command(write_config(config, folder))], folder / "log") as launch:
        assert launch.wait(START_SECONDS) == 0, launch.text[-6000:]
    return metrics_of(config)


def test_the_death_of_a_trainer_rank_is_one_line_and_the_run_goes_on(
    tiny_qwen3: Path, folder: Path, undisturbed: list[dict[str, float]]
) -> None:
    config = run_config(tiny_qwen3, folder, "rank")
    with launched([sys.executable, *train_command(write_config(config, folder))], folder / "rank.log") as launch:
        launch.until(lambda: len(metrics_of(config)) >= 2, "first step", START_SECONDS)
        launch.note()
        victim = next(process for process in launch.seen if "TrainerActor" in "".join(cmdline(process)))
        kill_hard(victim)
        assert launch.wait(START_SECONDS) == 0, launch.text[-6000:]
        launch.until_gone(60)
    (line,) = [line for line in launch.text.splitlines() if "died" in line]
    assert "the process died" in line
    assert line.endswith("restart 1 of launch.max_restarts=3")
    assert "Traceback" not in launch.text
    assert_same(metrics_of(config), undisturbed, RESUMED)


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
