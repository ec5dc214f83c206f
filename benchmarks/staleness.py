"""Generating rollouts up to N steps ahead during training, compared with strictly on-policy training, on the demo.

    python benchmarks/staleness.py [--staleness 0 1 2 4] [--seeds 3] [--out runs/staleness] [key=value ...]

Run `make demo` first, which creates the starting model, and use an idle machine. For each seed `megatron-hapo train
configs/demo_cpu.yaml` runs once for each N, one run at a time: with `async.max_staleness` N, and above 0 with
token-level importance correction and responses that continue after a sync. If it is interrupted, the same command
continues. Prints, over the seeds, the accuracy at the last step (mean, lowest to highest), and of the steps' seconds
without evaluation, tokens per second, staleness and idle shares the medians; the same as JSON in the last line.
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

AHEAD = ("algorithm.importance_correction.level=token", "weight_sync.in_flight=pause")
MEDIANS = {
    "step_seconds": "time/step",
    "tokens_per_second": "tokens_per_second",
    "staleness": "rollout/staleness",
    "engine_idle_share": "utilization/engine_idle_share",
    "trainer_idle_share": "utilization/trainer_idle_share",
}
LENGTH = ("steps=30", "checkpoint.hf_at_end=false")


def main() -> None:
    """Measure, and print the results; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4], metavar="N")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every run, e.g. steps=50")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs: dict[int, list[dict[str, float]]] = {staleness: [] for staleness in options.staleness}
    for seed in range(options.seeds):
        for staleness, figures in runs.items():
            name = f"staleness{staleness}_seed{seed}"
            settings = [f"seed={seed}", f"async.max_staleness={staleness}", *(AHEAD if staleness else ())]
            train(options.out, name, [*settings, *LENGTH, *options.overrides])
            figures.append(measured(options.out / name))
    report(runs)


def measured(folder: Path) -> dict[str, float]:
    """Figures of a finished run. The first steps do not count: memory is new, and what is generated ahead piles up."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 5]
    return {
        "accuracy": [row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None][-1],
        **{name: float(np.median([row[metric] for row in steps])) for name, metric in MEDIANS.items()},
        "staleness_max": max(row["rollout/staleness_max"] for row in steps),
    }


def report(runs: dict[int, list[dict[str, float]]]) -> None:
    """Print the table and the JSON line; `runs` has the figures of each seed by staleness."""
    table = Table("max_staleness", *next(iter(runs.values()))[0], title="mean over the seeds (lowest to highest)")
    for staleness, figures in runs.items():
        columns = [[run[name] for run in figures] for name in figures[0]]
        table.add_row(str(staleness), *(f"{np.mean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in columns))
    console = Console(width=130)
    console.print(table)
    console.print(f"load average {os.getloadavg()[0]:.1f}")
    print(json.dumps({"benchmark": "staleness", "runs": runs}))


if __name__ == "__main__":
    main()
