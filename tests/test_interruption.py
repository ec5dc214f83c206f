"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megatron_hapo.config import dump_config
from megatron_hapo.launch.run import _graceful_stop
from megatron_hapo.launch.torchrun.failure_detector import STOP_SIGNAL
from tests.test_loop import make_config
from tests.time_limits import patient


def test_sigterm_while_the_parts_start_leaves_no_process(tiny_qwen3: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    dump_config(make_config(tiny_qwen3, tmp_path, {"tp": 1}), config)
    command = [sys.executable, "-m", "megatron_hapo", "train", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        started = _wait_for_an_actor(run.pid)
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=patient(120))
    assert run.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "SIGTERM received" not in errors  # part of the stack that Ray would print
    _, alive = psutil.wait_procs(started, timeout=patient(60))
    assert not alive


@pytest.mark.parametrize("own_comes_first", [True, False])
def test_a_stop_request_of_another_rank_does_not_count_as_a_second_signal(own_comes_first: bool) -> None:
    """torchrun sends SIGTERM to all ranks, so rank 0 gets it from its agent and from the others, in either order."""
    driver: Any = SimpleNamespace(stop_requested=False)
    first, second = (signal.SIGTERM, STOP_SIGNAL) if own_comes_first else (STOP_SIGNAL, signal.SIGTERM)
    previous = signal.getsignal(STOP_SIGNAL)
    try:
        with _graceful_stop(driver):
            signal.raise_signal(first)
            assert driver.stop_requested
            signal.raise_signal(second)
            signal.raise_signal(STOP_SIGNAL)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(STOP_SIGNAL)
    finally:
        signal.signal(STOP_SIGNAL, previous)


def _wait_for_an_actor(pid: int) -> list[psutil.Process]:
    """All descendants of the run, once its first actor has started."""
    deadline = time.monotonic() + patient(120)
    while time.monotonic() < deadline:
        descendants = psutil.Process(pid).children(recursive=True)
        if any(
            "ray::" in " ".join(_command(process)) and "Actor" in " ".join(_command(process)) for process in descendants
        ):
            return descendants
        time.sleep(0.2)
    raise AssertionError(f"no actor has started within {patient(120):g} s")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
