"""A run that may be hit while it runs: its command, which is started again, its processes, disk and metrics."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from megatron_hapo.config import Config, dump_config
from tests.test_loop import is_timed
from tests.time_limits import patient

ROOT = Path(__file__).parents[1]
DISK_BYTES = 256 << 20
"""Size of the file system that a run writes to; a run needs a few percent of it."""
DEADLINE_SECONDS = 600
"""On an idle machine: a run that has not recovered by then is stuck."""

VICTIMS: dict[str, Callable[[psutil.Process, str], bool]] = {
    "rank": lambda process, command: command.startswith("ray::TrainerActor"),
    "engine": lambda process, command: command.startswith("ray::EngineActor"),
    "scheduler": lambda process, command: command.startswith("sglang::scheduler"),
    "reward": lambda process, command: "megatron_hapo.reward.worker" in command,
    "raylet": lambda process, command: process.name() == "raylet",
    "gcs": lambda process, command: process.name() == "gcs_server",
}


class Run:
    """The command of one run, which is started as often as necessary."""

    def __init__(self, config: Config, folder: Path, temporary: Path):
        self.config, self.temporary = config, temporary
        self._path, self._log = folder / f"{config.name}.yaml", folder / f"{config.name}.err"
        dump_config(config, self._path)
        self._log.write_text("")
        self.process: subprocess.Popen[bytes] | None = None
        self._family: set[psutil.Process] = set()
        self._earlier: set[psutil.Process] = set()
        self.started = 0.0

    def start(self) -> None:
        """Starts the command."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "megatron_hapo", "train", str(self._path)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)
        self._earlier |= self._family
        self._family = {psutil.Process(self.process.pid)}
        self.started = time.monotonic()

    def code(self) -> int | None:
        """The exit code of the command; None while it runs."""
        assert self.process is not None
        self.family()
        return self.process.poll()

    def family(self) -> list[psutil.Process]:
        """The living processes of the command, itself first."""
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            self._family |= set(psutil.Process(self.process.pid).children(recursive=True))
        return sorted((process for process in self._family if process.is_running()), key=lambda process: process.pid)

    def signal(self, number: int) -> None:
        """Sends a signal to every process of the command."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def end(self) -> None:
        """Kills what is left of the command, and of its earlier starts."""
        if self.process is not None:
            self._family |= self._earlier
            self.signal(signal.SIGKILL)
            self.process.wait()

    def left(self) -> list[str]:
        """Names of the processes of all starts that are still running, once they have had time to end."""
        _, alive = psutil.wait_procs(self._earlier | self._family, timeout=patient(60))
        return [process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    def victim(self, name: str) -> psutil.Process | None:
        """A living process of this name; None if there is none (yet)."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                command = " ".join(process.cmdline())
                if process.status() != psutil.STATUS_ZOMBIE and VICTIMS[name](process, command):
                    return process
        return None

    def errors(self, start: int = 0) -> str:
        """The error output from this byte on."""
        return self._log.read_bytes()[start:].decode(errors="replace")

    def log_size(self) -> int:
        """Bytes of error output so far."""
        return self._log.stat().st_size

    def rows(self) -> list[dict[str, float]]:
        """The metrics of complete steps that are compared."""
        return rows_of(self.config.run_dir)

    def step(self) -> int:
        """The last complete step; 0 if there is none."""
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0


def rows_of(run_dir: Path, compared: Callable[[str], bool] | None = None) -> list[dict[str, float]]:
    """The rows of a run folder's metrics that are compared; a last one that is being written does not count."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{name: value for name, value in row.items() if (compared or is_compared)(name)} for row in rows]


def is_compared(metric: str) -> bool:
    """Whether equal runs have the same bits in it."""
    return not is_timed(metric) and not metric.startswith(("rollout/logprob_abs_diff", "rollout/mismatch_kl"))


def differences(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> list[str]:
    """What distinguishes these rows from the expected ones: the first step, and the metrics that differ there."""
    if len(rows) != len(expected):
        return [f"{len(rows)} steps instead of {len(expected)}"]
    for row, want in zip(rows, expected, strict=True):
        if row != want:
            names = [name for name in row | want if row.get(name) != want.get(name)]
            shown = ", ".join(f"{name} {row.get(name)} instead of {want.get(name)}" for name in names[:3])
            return [f"{len(names)} other metrics in step {row['step']:g}: {shown}"]
    return []


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """An empty folder, on a small file system of its own if this user may mount one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(folder)]
    is_mounted = subprocess.run(["mount", *options], check=False, capture_output=True).returncode == 0
    try:
        yield folder
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Callable[[], bool], run: Run, what: str) -> None:
    """Returns once the condition holds; the command must not end before."""
    deadline = time.monotonic() + patient(DEADLINE_SECONDS)
    while not condition():
        assert run.code() in (None, 0), f"ended with {run.code()} before its {what}: {last_line(run.errors())}"
        assert time.monotonic() < deadline, f"no {what} within {patient(DEADLINE_SECONDS):.0f} s"
        if run.code() == 0:
            return
        time.sleep(0.2)


def last_line(text: str) -> str:
    """The last line that is neither empty nor mere information; empty if there is none."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("INFO ")]
    return lines[-1] if lines else ""
