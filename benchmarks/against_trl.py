"""A step of the demo's job here and in TRL's GRPOTrainer: the same machine, model, task and sizes, in turns.

    python benchmarks/against_trl.py [--turns 3] [--sizes demo 135m] [--steps N] [--prompts N] [--out runs/against_trl]

Run it after `make demo`, which makes the starting model, on an idle machine. TRL (requirements-trl.txt) is installed
into `OUT/trl` beside the project's own packages. Each turn runs TRL on one thread, TRL on two, and this project; the
first two steps of each run do not count. Prints the median seconds of a step, the stages of ours, and the processor
seconds of its processes; the last line is the same as JSON.

135m: 30 layers, 576 wide, random weights, 8 prompts x 8 responses of 40 tokens, two updates a step. `--turns 1
--steps 4` takes 15 minutes on two cores of 70 GFLOPS each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
UNCOUNTED_STEPS = 2
ROLES = {
    "trainer rank": "ray::TrainerActor",
    "engine actor": "ray::EngineActor",
    "scheduler": "sglang::scheduler",
    "detokenizer": "sglang::detokenizer",
    "reward worker": "megatron_hapo.reward",
    "driver": "megatron_hapo train",
}
"""Processes of a run by what their command line contains; the others are Ray's."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One job, for both sides."""

    steps: int
    prompts: int
    samples: int
    updates: int
    settings: tuple[str, ...] = ()
    """Settings of our run, beside those of configs/demo_cpu_grpo.yaml."""


SIZES = {
    "demo": Size(steps=14, prompts=32, samples=8, updates=4),
    "135m": Size(
        steps=6, prompts=8, samples=8, updates=2,
        settings=("rollout.max_running_requests=64", "rollout.kv_cache_tokens=8192"),
    ),
}  # fmt: skip


@dataclass
class Figures:
    """Measurements of one contestant, over all turns."""

    step_seconds: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu_seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """A step's, by process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, help="of each run, in place of the size's own; more than two")
    parser.add_argument("--prompts", type=int, help="of a step, in place of the size's own; a multiple of its updates")
    parser.add_argument("--out", type=Path, default=Path("runs/against_trl"))
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of our runs, e.g. rollout.engines=2"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    install_trl(options.out / "trl")
    results = {}
    for name in options.sizes:
        given = {key: value for key in ("steps", "prompts") if (value := getattr(options, key)) is not None}
        size = replace(SIZES[name], **given)
        model = ROOT / "runs/demo_model" if name == "demo" else make_135m(options.out / "model_135m")
        contestants = {"TRL, 1 thread": Figures(), "TRL, 2 threads": Figures(), "megatron-hapo": Figures()}
        for turn in range(options.turns):
            for threads, who in ((1, "TRL, 1 thread"), (2, "TRL, 2 threads")):
                run_trl(model, size, options.out, threads, contestants[who])
            run_ours(model, size, options.out, f"{name}_{turn}", options.overrides, contestants["megatron-hapo"])
        report(name, contestants)
        results[name] = {who: vars(figures) for who, figures in contestants.items()}
    print(json.dumps({"benchmark": "against_trl", "load": os.getloadavg()[0], "sizes": results}))


def install_trl(folder: Path) -> None:
    """TRL and accelerate without what they need, which the project has."""
    if folder.is_dir():
        return
    uv = Path(sys.executable).parent / "uv"
    requirements = ROOT / "benchmarks/requirements-trl.txt"
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", folder]
    subprocess.run([*map(str, command), "--requirement", str(requirements)], check=True)


def make_135m(folder: Path) -> Path:
    """A Llama of 135 million random parameters with the demo's tokenizer; it never ends a response by itself."""
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "runs/demo_model")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_trl(model: Path, size: Size, out: Path, threads: int, figures: Figures) -> None:
    """Add one run of TRL."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str((out / "trl").resolve())]),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        sys.executable, str(ROOT / "benchmarks/trl_job.py"), str(model), "--steps", str(size.steps), "--prompts",
        str(size.prompts), "--samples", str(size.samples), "--updates", str(size.updates), "--threads", str(threads),
        "--out", str(out / "trl_output"),
    ]  # fmt: skip
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith('{"step"')]
    for row in rows[UNCOUNTED_STEPS:]:
        figures.step_seconds.append(row["seconds"])
        figures.cpu_seconds["process"].append(row["cpu_seconds"])


def run_ours(model: Path, size: Size, out: Path, name: str, overrides: list[str], figures: Figures) -> None:
    """Add one run of this project."""
    run_folder = out / name
    subprocess.run(["rm", "-rf", str(run_folder)], check=True)
    settings = [
        f"name={name}", f"output_dir={out}", f"model.path={model}", f"steps={size.steps}", "eval.every=0",
        f"batch.prompts_per_step={size.prompts}", f"batch.samples_per_prompt={size.samples}",
        f"batch.prompts_per_minibatch={size.prompts // size.updates}", "checkpoint.hf_at_end=false",
        *size.settings, *overrides,
    ]  # fmt: skip
    command = [sys.executable, "-m", "megatron_hapo", "train", str(ROOT / "configs/demo_cpu_grpo.yaml"), *settings]
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        watch = CpuWatch(process.pid, run_folder / "metrics.jsonl")
        if process.wait() != 0:
            raise SystemExit(f"the run failed; see {log.name}")
        cpu_seconds, counted = watch.finish()
    for role, seconds in cpu_seconds.items():
        figures.cpu_seconds[role].append(seconds / counted)
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows[UNCOUNTED_STEPS:]:
        figures.step_seconds.append(row["time/step"])
        for key, value in row.items():
            if key.startswith("time/") and key != "time/step":
                figures.stages[key.removeprefix("time/")].append(value)


class CpuWatch:
    """Processor seconds of a run's processes between two of its steps, read off the process tree."""

    def __init__(self, pid: int, metrics: Path):
        self._root, self._metrics, self._end = psutil.Process(pid), metrics, threading.Event()
        self._first: tuple[int, dict[int, tuple[str, float]]] | None = None
        self._last: tuple[int, dict[int, tuple[str, float]]] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> tuple[dict[str, float], int]:
        """Seconds of each role, and the number of steps in which they were spent."""
        self._end.set()
        self._thread.join()
        assert self._first is not None, "no step was seen"
        assert self._last is not None
        spent: dict[str, float] = defaultdict(float)
        for pid, (role, seconds) in self._last[1].items():
            spent[role] += seconds - self._first[1].get(pid, (role, 0.0))[1]
        return dict(spent), max(1, self._last[0] - self._first[0])

    def _run(self) -> None:
        steps = 0
        while not self._end.wait(0.1):
            lines = self._metrics.read_text().count("\n") if self._metrics.is_file() else 0
            if lines == steps:
                continue
            steps = lines
            if steps >= UNCOUNTED_STEPS:
                seen = (steps, self._seconds())
                self._first, self._last = self._first or seen, seen

    def _seconds(self) -> dict[int, tuple[str, float]]:
        found = {}
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                line, times = " ".join(process.cmdline()), process.cpu_times()
            except psutil.Error:
                continue
            role = next((role for role, mark in ROLES.items() if mark in line), "Ray")
            found[process.pid] = (role, times.user + times.system)
        return found


def report(name: str, contestants: dict[str, Figures]) -> None:
    table = Table("", "median s", "lowest", "highest", "against TRL, 1 thread", title=f"{name}: a step")
    reference = float(np.median(contestants["TRL, 1 thread"].step_seconds))
    for who, figures in contestants.items():
        seconds = figures.step_seconds
        row: list[Any] = [np.median(seconds), min(seconds), max(seconds), np.median(seconds) / reference]
        table.add_row(who, *(f"{value:.2f}" for value in row))
    ours = contestants["megatron-hapo"]
    parts = Table("stage", "median s", title="stages of ours")
    for stage, seconds in ours.stages.items():
        parts.add_row(stage, f"{np.median(seconds):.3f}")
    processes = Table("process", "CPU s a step", title="processes of ours")
    for role, seconds in ours.cpu_seconds.items():
        processes.add_row(role, f"{np.mean(seconds):.3f}")
    console = Console(width=130)
    for each in (table, parts, processes):
        console.print(each)
    console.print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
