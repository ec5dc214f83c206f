"""Shows how far the running stages are: bars in a terminal, elsewhere a line for every minute that a stage takes."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from megatron_hapo.observe.running_stages import Stage, running

logger = logging.getLogger(__name__)

_REFRESHES_PER_SECOND = 4
_SECONDS_BETWEEN_LINES = 60.0


@contextlib.contextmanager
def showing_progress(
    console: Console, *, steps: tuple[int, int] | None = None, seconds_between_lines: float = _SECONDS_BETWEEN_LINES
) -> Iterator[ProgressBars | None]:
    """Shows the running stages while the context is open; the bars, if the console is a terminal.

    Args:
        steps: of a run, done and in all; None: there are none.
        seconds_between_lines: where the console is not a terminal.
    """
    if not console.is_terminal:
        with _lines(seconds_between_lines):
            yield None
        return
    with ProgressBars(console, steps) as bars, _log_above_the_bars():
        yield bars


class ProgressBars(Progress):
    """The bar of a run's steps, and a bar for each stage that is running; the latter disappear at the end."""

    def __init__(self, console: Console, steps: tuple[int, int] | None):
        super().__init__(
            TextColumn("{task.description}", table_column=_column(20)), BarColumn(), _Counts(_column(20)),
            TimeElapsedColumn(), _Remaining(),
            console=console, auto_refresh=False, transient=steps is None,
            # What goes to another place than the terminal, such as `2> log`, must go on doing so.
            redirect_stdout=sys.stdout.isatty(), redirect_stderr=sys.stderr.isatty(),
            speed_estimate_period=float("inf"),  # of 30 s by default, in which a run may not make a step
        )  # fmt: skip
        self._steps = None if steps is None else self.add_task("training", total=steps[1], completed=steps[0])
        self._stages: dict[Stage, TaskID] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._refresh_all, name="progress", daemon=True)

    def start(self) -> None:
        """Begins to show the bars."""
        super().start()
        self._thread.start()

    def stop(self) -> None:
        """Ends the display; the bar of the steps stays."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        self._show([])
        super().stop()

    def steps_done(self, step: int) -> None:
        """The run has made this step."""
        if self._steps is not None:
            self.update(self._steps, completed=step)

    def _refresh_all(self) -> None:
        while not self._end.wait(1 / _REFRESHES_PER_SECOND):
            if stages := running():  # none between two stages: a line that comes and goes at once would flicker
                self._show(stages)
            self.refresh()

    def _show(self, stages: Sequence[Stage]) -> None:
        for stage in [stage for stage in self._stages if stage not in stages]:
            self.remove_task(self._stages.pop(stage))
        for stage in stages:
            if stage not in self._stages:
                self._stages[stage] = self.add_task(stage.title, total=None, stage=stage)
            share = stage.share()
            self.update(self._stages[stage], total=None if share is None else 1.0, completed=share or 0.0)


def _column(width: int) -> Column:
    """A column that is mostly as wide as this: the bars do not move when another stage begins."""
    return Column(min_width=width, no_wrap=True)


class _Counts(ProgressColumn):
    """What is done of what."""

    def render(self, task: Task) -> Text:
        stage = task.fields.get("stage")
        text = f"{int(task.completed)}/{task.total} steps" if stage is None else stage.counts()
        return Text(text, style="progress.download")


class _Remaining(ProgressColumn):
    """The time that remains."""

    max_refresh = 0.5  # else the number flickers

    def render(self, task: Task) -> Text:
        stage = task.fields.get("stage")
        seconds = task.time_remaining if stage is None else stage.remaining_seconds()
        return Text("" if seconds is None else f"{duration(seconds)} left", style="progress.remaining")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, e.g. 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextlib.contextmanager
def _log_above_the_bars() -> Iterator[None]:
    """Log lines go to what sys.stderr is now: a handler that still wrote to the terminal itself would tear the bars."""
    handlers = [
        handler for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__
    ]  # fmt: skip
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(sys.__stderr__)


@contextlib.contextmanager
def _lines(seconds_between: float) -> Iterator[None]:
    """Logs how far each stage is that takes longer than this time, again and again."""
    end = threading.Event()

    def log() -> None:
        while not end.wait(seconds_between):
            for stage in running():
                if stage.seconds() >= seconds_between:
                    logger.info(line(stage))

    thread = threading.Thread(target=log, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def line(stage: Stage) -> str:
    """One line about a stage, e.g. `step 3, rollout: 120/256 responses, 1:00 so far, about 2:10 left`."""
    remaining = stage.remaining_seconds()
    parts = [
        stage.counts(),
        f"{duration(stage.seconds())} so far",
        f"about {duration(remaining)} left" if remaining else "",
    ]
    return f"{stage.title}: {', '.join(part for part in parts if part)}"
