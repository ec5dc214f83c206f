"""Whether a run's processes grow: memory of each kind of process over many steps of a job.

    python benchmarks/memory_over_steps.py CONFIG [--every 500] [key=value ...]

Runs `megatron-hapo train CONFIG` with the given settings, and reads the resident memory of its processes whenever so
many steps more are done. Prints a table in Markdown: MB by step, and the growth in kB a step over the last half.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil

from megatron_hapo.config import load_config
from megatron_hapo.observe.metrics import METRICS_FILE

SECONDS_BETWEEN_LOOKS = 0.5
KINDS = {
    "driver": "megatron_hapo train",
    "trainer ranks": "ray::TrainerActor",
    "engine actors": "ray::EngineActor",
    "schedulers": "sglang::scheduler",
    "reward workers": "megatron_hapo.reward",
    "raylet": "raylet/raylet",
    "GCS": "gcs_server",
}
"""What the command line of each kind of process contains."""


def main() -> None:
    """Run the job, and print the table; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--every", type=int, default=500, help="steps between two rows")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    metrics = load_config(options.config, options.overrides).run_dir / METRICS_FILE
    command = [sys.executable, "-m", "megatron_hapo", "train", str(options.config), *options.overrides]
    rows: dict[int, dict[str, float]] = {}
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            step = num_steps(metrics)
            if step and step // options.every > max(rows, default=-options.every) // options.every:
                rows[step] = megabytes(psutil.Process(process.pid))
                print(f"step {step} after {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
            time.sleep(SECONDS_BETWEEN_LOOKS)
    print_table(rows)
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {time.monotonic() - begin:.0f} s")
    raise SystemExit(process.returncode)


def num_steps(metrics: Path) -> int:
    """Complete lines but the first, which is the evaluation's before the first step if there is one."""
    return max(0, metrics.read_bytes().count(b"\n") - 1) if metrics.exists() else 0


def megabytes(root: psutil.Process) -> dict[str, float]:
    """Resident memory by kind of process, in all processes of the run."""
    found: dict[str, float] = defaultdict(float)
    for process in [root, *root.children(recursive=True)]:
        try:
            command, resident = " ".join(process.cmdline()), process.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
        found[next((kind for kind, sign in KINDS.items() if sign in command), "others")] += resident / 1e6
    return dict(found)


def print_table(rows: dict[int, dict[str, float]]) -> None:
    """MB by step and kind."""
    kinds = [kind for kind in (*KINDS, "others") if any(kind in row for row in rows.values())]
    print(f"| step | {' | '.join(kinds)} |\n| ---: |{' ---: |' * len(kinds)}")
    for step, row in rows.items():
        print(f"| {step} | {' | '.join(f'{row.get(kind, 0):.1f}' for kind in kinds)} |")
    if len(steps := list(rows)) > 1:
        first, last = steps[len(steps) // 2 - 1], steps[-1]
        growth = [(rows[last].get(kind, 0) - rows[first].get(kind, 0)) * 1e3 / (last - first) for kind in kinds]
        print(f"| kB a step from {first} on | {' | '.join(f'{value:.2f}' for value in growth)} |")


if __name__ == "__main__":
    main()
