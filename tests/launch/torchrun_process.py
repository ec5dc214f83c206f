"""Runs under torchrun and the Ray launcher as real processes; network namespaces of this machine stand for hosts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from megatron_hapo.config import Config, dump_config
from tests.test_loop import is_timed
from tests.time_limits import patient

ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN": None, "RAY_ADDRESS": None}


class Launch:
    """A command under test, with its output in a file."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str | None] | None = None):
        self.log = log
        variables = {**os.environ, **_ENVIRONMENT, **(environment or {})}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in variables.items() if value is not None},
            )
        self.seen: set[psutil.Process] = set()

    @property
    def text(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace")

    def wait(self, timeout_seconds: float) -> int:
        """The exit code, once the command has ended. All limits here are those of an idle machine."""
        self.until(lambda: self.process.poll() is not None, "end", timeout_seconds)
        return self.process.wait()

    def until(self, condition: Callable[[], Any], what: str, timeout_seconds: float) -> None:
        """Wait for a condition while the command runs, and note all of its descendants."""
        timeout_seconds = patient(timeout_seconds)
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            self.note()
            ended = self.process.poll() is not None and not condition()
            assert not ended, f"ended with {self.process.returncode} before its {what}:\n{self.text[-6000:]}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_seconds} s:\n{self.text[-6000:]}"
            time.sleep(0.3)

    def until_gone(self, timeout_seconds: float) -> None:
        """Wait until every noted process of the ended command has ended too."""
        deadline = time.monotonic() + patient(timeout_seconds)
        while not self.all_gone():
            assert time.monotonic() < deadline, f"still running: {[p for p in self.seen if p.is_running()]}"
            time.sleep(0.3)

    def note(self) -> None:
        """Remember the command's present descendants."""
        try:
            self.seen.update(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def all_gone(self) -> bool:
        """Whether all noted processes have ended."""
        return not [p for p in self.seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def end(self) -> None:
        """Kill the command and every noted process."""
        self.note()
        for process in (psutil.Process(self.process.pid), *self.seen) if self.process.poll() is None else self.seen:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


@contextmanager
def launched(*arguments: Any, **options: Any) -> Iterator[Launch]:
    """A Launch, which is killed at the end of the block."""
    launch = Launch(*arguments, **options)
    try:
        yield launch
    finally:
        launch.end()


def write_config(config: Config, folder: Path) -> Path:
    """Path of the config's file in the folder."""
    path = folder / f"{config.name}.yaml"
    dump_config(config, path)
    return path


def train_command(config: Path) -> list[str]:
    """Arguments of Python that train this config."""
    return ["-m", "megatron_hapo", "train", str(config)]


def torchrun(*options: str, namespace: str = "") -> list[str]:
    """A torchrun command, in a network namespace if one is given."""
    # Hosts do not share /dev/shm either.
    host = ["ip", "netns", "exec", namespace, "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$0" "$@"']
    return [*(host if namespace else []), sys.executable, "-m", "torch.distributed.run", *options]


def metrics_of(config: Config) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without the metrics that depend on the clock."""
    path = config.run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: value for name, value in row.items() if not is_timed(name)} for row in rows]


def kill_hard(process: psutil.Process | subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)


@contextmanager
def two_hosts() -> Iterator[dict[str, str]]:
    """Two network namespaces joined by a veth pair: name to address. Needs root."""
    suffix = f"{os.getpid() % 10000}"
    names = {f"hapo{suffix}a": "10.111.7.1", f"hapo{suffix}b": "10.111.7.2"}
    first, second = names
    cable = [f"va{suffix}", f"vb{suffix}"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", cable[0], "netns", first, "type", "veth", "peer", "name", cable[1], "netns", second)
        for (name, address), end in zip(names.items(), cable, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
