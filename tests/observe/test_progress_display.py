"""Bars and lines about the running stages: titles, counts, remaining time, terminals and files."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from megatron_hapo.observe import running_stages
from megatron_hapo.observe.progress_display import duration, line, showing_progress
from megatron_hapo.observe.running_stages import Stage, WorkCount, running, stage

_IN_A_TERMINAL = """
import logging, sys, time
from pathlib import Path
from megatron_hapo.observe import running_stages
from megatron_hapo.observe.metrics import MetricsLogger
from megatron_hapo.observe.running_stages import stage

logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
with MetricsLogger(Path(sys.argv[1]), 3) as logger:
    for step in (1, 2):
        with stage(f"step {step}"), stage("rollout"):
            for done in range(5):
                running_stages.report(done, 8, "responses")
                time.sleep(0.2)
            logging.warning("said in step %d", step)
        logger.log(step, {"reward/mean": step / 8})
"""


@pytest.fixture(autouse=True)
def no_earlier_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a stage took in another test of this process must not show here as remaining time."""
    monkeypatch.setattr(running_stages, "_seconds", {})


def test_the_innermost_stages_of_all_threads_are_shown_with_those_around_them() -> None:
    begun, end = threading.Event(), threading.Event()

    def ahead() -> None:
        with stage("step 4 ahead"), stage("rollout"):
            begun.set()
            end.wait(10)

    thread = threading.Thread(target=ahead)
    with stage("step 3"), stage("log_probs"):
        thread.start()
        begun.wait(10)
        assert [each.title for each in running()] == ["step 3, log-probs", "step 4 ahead, rollout"]
    end.set()
    thread.join()
    assert running() == []


def test_a_stage_that_fails_is_over() -> None:
    with pytest.raises(KeyError), stage("reward"):
        raise KeyError
    assert running() == []
    running_stages.report(1, 2, "scores")  # in no stage: nobody's
    running_stages.advance()
    running_stages.follow(lambda: (1, 2))


def test_counts_and_remaining_time_follow_the_reports() -> None:
    with stage("a counted stage of this test"):
        (shown,) = running()
        assert (shown.counts(), shown.share()) == ("", None)
        running_stages.report(0, 8, "scores")
        assert (shown.counts(), shown.share(), shown.remaining_seconds()) == ("0/8 scores", 0.0, None)
        running_stages.advance(2)
        time.sleep(0.1)
        assert (shown.counts(), shown.share()) == ("2/8 scores", 0.25)
        before, remaining, after = shown.seconds(), shown.remaining_seconds(), shown.seconds()
        assert remaining is not None
        assert 3 * before <= remaining <= 3 * after


def test_micro_batches_are_a_part_of_the_mini_batch_that_runs() -> None:
    count = WorkCount()
    with stage("update"):
        (shown,) = running()
        running_stages.follow(count.read)
        count.start(4)
        for _ in range(2):
            count.begin_next()
        assert (shown.counts(), shown.share()) == ("1/4 micro-batches", 0.25)
        running_stages.report(1, 2, "mini-batches")
        assert (shown.counts(), shown.share()) == ("1/2 mini-batches", (1 + 1 / 4) / 2)
        count.end()
        assert shown.share() == 0.5


def test_a_count_in_a_file_is_seen_by_another_process(tmp_path: Path) -> None:
    ours = WorkCount(tmp_path / "count")
    program = (
        "import sys; from pathlib import Path; from megatron_hapo.observe.running_stages import WorkCount; "
        "count = WorkCount(Path(sys.argv[1])); count.start(7); [count.begin_next() for _ in range(4)]"
    )
    assert ours.read() == (0, 0)
    subprocess.run([sys.executable, "-c", program, tmp_path / "count"], check=True)
    assert ours.read() == (3, 7)


def test_what_counts_nothing_is_judged_by_the_last_time() -> None:
    with stage("step 1"), stage("a stage of this test"):
        (shown,) = running()
        assert (shown.share(), shown.remaining_seconds()) == (None, None)
        time.sleep(0.2)
    with stage("step 2"), stage("a stage of this test"):
        (shown,) = running()
        time.sleep(0.05)
        before = shown.seconds()
        share, remaining = shown.share(), shown.remaining_seconds()
        after = shown.seconds()
        assert share is not None
        assert remaining is not None
        assert remaining + after >= 0.2
        assert before <= share * (remaining + after)
        assert share * (remaining + before) <= after


def test_a_stage_that_takes_long_has_a_line_again_and_again_where_there_is_no_terminal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    console = Console(file=io.StringIO())
    with showing_progress(console, seconds_between_lines=0.2), stage("step 3"), stage("rollout"):
        running_stages.report(64, 256, "responses")
        time.sleep(0.9)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) > 1
    pattern = re.compile(r"step 3, rollout: 64/256 responses, 0:0\d so far, about 0:0\d left")
    assert all(map(pattern.fullmatch, lines))
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_short_stage_has_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with showing_progress(Console(file=io.StringIO()), seconds_between_lines=0.6):
        for _ in range(15):
            with stage("reward"):
                time.sleep(0.1)
    assert caplog.records == []


def test_times_and_lines_in_words() -> None:
    assert [duration(seconds) for seconds in (0.4, 75, 3725)] == ["0:00", "1:15", "1:02:05"]
    assert line(Stage("weight_sync", None)) == "sync: 0:00 so far"


def test_in_a_terminal_the_table_and_the_log_stay_whole_above_the_bars(tmp_path: Path) -> None:
    """In a pseudo-terminal, as it looks at the end and as it looked in between."""
    written = in_terminal([sys.executable, "-c", _IN_A_TERMINAL, str(tmp_path)])
    screen, seen = Screen(), []
    for part in re.split("(?<=\n)|(?=\r)", written):
        screen.feed(part)
        seen.append([text for text in screen.text() if text])
    final = seen[-1]
    assert [text.split()[0] for text in final] == [
        "WARNING", "step", "1/3", "WARNING", "2/3", "training"
    ]  # fmt: skip
    assert final[0] == "WARNING root: said in step 1"
    assert any(re.search(r"^step 2, rollout .* [1-4]/8 responses +0:00:0\d +0:0\d left", t) for s in seen for t in s)
    assert not any(text.startswith("step 2, rollout") for text in final)
    assert re.search(r"training .* 2/3 steps", final[-1])


def test_nothing_of_a_bar_gets_into_a_pipe(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _IN_A_TERMINAL, str(tmp_path)], capture_output=True, text=True)
    assert [text.split()[0] for text in done.stdout.splitlines()] == ["step", "1/3", "2/3"]
    assert done.stderr.splitlines() == ["WARNING root: said in step 1", "WARNING root: said in step 2"]
    assert "\x1b" not in done.stdout + done.stderr


def in_terminal(command: list[str]) -> str:
    """What a program writes to a terminal of 160 columns."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 1 << 16):
            written += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0, written.decode()
    return written.decode()


class Screen:
    """The lines of a terminal, as far as rich's control codes need it: cursor up, erase line, carriage return."""

    def __init__(self) -> None:
        self._lines, self._row, self._column = [""], 0, 0

    def feed(self, text: str) -> None:
        for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|.|\n", text, re.DOTALL):
            if token == "\n":
                self._row += 1
                self._lines += [""] * (self._row + 1 - len(self._lines))
            elif token == "\r":
                self._column = 0
            elif token.startswith("\x1b"):
                count, action = token[2:-1], token[-1]
                if action == "A":
                    self._row -= int(count or 1)
                    assert self._row >= 0, "above the first line"
                elif action == "K":
                    self._lines[self._row] = ""
                else:
                    assert action in "mhl", f"{token!r} is not known"
            else:
                line = self._lines[self._row].ljust(self._column)
                self._lines[self._row] = line[: self._column] + token + line[self._column + 1 :]
                self._column += 1

    def text(self) -> list[str]:
        return [line.rstrip() for line in self._lines]
