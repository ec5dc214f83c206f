"""Where metrics go: metrics.jsonl, TensorBoard, W&B and one console line per step; and the clock of a step's stages."""

from __future__ import annotations

import importlib
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from megatron_hapo.errors import DataError, one_line
from megatron_hapo.observe.progress_display import ProgressBars, showing_progress
from megatron_hapo.observe.running_stages import stage as running_stage
from megatron_hapo.observe.spans import SpanRecorder, Timeline
from megatron_hapo.observe.step_warnings import StepWarnings
from megatron_hapo.observe.tensorboard import TensorBoard

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb_id"
BESIDE_TRAINING = ("eval", "checkpoint")
"""Stages that happen only after some steps: timed, but not part of time/step."""
LINES_PER_HEADER = 20


class StepClock:
    """Seconds of each stage of one step; the step begins when the clock is created."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._spans = SpanRecorder("driver")
        self._spans.start()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time spent inside to the seconds of the stage."""
        begin = time.perf_counter()
        try:
            with self._spans(stage), running_stage(stage):
                yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - begin

    def training_seconds(self) -> float:
        """Wall time since the step began, without evaluation and checkpoints."""
        beside = sum(self._seconds.get(stage, 0.0) for stage in BESIDE_TRAINING)
        return time.perf_counter() - self._start - beside

    def timeline(self) -> Timeline:
        """The stages so far; ends the recording."""
        return self._spans.finish()

    def metrics(self) -> dict[str, float]:
        """`time/<stage>` for every stage, and `time/step`, which is `training_seconds`."""
        return {f"time/{stage}": seconds for stage, seconds in self._seconds.items()} | {
            "time/step": self.training_seconds()
        }


class MetricsLogger:
    """Writes the metrics of every step to the run folder and shows them; a context manager.

    Args:
        start_step: step after which the run resumes; rows of later steps are dropped, and with 0 all rows.
        console: where lines are printed; stdout by default.
        wandb_project: see config.MetricsConfig.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        start_step: int = 0,
        *,
        console: Console | None = None,
        wandb_project: str | None = None,
    ):
        self._wandb_project = wandb_project
        self._wandb: Any = None
        self._path = run_dir / METRICS_FILE
        self._tensorboard_folder = run_dir / TENSORBOARD_FOLDER
        self._total_steps = total_steps
        self._start_step = start_step
        self.last_step = -1
        """Step of the newest row; -1: there is none."""
        self._console = console or Console(highlight=False)
        self._exit = ExitStack()
        self._bars: ProgressBars | None = None
        self._num_lines = 0
        self._accuracy: float | None = None
        self._warnings = StepWarnings()

    def __enter__(self) -> MetricsLogger:
        rows = [row for row in read_metrics(self._path) if row["step"] <= self._start_step] if self._start_step else []
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._accuracy = next((row["eval/accuracy"] for row in reversed(rows) if "eval/accuracy" in row), None)
        self.last_step = int(rows[-1]["step"]) if rows else -1
        for row in rows:  # told before the run was interrupted
            self._warnings.of_step(int(row["step"]), row)
        # Complete rows go to a new file that then replaces the old one: a kill here must not lose them.
        rewritten = self._path.with_suffix(".jsonl.new")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in rows))
        rewritten.replace(self._path)
        purge_step = self._start_step + 1 if self._start_step else 0
        with ExitStack() as stack:  # closes what is open if a later one fails
            self._file = stack.enter_context(self._path.open("a"))
            self._tensorboard = stack.enter_context(TensorBoard(self._tensorboard_folder, purge_step=purge_step))
            if self._wandb_project is not None:
                run = _wandb_run(self._wandb_project, self._path.parent, resumes=self._start_step > 0)
                self._wandb = stack.enter_context(run)
            steps = self._start_step, self._total_steps
            self._bars = stack.enter_context(showing_progress(self._console, steps=steps))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one row and prints one console line. Numbers that JSON cannot represent (NaN) become null."""
        finite = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        self._file.flush()
        self.last_step = step
        self._tensorboard.add(step, metrics)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
        self._show(step, metrics)
        for warning in self._warnings.of_step(step, finite):
            self._print(f"warning: {warning}", style="yellow")

    def show_between(self, lines: Sequence[str]) -> None:
        """Prints lines that do not belong to the table; its header then comes again."""
        blank_before = [""] if self._num_lines else []
        for line in [*blank_before, *lines, ""]:
            self._console.print(line, markup=False, soft_wrap=not self._console.is_terminal)
        self._num_lines = 0

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        self._accuracy = metrics.get("eval/accuracy", self._accuracy)
        shown = metrics if self._accuracy is None else metrics | {"eval/accuracy": self._accuracy}
        if self._num_lines % LINES_PER_HEADER == 0:
            self._print("  ".join(column.title.rjust(column.width) for column in COLUMNS), style="bold")
        cells = [f"{step}/{self._total_steps}", *(column.cell(shown) for column in COLUMNS[1:])]
        self._print("  ".join(cell.rjust(column.width) for column, cell in zip(COLUMNS, cells, strict=True)))
        self._num_lines += 1
        if self._bars is not None:
            self._bars.steps_done(step)

    def _print(self, line: str, style: str = "") -> None:
        # Lines are cropped to the width of a terminal; a file gets the whole line.
        to_terminal = self._console.is_terminal
        self._console.print(
            line, style=style, markup=False, no_wrap=to_terminal, soft_wrap=not to_terminal, crop=to_terminal
        )


def _wandb_run(project: str, run_dir: Path, *, resumes: bool) -> Any:
    """A context manager: a new run of Weights & Biases, or the one that the run folder records if training resumes."""
    id_file = run_dir / WANDB_ID_FILE
    if not (resumes and id_file.is_file()):
        id_file.write_text(uuid.uuid4().hex)
    wandb = importlib.import_module("wandb")
    return wandb.init(project=project, name=run_dir.name, id=id_file.read_text(), resume="allow", dir=str(run_dir))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics.jsonl, empty if there is no file. A last row that a kill cut short is dropped.

    Raises:
        DataError: the file cannot be read, or a row is not a JSON object of numbers with a step.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        except (ValueError, RecursionError):  # a number of thousands of digits, or deep nesting
            row = None
        if not isinstance(row, dict) or not _is_step(row.get("step")) or not all(map(_is_metric, row.values())):
            raise DataError(f"{path}: line {number} is not a row of metrics: a JSON object of numbers, with a step")
        rows.append(row)
    return rows


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_metric(value: object) -> bool:
    """Whether it is a number that fits a float, or null, which stands for NaN."""
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e308 < value < 1e308


@dataclass(frozen=True)
class Column:
    """One column of the console's table."""

    title: str
    width: int
    names: tuple[str, ...]
    """Metrics that the cell shows."""
    show: Callable[..., str]
    """Formats their values."""

    def cell(self, metrics: dict[str, float]) -> str:
        """The cell's text; "-" if a metric is missing."""
        values = [metrics.get(name) for name in self.names]
        return "-" if None in values else self.show(*values)


def _digits(number: int) -> Callable[..., str]:
    return lambda value: f"{value:.{number}f}"


def _seconds(stage: str, title: str) -> Column:
    return Column(title, max(len(title), 6), (f"time/{stage}",), lambda value: f"{value:.2f}s")


COLUMNS = (
    Column("step", 9, (), _digits(0)),
    Column("reward", 6, ("reward/mean",), _digits(3)),
    Column("eval acc", 8, ("eval/accuracy",), _digits(3)),
    Column("entropy", 7, ("entropy/mean",), _digits(3)),
    Column("length", 7, ("response_length/mean",), _digits(1)),
    Column("temp min-max", 12, ("temperature/min", "temperature/max"), lambda low, high: f"{low:.2f}-{high:.2f}"),
    Column(
        "clip low/high", 13, ("loss/clip_fraction_low", "loss/clip_fraction_high"),
        lambda low, high: f"{100 * low:.1f}/{100 * high:.1f}%",
    ),
    Column("tokens/s", 8, ("tokens_per_second",), _digits(0)),
    _seconds("step", "step"),
    _seconds("rollout", "rollout"),
    _seconds("reward", "reward"),
    _seconds("log_probs", "log-probs"),
    _seconds("update", "update"),
    _seconds("weight_sync", "sync"),
)  # fmt: skip
