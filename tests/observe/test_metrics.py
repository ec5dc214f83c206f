"""Where metrics go: metrics.jsonl, resumed runs, console lines; and the clock."""

import io
import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from megatron_hapo.observe.metrics import COLUMNS, MetricsLogger, StepClock, read_metrics

METRICS = {
    "reward/mean": -0.25,
    "entropy/mean": 0.5,
    "response_length/mean": 12.5,
    "temperature/min": 0.95,
    "temperature/max": 1.05,
    "loss/clip_fraction_low": 0.01,
    "loss/clip_fraction_high": 0.02,
    "tokens_per_second": 1234.0,
    "time/rollout": 1.0,
    "time/reward": 0.1,
    "time/log_probs": 0.5,
    "time/update": 1.5,
    "time/weight_sync": 0.25,
    "time/step": 3.4,
}


ROOT = Path(__file__).parents[2]


def documented_metrics() -> set[str]:
    """Names in the first column of the tables of docs/metrics.md."""
    lines = (ROOT / "docs/metrics.md").read_text().splitlines()
    return {name for line in lines if line.startswith("| `") for name in re.findall(r"`([^`]+)`", line.split("|")[1])}


def test_the_metrics_in_the_code_are_documented():
    """Covers names that are written out; tests/test_loop.py checks what real runs log."""
    sources = (ROOT / "megatron_hapo").rglob("*.py")
    names = {name for path in sources for name in re.findall(r'^ +"(\w+/\w+)": ', path.read_text(), re.MULTILINE)}
    assert len(names) > 30
    assert names | {name for column in COLUMNS for name in column.names} <= documented_metrics()


def make_console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def write_run(run_dir: Path, last_step: int, start_step: int = 0, console: Console | None = None) -> None:
    with MetricsLogger(run_dir, 10, start_step, console=console or make_console()) as logger:
        if start_step == 0:
            logger.log(0, {"eval/accuracy": 0.25})
        for step in range(start_step + 1, last_step + 1):
            logger.log(step, METRICS | {"reward/mean": float(last_step)})


def test_each_step_is_one_complete_row_at_once(tmp_path):
    with MetricsLogger(tmp_path, 2, 0, console=make_console()) as logger:
        logger.log(0, {"eval/accuracy": 0.25})
        logger.log(1, METRICS)
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 0, "eval/accuracy": 0.25}, {"step": 1} | METRICS]


def test_a_resumed_run_drops_rows_after_its_checkpoint_and_keeps_the_others(tmp_path):
    write_run(tmp_path, last_step=5)
    write_run(tmp_path, last_step=4, start_step=2)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row.get("reward/mean") for row in rows] == [None, 5.0, 5.0, 4.0, 4.0]


def test_a_run_from_the_start_keeps_no_old_row(tmp_path):
    write_run(tmp_path, last_step=5)
    write_run(tmp_path, last_step=1)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]


def test_a_row_cut_short_by_a_kill_is_left_out(tmp_path):
    write_run(tmp_path, last_step=3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rewa')
    write_run(tmp_path, last_step=4, start_step=3)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_numbers_that_json_cannot_represent_become_null(tmp_path):
    with MetricsLogger(tmp_path, 1, 0, console=make_console()) as logger:
        logger.log(1, {"loss/policy": math.nan, "grad_norm": math.inf})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss/policy": None, "grad_norm": None}]


def test_tensorboard_holds_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_run(tmp_path, last_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 3.0), (2, 3.0), (3, 3.0)]


def test_wandb_gets_every_step_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, monkeypatch):
    """With a stand-in, since the tests do not require the package."""
    run, opened = MagicMock(), []
    run.__enter__.return_value = run
    stand_in = SimpleNamespace(init=lambda **settings: opened.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for start_step in (0, 2, 0):
        with MetricsLogger(tmp_path, 3, start_step, console=make_console(), wandb_project="mine") as logger:
            logger.log(start_step + 1, METRICS)
    assert [call.kwargs for call in run.log.call_args_list] == [{"step": 1}, {"step": 3}, {"step": 1}]
    assert all(call.args == (METRICS,) for call in run.log.call_args_list)
    assert run.__exit__.call_count == 3
    first, resumed, anew = (settings.pop("id") for settings in opened)
    assert first == resumed != anew
    assert opened[0] == {"project": "mine", "name": tmp_path.name, "resume": "allow", "dir": str(tmp_path)}


def test_one_plain_line_a_step_where_the_output_is_not_a_terminal(tmp_path):
    console = make_console()
    write_run(tmp_path, last_step=2, console=console)
    header, before, *steps = output(console).splitlines()
    assert header.split()[:4] == ["step", "reward", "eval", "acc"]
    assert before.split()[:3] == ["0/10", "-", "0.250"]
    assert len(steps) == 2
    cells = steps[1].split()
    assert cells == ["2/10", "2.000", "0.250", "0.500", "12.5", "0.95-1.05", "1.0/2.0%", "1234",
                     "3.40s", "1.00s", "0.10s", "0.50s", "1.50s", "0.25s"]  # fmt: skip
    assert len(cells) == len(COLUMNS)
    assert "\x1b" not in output(console)


def test_a_terminal_shows_a_bar_with_the_steps_done(tmp_path):
    console = make_console(terminal=True)
    write_run(tmp_path, last_step=2, console=console)
    assert "2/10 steps" in output(console)


def test_lines_between_those_of_the_table_are_set_off_and_its_header_comes_again(tmp_path):
    console = make_console()
    with MetricsLogger(tmp_path, 10, console=console) as logger:
        logger.log(0, {"eval/accuracy": 0.25})
        logger.show_between(["first prompt: [bold]1+1=", "response: 2"])
        logger.log(1, METRICS)
    lines = output(console).splitlines()
    assert [line.split()[:1] for line in lines] == [
        ["step"],
        ["0/10"],
        [],
        ["first"],
        ["response:"],
        [],
        ["step"],
        ["1/10"],
    ]
    assert lines[3] == "first prompt: [bold]1+1="


def test_the_clock_adds_up_stages_and_keeps_evaluation_out_of_the_step():
    clock = StepClock()
    for _ in range(2):
        with clock("rollout"):
            time.sleep(0.02)
    with clock("eval"):
        time.sleep(0.1)
    metrics = clock.metrics()
    assert set(metrics) == {"time/rollout", "time/eval", "time/step"}
    assert 0.04 <= metrics["time/rollout"] <= metrics["time/step"]
    assert metrics["time/eval"] >= 0.1
    assert metrics["time/step"] < metrics["time/rollout"] + metrics["time/eval"]
    assert clock.training_seconds() >= metrics["time/step"]


def test_the_clock_counts_a_stage_that_fails():
    clock = StepClock()
    with pytest.raises(KeyError), clock("update"):
        raise KeyError
    assert "time/update" in clock.metrics()
