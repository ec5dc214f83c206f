"""What replaying the engine's experts changes, on the demo's task: a small model with 8 experts, and one without.

    python benchmarks/route_replay.py [--steps 4] [--seeds 1] [--without] [--out runs/route_replay] [key=value ...]

Makes both models (a few minutes), then runs `megatron-hapo train configs/demo_cpu.yaml` with them, one run at a time:
engines in bfloat16 and the trainer in float32, so that they round differently. The model with experts is scored twice a
step, with and without the engine's experts. `--without` also trains it without replay. The model without experts, whose
mismatch is the one to be reached, is trained with one seed. Prints means over steps and seeds, and the same as JSON in
the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.demo_run import ROOT, train

JOB = (
    *("rollout.dtype=bfloat16", "rollout.engines=1", "parallel.dp=1", "checkpoint.hf_at_end=false"),
    *("algorithm.adaptive_temperature.enabled=false", "eval.every=20"),
)
EXPERTS = 8
METRICS = ("rollout/route_agreement", *(f"rollout/{prefix}{name}" for prefix in ("", "unreplayed_")
           for name in ("mismatch_kl", "mismatch_kl_p99", "logprob_abs_diff", "logprob_abs_diff_max")))  # fmt: skip


def main() -> None:
    """Measure, and print the results; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--without", action="store_true", help="also train without replay")
    parser.add_argument("--out", type=Path, default=Path("runs/route_replay"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, tuple[int, tuple[str, ...]]] = {
        "dense": (0, ()),
        "experts": (EXPERTS, ("rollout.compare_routes_every=1",)),
    }
    if options.without:
        kinds["experts, no replay"] = (EXPERTS, ("rollout.replay_routes=false",))
    results: dict[str, list[dict[str, float]]] = {}
    for kind, (experts, settings) in kinds.items():
        model = make_model(options.out / f"model_{experts}_experts", experts)
        for seed in range(options.seeds if experts else 1):
            name = f"{kind.replace(', ', '_').replace(' ', '_')}_seed{seed}"
            overrides = [f"seed={seed}", f"steps={options.steps}", f"model.path={model}", *JOB, *settings]
            train(options.out, name, [*overrides, *options.overrides])
            results.setdefault(kind, []).append(measured(options.out / name))
    report(results)


def make_model(folder: Path, experts: int) -> Path:
    """The demo's model with this number of experts, made once."""
    if not (folder / "tokenizer.json").exists():  # the last file that is written
        command = [sys.executable, str(ROOT / "tools/make_demo_model.py"), str(folder), "--experts", str(experts)]
        subprocess.run(command, check=True)
    return folder.absolute()


def measured(folder: Path) -> dict[str, float]:
    """Means over the steps of a finished run, and its last accuracy."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    means = {name: [row[name] for row in rows if row.get(name) is not None] for name in METRICS}
    accuracies = [row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None]
    return {name: float(np.mean(values)) for name, values in means.items() if values} | {"accuracy": accuracies[-1]}


def report(results: dict[str, list[dict[str, float]]]) -> None:
    """Print the table and the JSON line; `results` has the figures of each seed by kind of run."""
    table = Table("metric", *results, title="mean over steps and seeds")
    for name in (*METRICS, "accuracy"):
        columns = [[run[name] for run in runs if name in run] for runs in results.values()]
        table.add_row(name, *(f"{np.mean(values):.3g}" if values else "" for values in columns))
    console = Console(width=130)
    console.print(table)
    console.print(f"load average {os.getloadavg()[0]:.1f}")
    print(json.dumps({"benchmark": "route_replay", "results": results}))


if __name__ == "__main__":
    main()
