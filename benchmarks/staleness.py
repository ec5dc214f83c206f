"""Generating the next step's rollouts during training, compared with strictly on-policy training, on the demo.

    python benchmarks/staleness.py [--seeds 3] [--out runs/staleness] [key=value ...]

Run `make demo` first, which creates the starting model, and use an idle machine. For each seed `megatron-hapo train
configs/demo_cpu.yaml` runs twice, one run at a time: with `async.max_staleness` 0, and with 1 and token-level
importance correction. If it is interrupted, the same command continues. Prints, over the seeds, the accuracy at the
last step (mean, lowest to highest) and the median seconds per step without evaluation, and the same as JSON in the last
line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.demo_run import train

SETTINGS = {
    0: ("async.max_staleness=0",),
    1: ("async.max_staleness=1", "algorithm.importance_correction.level=token"),
}
LENGTH = ("steps=30", "checkpoint.hf_at_end=false")


def main() -> None:
    """Measure, and print the results; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every run, e.g. steps=50")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs: dict[int, list[dict[str, float]]] = {staleness: [] for staleness in SETTINGS}
    for seed in range(options.seeds):
        for staleness, figures in runs.items():
            name = f"staleness{staleness}_seed{seed}"
            train(options.out, name, [f"seed={seed}", *SETTINGS[staleness], *LENGTH, *options.overrides])
            figures.append(measured(options.out / name))
    report(runs)


def measured(folder: Path) -> dict[str, float]:
    """Figures of a finished run. Steps 1 and 2 do not count: memory is new, and no rollouts were generated ahead."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 2]
    return {
        "accuracy": [row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None][-1],
        "step_seconds": float(np.median([row["time/step"] - row.get("time/eval", 0.0) for row in steps])),
        "engine_idle_share": float(np.median([row["utilization/engine_idle_share"] for row in steps])),
        "trainer_idle_share": float(np.median([row["utilization/trainer_idle_share"] for row in steps])),
    }


def report(runs: dict[int, list[dict[str, float]]]) -> None:
    """Print the table and the JSON line; `runs` has the figures of each seed by staleness."""
    table = Table("staleness", *runs[0][0], title="mean over the seeds (lowest to highest)")
    for staleness, figures in runs.items():
        columns = [[run[name] for run in figures] for name in figures[0]]
        table.add_row(str(staleness), *(f"{np.mean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in columns))
    console = Console(width=130)
    console.print(table)
    console.print(f"load average {os.getloadavg()[0]:.1f}")
    print(json.dumps({"benchmark": "staleness", "runs": runs}))


if __name__ == "__main__":
    main()
