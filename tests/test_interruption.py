"""A run that is told to end before it has begun to train."""

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
from megatron_hapo.launch.torchrun.watch import WISH_TO_STOP
from tests.test_loop import make_config


def test_sigterm_while_the_parts_start_leaves_no_process(tiny_qwen3: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    dump_config(make_config(tiny_qwen3, tmp_path, {"tp": 1}), config)
    command = [sys.executable, "-m", "megatron_hapo", "train", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        started = _wait_for_an_actor(run.pid)
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "SIGTERM received" not in errors  # the stack that Ray prints
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive


@pytest.mark.parametrize("own_comes_first", [True, False])
def test_a_wish_of_another_rank_is_no_second_signal(own_comes_first: bool) -> None:
    """torchrun tells all ranks to end; rank 0 hears it from its agent and from the others, in either order."""
    driver: Any = SimpleNamespace(stop_requested=False)
    first, second = (signal.SIGTERM, WISH_TO_STOP) if own_comes_first else (WISH_TO_STOP, signal.SIGTERM)
    previous = signal.getsignal(WISH_TO_STOP)
    try:
        with _graceful_stop(driver):
            signal.raise_signal(first)
            assert driver.stop_requested
            signal.raise_signal(second)
            signal.raise_signal(WISH_TO_STOP)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(WISH_TO_STOP)
    finally:
        signal.signal(WISH_TO_STOP, previous)


def _wait_for_an_actor(pid: int) -> list[psutil.Process]:
    """Everything that the run has started, once its first actor is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        descendants = psutil.Process(pid).children(recursive=True)
        if any(
            "ray::" in " ".join(_command(process)) and "Actor" in " ".join(_command(process)) for process in descendants
        ):
            return descendants
        time.sleep(0.2)
    raise AssertionError("no actor has started")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
