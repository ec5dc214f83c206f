"""Runs the jobs of an experiment, each as a process of its own; a second call goes on where the first one stopped."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_hapo.config.experiment import PlannedRun
from megatron_hapo.errors import HapoError, one_line
from megatron_hapo.observe.metrics import METRICS_FILE, read_metrics

STARTED_WITH = "experiment.yaml"
"""In the run folder: the config that the run was started with, to notice that the experiment has changed."""


@dataclass(frozen=True)
class _Failure:
    run: PlannedRun
    reason: str


def run_all(runs: Sequence[PlannedRun], *, parallel: int, console: Console) -> None:
    """Train every run that is not finished, `parallel` at a time, in this order.

    A run that fails does not keep the others from running: a second call tries it again.

    Raises:
        HapoError: a run was made with other settings, or runs failed: a line for each.
    """
    _check_unchanged(runs)
    waiting = [run for run in runs if not is_finished(run)]
    failures = []
    jobs: set[subprocess.Popen] = set()
    with (
        _interrupted_by_sigterm(),
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        ) as progress,
        ThreadPoolExecutor(parallel) as pool,
    ):
        task = progress.add_task("runs", total=len(runs), completed=len(runs) - len(waiting))
        futures = {pool.submit(_train, run, jobs): run for run in waiting}
        try:
            for future in as_completed(futures):
                if (failure := future.result()) is not None:
                    failures.append(failure)
                progress.advance(task)
                console.print(_line(futures[future], failure), highlight=False, markup=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for job in list(jobs):
                job.terminate()  # it finishes its step and writes a checkpoint, from which the next call goes on
            raise
    if failures:
        raise HapoError("\n".join(f"{f.run.config.name}: {f.reason}" for f in failures))


def is_finished(run: PlannedRun) -> bool:
    """Whether the run has made its last step and its last evaluation."""
    rows = read_metrics(run.config.run_dir / METRICS_FILE) if (run.config.run_dir / METRICS_FILE).exists() else []
    last = f"eval_{run.config.steps:08d}.parquet"
    return bool(rows) and rows[-1]["step"] == run.config.steps and (run.config.run_dir / "rollouts" / last).exists()


def _check_unchanged(runs: Sequence[PlannedRun]) -> None:
    changed = [run for run in runs if (made := _started_with(run)) is not None and made != _identity(run)]
    if changed:
        names = ", ".join(run.config.name for run in changed[:5])
        raise HapoError(
            f"{changed[0].file.parents[1]}: {len(changed)} runs were made with other settings ({names}): restore the "
            "settings, give the experiment another name, or remove their folders"
        )


def _started_with(run: PlannedRun) -> str | None:
    try:
        return (run.config.run_dir / STARTED_WITH).read_text()
    except OSError:
        return None


def _identity(run: PlannedRun) -> str:
    """All settings of the run, as text."""
    return run.config.model_dump_json(indent=1)


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Meanwhile SIGTERM interrupts as Ctrl-C does; otherwise it would leave the running jobs behind."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _train(run: PlannedRun, jobs: set[subprocess.Popen]) -> _Failure | None:
    """Trains in a process, which is in `jobs` while it lives."""
    run_dir, log = run.config.run_dir, run.config.run_dir.with_suffix(".log")
    begin = time.monotonic()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / STARTED_WITH).write_text(_identity(run))
        with log.open("w") as output:
            command = [sys.executable, "-m", "megatron_hapo", "train", str(run.file)]
            with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as job:
                jobs.add(job)
                code = job.wait()
                jobs.discard(job)
    except OSError as error:
        return _Failure(run, f"cannot be run: {error.strerror}")
    if code or not is_finished(run):
        return _Failure(run, f"ended with exit code {code} after {time.monotonic() - begin:.0f} s: {_end_of(log)}")
    return None


def _end_of(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{one_line(lines[-1])[:300]} ({log})" if lines else f"no output ({log})"


def _line(run: PlannedRun, failure: _Failure | None) -> str:
    if failure is not None:
        return f"{run.config.name}: {failure.reason}"
    last = read_metrics(run.config.run_dir / METRICS_FILE)[-1]
    return f"{run.config.name}: accuracy {last.get('eval/accuracy', float('nan')):.3f} at step {run.config.steps}"
