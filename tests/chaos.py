"""A small run that is hit at random moments, and whose metrics and weights must stay those of an undisturbed one.

    python -m tests.chaos --moments 50 --seed 0 [--kinds kill_tree full_disk ...] [--folder FOLDER] [--parallel 2]

One engine, one trainer rank, a checkpoint every two steps, all on CPUs with real parts. A run is hit several times
while it starts and trains; whenever its command has ended, the same command is started again. Metrics of all steps and
the final weights are compared bit for bit with those of a run that nobody disturbed, except for times and for the
metrics that compare the engine's log-probs with the trainer's: their last bits depend on which requests an engine
happens to decode together, and nothing is trained on them here. Prints a table in Markdown. With `--folder` the
undisturbed run and the results are kept, and the command continues with the moments that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_hapo.checkpoint.manifest import write_manifest
from megatron_hapo.config import Config
from tests.chaos_run import DEADLINE_SECONDS, VICTIMS, Run, differences, disk, last_line, rows_of, wait_until
from tests.test_loop import make_config
from tests.time_limits import patient
from tests.tiny_model import write_tiny_qwen3

STEPS = 24
PER_RUN = 5
"""Moments at which one run is hit; the first is drawn from its start, the others from its training."""
MAX_RESTARTS = 4
"""Starts of the command after one moment; one, or two if the first finds the damage, should suffice."""

LEARNING_RATE = 3e-4
"""Weights move, and responses stay as varied as those of the first step: at 3e-3 all of them are alike soon."""
SCORER = """
def score(response, row):
    return sum(character in "abcdefghijklmnopqrstuvwxyz" for character in response) / max(1, len(response))
"""
"""The reward: a random model never solves a task, but its responses differ in their letters."""

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


def _read_results(path: Path) -> dict[int, Moment]:
    """The kept results by number."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {moment.number: moment for moment in (Moment(**json.loads(line)) for line in lines)}


@dataclass(kw_only=True)
class Chaos:
    """Hits runs, and compares them with the reference."""

    folder: Path
    """For the model, the reference and the results; its path must be short, because Ray's sockets are in it."""
    seed: int
    kinds: Sequence[str]
    stop_seconds: float
    parallel: int = 1
    """Runs side by side; each uses about one core."""
    start_seconds: float = 0.0
    step_seconds: float = 0.0
    _waiting: list[int] = field(default_factory=list, init=False)
    """Numbers of the moments that no run has been hit at yet."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def run(self, moments: int) -> list[Moment]:
        """The moments' results; those that the folder already has are not repeated."""
        path = self.folder / "results.jsonl"
        self._prepare()
        self._reference()
        self._waiting = [number for number in range(moments) if number not in _read_results(path)]
        with ThreadPoolExecutor(self.parallel) as threads:
            for lane in [threads.submit(self._hit_runs, lane, path) for lane in range(self.parallel)]:
                lane.result()
        results = _read_results(path)
        return [results[number] for number in range(moments)]

    def _hit_runs(self, lane: int, path: Path) -> None:
        """Hits run after run, until no moment is left, and keeps the results in this file."""
        place = self.folder / str(lane)
        place.mkdir(exist_ok=True)
        while True:
            with self._lock:
                numbers = [self._waiting.pop(0) for _ in range(min(PER_RUN, len(self._waiting)))]
            if not numbers:
                return
            done = self._hit_one_run(numbers, place)
            with self._lock:
                self._waiting = sorted({*self._waiting, *numbers} - {moment.number for moment in done})
                with path.open("a") as file:
                    file.writelines(json.dumps(asdict(moment)) + "\n" for moment in done)

    def _prepare(self) -> None:
        """Writes the model and the scorer, unless the folder has them."""
        if not (model := self.folder / "model").exists():
            write_manifest(write_tiny_qwen3(self.folder / "model.new"))
            (self.folder / "model.new").rename(model)
        (self.folder / "letters.py").write_text(SCORER)

    def config(self, name: str, output_dir: Path, model: Path) -> Config:
        """The job's config, under this name."""
        values = make_config(model, output_dir, {"tp": 1}).model_dump()
        values |= {"name": name, "steps": STEPS}
        values["eval"]["every"] = 0
        values["checkpoint"] |= {"every": 2, "keep": 3}
        values["optimizer"]["lr"] = LEARNING_RATE
        values["reward"]["scorer"] = f"{self.folder / 'letters.py'}:score"
        return Config.model_validate(values)

    def _new_run(self, name: str, output_dir: Path, place: Path) -> Run:
        """A run with temporary files and a model of its own in `place`: a bit of the model may be flipped."""
        model, temporary = place / "model", place / "t"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(self.folder / "model", model)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return Run(self.config(name, output_dir, model), place, temporary)

    def _reference(self) -> None:
        """Trains without any disturbance, unless the folder has that run already, and measures its times."""
        times = self.folder / "reference.json"
        if not times.exists():
            place = self.folder / "0"
            place.mkdir(exist_ok=True)
            run = self._new_run("reference", self.folder / "runs", place)
            shutil.rmtree(run.config.run_dir, ignore_errors=True)
            try:
                run.start()
                wait_until(lambda: run.step() > 0, run, "first step")
                first = time.monotonic()
                wait_until(lambda: run.step() >= STEPS, run, "last step")
                seconds = {"start": first - run.started, "step": (time.monotonic() - first) / (STEPS - 1)}
                wait_until(lambda: run.code() == 0, run, "end")
            finally:
                run.end()
            rewards = [row["reward/mean"] for row in self._reference_rows()]
            assert len(set(rewards)) == STEPS, f"the rewards teach nothing: {rewards}"
            times.write_text(json.dumps(seconds))
            print(f"undisturbed: {seconds}, rewards {rewards}", file=sys.stderr, flush=True)
        seconds = json.loads(times.read_text())
        self.start_seconds, self.step_seconds = seconds["start"], seconds["step"]

    def _reference_rows(self) -> list[dict[str, float]]:
        return rows_of(self.folder / "runs" / "reference")

    def _hit_one_run(self, numbers: Sequence[int], place: Path) -> list[Moment]:
        """Results of these moments, or of as many as fit into one run, with the comparison at its end."""
        done: list[Moment] = []
        with disk(place / "d") as folder:
            run = self._new_run(f"run{numbers[0]}", folder, place)
            try:
                run.start()
                for number in numbers:
                    if run.code() == 0:
                        break
                    done.append(self._one_moment(number, run, is_first=number == numbers[0]))
                    print(done[-1].row(), file=sys.stderr, flush=True)
                    if done[-1].faults:
                        return done
                faults = self._end_and_differences(run)
                for moment in done:
                    moment.faults += faults
                print(f"{run.config.name}: {'; '.join(faults) or 'equal'}", file=sys.stderr, flush=True)
                return done
            finally:
                run.end()

    def _end_and_differences(self, run: Run) -> list[str]:
        """What is wrong with the run at its end."""
        try:
            wait_until(lambda: run.code() is not None, run, "end")
        except AssertionError as stuck:
            return [str(stuck).splitlines()[0]]
        return self._differences(run)

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
        step, log_size, begin = run.step(), run.log_size(), time.monotonic()
        try:
            self._wait_for_moment(moment, run, dice, is_first=is_first)
            step, log_size, begin = run.step(), run.log_size(), time.monotonic()
            undo = HITS[moment.kind.partition("_")[0]](moment, run, dice, self.stop_seconds)
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
            while time.monotonic() < run.started + seconds and run.step() == 0:  # it may start faster than the first
                time.sleep(0.2)
        else:
            target, seconds = min(STEPS, run.step() + dice.randint(0, 2)), dice.uniform(0, self.step_seconds)
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
            # A step may have been complete before anything noticed the disturbance, so one does not count. A run that
            # was hit at its last steps has recovered when it has ended.
            done = run.step() == STEPS if run.code() == 0 else run.code() is None and run.step() >= step + 2
            return undo is None and done

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
            if run.code() == 0:
                moment.how = "the run had ended"
                return
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
    with suppress(psutil.NoSuchProcess):  # the run is about to end
        victim.suspend()
        time.sleep(stop_seconds)
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
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs side by side")
    parser.add_argument("--stop-seconds", type=float, default=60.0)
    parser.add_argument("--folder", type=Path, help="keep model, reference and results here")
    options = parser.parse_args()
    with working_folder(options.folder) as folder:
        chaos = Chaos(
            folder=folder, seed=options.seed, kinds=options.kinds, stop_seconds=options.stop_seconds,
            parallel=options.parallel,
        )  # fmt: skip
        moments = chaos.run(options.moments)
    print(HEADER)
    for moment in moments:
        print(moment.row())
    failed = sum(bool(moment.faults) for moment in moments)
    print(f"\n{len(moments) - failed} of {len(moments)} equal")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
