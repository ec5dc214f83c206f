"""A small run that is hit at random moments, and whose metrics and weights must stay those of an undisturbed one.

    python -m tests.chaos --moments 50 --seed 0 [--kinds kill_tree full_disk ...] [--folder FOLDER]

One engine, one trainer rank, a checkpoint every two steps, all on CPUs with real parts. A run is hit several times
while it starts and trains; whenever its command has ended, the same command is started again. Metrics of all steps and
the final weights are compared bit for bit with those of a run that nobody disturbed, except for times and for the
metrics that compare the engine's log-probs with the trainer's: their last bits depend on which requests an engine
happens to decode together, and nothing is trained on them here. Prints a table in Markdown. With `--folder` the results
are kept, and the command continues with the moments that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_hapo.checkpoint.manifest import write_manifest
from megatron_hapo.config import Config, dump_config
from tests.test_loop import is_timed, make_config
from tests.time_limits import patient
from tests.tiny_model import write_tiny_qwen3

ROOT = Path(__file__).parents[1]
STEPS = 24
PER_RUN = 5
"""Moments at which one run is hit; the first is drawn from its start, the others from its training."""
DISK_BYTES = 256 << 20
"""Size of the file system that a run writes to; a run needs a few percent of it."""
DEADLINE_SECONDS = 600
"""On an idle machine: a run that has not recovered by then is stuck."""
MAX_RESTARTS = 4
"""Starts of the command after one moment; one, or two if the first finds the damage, should suffice."""

VICTIMS: dict[str, Callable[[psutil.Process, str], bool]] = {
    "rank": lambda process, command: command.startswith("ray::TrainerActor"),
    "engine": lambda process, command: command.startswith("ray::EngineActor"),
    "scheduler": lambda process, command: command.startswith("sglang::scheduler"),
    "reward": lambda process, command: "megatron_hapo.reward.worker" in command,
    "raylet": lambda process, command: process.name() == "raylet",
    "gcs": lambda process, command: process.name() == "gcs_server",
}
KINDS = (
    *("kill_tree", "kill_driver"),
    *(f"kill_{name}" for name in VICTIMS),
    *("stop_tree", "stop_one", "full_disk", "flip_checkpoint", "flip_model"),
)
"""kill: SIGKILL; stop: SIGSTOP, and SIGCONT after `--stop-seconds`; flip: SIGKILL of the tree, then one flipped bit."""


@dataclass(kw_only=True)
class Moment:
    """What happened at one moment, and after it."""

    number: int
    kind: str
    when: str = ""
    """Seconds after the start, or the last complete step and the seconds after it."""
    how: str = ""
    """What exactly was hit, where the kind leaves a choice."""
    exit_codes: list[int] = field(default_factory=list)
    """Of the commands that ended before the run had recovered."""
    report: str = ""
    """The last line of the error output, without INFO, when the command ended, or until the recovery."""
    seconds: float = 0.0
    """Until the run was further than at the moment."""
    steps_lost: int = 0
    faults: list[str] = field(default_factory=list)
    """Why the moment counts as failed; empty if it does not."""
    errors: str = ""
    """The whole error output from the moment to the recovery."""

    def row(self) -> str:
        """The table's row."""
        ended = ", ".join(str(code) for code in self.exit_codes) or "goes on"
        report = self.report.replace("|", "\\|")
        result = "; ".join(self.faults) or "yes"
        kind = f"{self.kind} ({self.how})" if self.how else self.kind
        return (
            f"| {self.number} | {kind} | {self.when} | {ended} | {report} | {self.seconds:.0f} | {self.steps_lost} | "
            f"{result} |"
        )


HEADER = (
    "| # | kind | moment | exit code | last line of stderr | s to recover | steps lost | equal |\n"
    "| ---: | --- | --- | --- | --- | ---: | ---: | --- |"
)


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


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    """The rows of a run folder's metrics that are compared; a last one that is being written does not count."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{name: value for name, value in row.items() if is_compared(name)} for row in rows]


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


@dataclass(kw_only=True)
class Chaos:
    """Hits runs, and compares them with the reference."""

    folder: Path
    """For the model, the reference and the results; its path must be short, because Ray's sockets are in it."""
    seed: int
    kinds: Sequence[str]
    stop_seconds: float
    start_seconds: float = 0.0
    step_seconds: float = 0.0

    def run(self, moments: int) -> list[Moment]:
        """The moments' results; those that the folder already has are not repeated."""
        results = self.folder / "results.jsonl"
        done = [Moment(**json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []
        self._reference()
        while len(done) < moments:
            numbers = range(len(done), min(moments, (len(done) // PER_RUN + 1) * PER_RUN))
            new = self._hit_one_run(numbers)
            done += new
            with results.open("a") as file:
                file.writelines(json.dumps(asdict(moment)) + "\n" for moment in new)
        return done[:moments]

    def config(self, name: str, output_dir: Path) -> Config:
        """The job's config, under this name."""
        model = self.folder / "model"
        if not model.exists():
            write_manifest(write_tiny_qwen3(self.folder / "model.new"))
            (self.folder / "model.new").rename(model)
        values = make_config(model, output_dir, {"tp": 1}).model_dump()
        values |= {"name": name, "steps": STEPS}
        values["eval"]["every"] = 0
        values["checkpoint"] |= {"every": 2, "keep": 3}
        return Config.model_validate(values)

    def _new_run(self, name: str, output_dir: Path) -> Run:
        temporary = self.folder / "t"
        temporary.mkdir(exist_ok=True)
        return Run(self.config(name, output_dir), self.folder, temporary)

    def _reference(self) -> None:
        """Trains without any disturbance, unless the folder has that run already, and measures its times."""
        times = self.folder / "reference.json"
        if not times.exists():
            run = self._new_run("reference", self.folder / "runs")
            shutil.rmtree(run.config.run_dir, ignore_errors=True)
            run.start()
            wait_until(lambda: run.step() > 0, run, "first step")
            first = time.monotonic()
            wait_until(lambda: run.step() >= STEPS, run, "last step")
            seconds = {"start": first - run.started, "step": (time.monotonic() - first) / (STEPS - 1)}
            wait_until(lambda: run.code() == 0, run, "end")
            times.write_text(json.dumps(seconds))
        seconds = json.loads(times.read_text())
        self.start_seconds, self.step_seconds = seconds["start"], seconds["step"]

    def _reference_rows(self) -> list[dict[str, float]]:
        return rows_of(self.folder / "runs" / "reference")

    def _hit_one_run(self, numbers: Sequence[int]) -> list[Moment]:
        """Results of these moments, or of as many as fit into one run, with the comparison at its end."""
        done: list[Moment] = []
        with disk(self.folder / "d") as place:
            run = self._new_run(f"run{numbers[0]}", place)
            try:
                run.start()
                for number in numbers:
                    if run.code() == 0:
                        break
                    done.append(self._one_moment(number, run, is_first=number == numbers[0]))
                    print(done[-1].row(), file=sys.stderr, flush=True)
                    if done[-1].faults:
                        return done
                wait_until(lambda: run.code() is not None, run, "end")
                faults = self._differences(run)
                for moment in done:
                    moment.faults += faults
                if faults:
                    print(f"{run.config.name}: {'; '.join(faults)}", file=sys.stderr, flush=True)
                return done
            finally:
                run.end()

    def _differences(self, run: Run) -> list[str]:
        """What distinguishes a run that has ended from the reference, and what it has left behind."""
        if run.code() != 0:
            return [f"the run ended with {run.code()}: {last_line(run.errors())}"]
        reference, faults = self.folder / "runs" / "reference", differences(run.rows(), self._reference_rows())
        weights = [(folder / "hf" / "model.safetensors") for folder in (run.config.run_dir, reference)]
        files = [sorted(path.parent.glob("*.safetensors")) for path in weights]
        if [file.read_bytes() for file in files[0]] != [file.read_bytes() for file in files[1]] or not files[1]:
            faults.append("other weights")
        if left := [*run.left(), *(path.name for path in run.temporary.glob("*"))]:
            faults.append(f"left behind: {', '.join(left)}")
        return faults

    def _one_moment(self, number: int, run: Run, *, is_first: bool) -> Moment:
        """Waits for the moment, hits the run and waits until it has recovered."""
        dice = random.Random(f"{self.seed}/{number}")
        order = random.Random(f"{self.seed}/kinds/{number // len(self.kinds)}").sample(self.kinds, len(self.kinds))
        moment = Moment(number=number, kind=order[number % len(self.kinds)])
        self._wait_for_moment(moment, run, dice, is_first=is_first)
        step, log_size, begin = run.step(), run.log_size(), time.monotonic()
        undo = HITS[moment.kind.partition("_")[0]](moment, run, dice, self.stop_seconds)
        try:
            self._recover(moment, run, step, log_size, undo)
        except AssertionError as stuck:
            moment.faults.append(str(stuck).splitlines()[0])
        moment.seconds = time.monotonic() - begin
        moment.errors = run.errors(log_size)
        moment.report = moment.report or last_line(moment.errors) or "-"
        resumed = [line for line in moment.errors.splitlines() if "resuming from" in line]
        if resumed:
            moment.steps_lost = max(0, step - int(resumed[0].rpartition("step_")[2]))
        elif moment.exit_codes or "restart 1 of" in moment.errors:
            moment.steps_lost = step
        if "Traceback" in moment.errors:
            moment.faults.append("a traceback")
        rows = run.rows()  # once, since the run goes on
        moment.faults += differences(rows, self._reference_rows()[: len(rows)])
        return moment

    def _wait_for_moment(self, moment: Moment, run: Run, dice: random.Random, *, is_first: bool) -> None:
        """Sleeps until the moment has come, and until the process to hit exists."""
        if is_first:
            seconds = dice.uniform(0, self.start_seconds)
            time.sleep(max(0.0, run.started + seconds - time.monotonic()))
        else:
            target, seconds = run.step() + dice.randint(0, 2), dice.uniform(0, self.step_seconds)
            wait_until(lambda: run.step() >= target, run, f"step {target}")
            time.sleep(seconds)
        name = moment.kind.partition("_")[2]
        if name in VICTIMS and run.victim(name) is None:
            wait_until(lambda: run.victim(name) is not None, run, name)
            time.sleep(dice.uniform(0, 5))
        step = run.step()
        moment.when = f"step {step} + {seconds:.1f} s" if step else f"start + {time.monotonic() - run.started:.0f} s"

    def _recover(self, moment: Moment, run: Run, step: int, log_size: int, undo: Callable[[], None] | None) -> None:
        """Starts the command again whenever it has ended, until the run is further than it was at the moment.

        Args:
            undo: ends the disturbance, once the command has ended because of it; None: nothing is left to end.
        """

        def recovered() -> bool:
            code = run.code()
            if code is None or (code == 0 and run.step() == STEPS):
                # A step may have been complete before anything noticed the disturbance, so one does not count.
                return undo is None and (code == 0 or run.step() >= min(step + 2, STEPS))
            return False

        deadline = time.monotonic() + patient(DEADLINE_SECONDS)
        while not recovered():
            assert time.monotonic() < deadline, f"stuck for {patient(DEADLINE_SECONDS):.0f} s"
            if (code := run.code()) is not None:
                assert undo is not None or code != 0, "the command ended with 0 before its last step"
                moment.exit_codes.append(code)
                moment.report = last_line(run.errors(log_size)) or moment.report
                assert len(moment.exit_codes) <= MAX_RESTARTS, f"ended {len(moment.exit_codes)} times"
                if undo is not None:
                    undo()
                    undo = None
                run.start()
            time.sleep(0.2)


# ----- what a run is hit by; each returns how to end the disturbance once the command has ended, or None


def kill(moment: Moment, run: Run, dice: random.Random, stop_seconds: float) -> None:
    """SIGKILL of the tree, the driver or one other process."""
    name = moment.kind.partition("_")[2]
    if name == "tree":
        run.signal(signal.SIGKILL)
    elif name == "driver":
        assert run.process is not None
        run.process.kill()
    else:
        while True:  # a start of Ray that is repeated replaces its processes
            wait_until(lambda: run.victim(name) is not None, run, name)
            with suppress(psutil.NoSuchProcess):
                if (victim := run.victim(name)) is not None:
                    victim.kill()
                    return


def stop(moment: Moment, run: Run, dice: random.Random, stop_seconds: float) -> None:
    """SIGSTOP of the tree or of one process, and SIGCONT after `stop_seconds`."""
    moment.how = f"{stop_seconds:g} s"
    if moment.kind == "stop_tree":
        run.signal(signal.SIGSTOP)
        time.sleep(stop_seconds)
        run.signal(signal.SIGCONT)
        return
    victims = {name: victim for name in VICTIMS if (victim := run.victim(name)) is not None}
    name = dice.choice(sorted(victims) or ["driver"])
    assert run.process is not None
    victim = victims.get(name) or psutil.Process(run.process.pid)
    moment.how = f"{name}, {moment.how}"
    victim.suspend()
    time.sleep(stop_seconds)
    with suppress(psutil.NoSuchProcess):
        victim.resume()


def fill(moment: Moment, run: Run, dice: random.Random, stop_seconds: float) -> Callable[[], None]:
    """No byte is left on the disk of the run folder; where it has no file system of its own, no file may grow."""
    place = run.config.output_dir
    if os.path.ismount(place):
        moment.how = "tmpfs"
        filler = place / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1 << 20)):
                pass
        with filler.open("ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1 << 10)):
                pass
        return filler.unlink
    moment.how = "RLIMIT_FSIZE"
    assert run.process is not None
    rank = run.victim("rank")
    for pid in (run.process.pid, *([rank.pid] if rank is not None else [])):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    return lambda: None


def flip(moment: Moment, run: Run, dice: random.Random, stop_seconds: float) -> Callable[[], None] | None:
    """SIGKILL of the tree, then one bit of the newest checkpoint, or of the model folder, is inverted."""
    run.signal(signal.SIGKILL)
    assert run.process is not None
    run.process.wait()
    if moment.kind == "flip_checkpoint":
        folders = sorted((run.config.run_dir / "checkpoints").glob("step_*[0-9]"))
        files = [path for path in folders[-1].rglob("*") if path.is_file()] if folders else []
    else:
        files = [path for path in run.config.model.path.iterdir() if path.is_file()]
    if not files:
        moment.how = "no checkpoint yet"
        return None
    path = dice.choices(sorted(files), [file.stat().st_size for file in sorted(files)])[0]
    bit = dice.randrange(8 * path.stat().st_size)
    moment.how = f"{path.name}, bit {bit}"
    invert(path, bit)
    if moment.kind == "flip_checkpoint":
        return None
    run.start()  # must refuse the model
    return lambda: invert(path, bit)


HITS: dict[str, Callable[[Moment, Run, random.Random, float], Any]] = {
    "kill": kill,
    "stop": stop,
    "full": fill,
    "flip": flip,
}


def invert(path: Path, bit: int) -> None:
    """Inverts one bit of the file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (value,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([value ^ 1 << bit % 8]))


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


@contextmanager
def working_folder(folder: Path | None) -> Iterator[Path]:
    """This folder, which is kept, or a new one, which is removed."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="chaos", dir="/tmp") as new:
        yield Path(new)


def main() -> int:
    """Prints the table; the exit code is 1 if a moment failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--stop-seconds", type=float, default=60.0)
    parser.add_argument("--folder", type=Path, help="keep model, reference and results here")
    options = parser.parse_args()
    with working_folder(options.folder) as folder:
        chaos = Chaos(folder=folder, seed=options.seed, kinds=options.kinds, stop_seconds=options.stop_seconds)
        moments = chaos.run(options.moments)
    print(HEADER)
    for moment in moments:
        print(moment.row())
    failed = sum(bool(moment.faults) for moment in moments)
    print(f"\n{len(moments) - failed} of {len(moments)} equal")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
