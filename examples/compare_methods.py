"""HAPO's ablation as one figure: GRPO, DAPO, HAPO and each component of HAPO alone, several seeds, on the demo's task.

    python examples/compare_methods.py [--seeds 3] [--jobs 2] [--out runs/compare_methods] [key=value ...]

Run it after `make demo`, which creates the initial model. Every run is `megatron-hapo train` on the small job of
`compare_methods/job.yaml` with an overlay of `configs/methods`. A second call continues where the first one stopped.
The result is a table and a figure of evaluation accuracy, training reward, entropy and response length: the mean over
the seeds, and a band from the lowest to the highest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "examples/compare_methods/job.yaml"
METHODS = {
    "GRPO": "grpo",
    "DAPO": "dapo",
    "HAPO": "hapo",
    "only temperature": "hapo_only_temperature",
    "only group average": "hapo_only_group_average",
    "only redistribution": "hapo_only_redistribution",
    "only clipping": "hapo_only_clip",
}
CURVES = {
    "eval/accuracy": "Accuracy, evaluation",
    "reward/mean": "Reward, training",
    "entropy/mean": "Entropy, nats",
    "response_length/mean": "Response length, tokens",
}
COLORS = ("#1f6fb4", "#d9822b", "#b03a48", "#3a923a", "#7a5aa6", "#6b6b6b", "#2aa5a0")


@dataclass(frozen=True)
class Job:
    """One run: a method with a seed, in the output folder."""

    method: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return f"{METHODS[self.method]}_seed{self.seed}"

    def run(self) -> None:
        """Train or resume, unless the run is finished. Its output goes to `<name>.log` beside the run.

        Raises:
            RuntimeError: training failed; the message has the end of the output.
        """
        if (self.folder / self.name / "curves.png").exists():  # the last file that a run writes
            return
        config, log = self.folder / f"{self.name}.yaml", self.folder / f"{self.name}.log"
        method = METHODS[self.method]
        bases = [JOB, ROOT / f"configs/methods/{method}.yaml"]
        if (own := JOB.with_name(f"{method}.yaml")).exists():  # settings that have an effect for this method only
            bases.append(own)
        config.write_text(json.dumps({"base": [os.path.relpath(base, self.folder) for base in bases]}))
        settings = [f"name={self.name}", f"seed={self.seed}", f"output_dir={self.folder}", *self.overrides]
        command = [sys.executable, "-m", "megatron_hapo", "train", str(config), *settings]
        with log.open("w") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-2000:]}")

    def curve(self, metric: str) -> dict[int, float]:
        """The metric's value by step."""
        rows = map(json.loads, (self.folder / self.name / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: row[metric] for row in rows if row.get(metric) is not None}


def spread(jobs: list[Job], metric: str) -> tuple[list[int], np.ndarray]:
    """The steps that all seeds have, and the values at them, [seeds, steps]."""
    curves = [job.curve(metric) for job in jobs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, np.array([[curve[step] for step in steps] for curve in curves])


def draw(jobs: dict[str, list[Job]], out: Path) -> None:
    """Write the figure: HAPO against the other methods in one row, against its components in the other."""
    figure = Figure(figsize=(16, 7), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(CURVES), sharex=True, sharey="col")
    components = [method for method in METHODS if method.startswith("only")]
    for row, methods in enumerate((("GRPO", "DAPO", "HAPO"), ("HAPO", *components))):
        for ax, (metric, title) in zip(axes[row], CURVES.items(), strict=True):
            for method in methods:
                steps, values = spread(jobs[method], metric)
                color = COLORS[list(METHODS).index(method)]
                ax.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
                ax.plot(steps, values.mean(0), color=color, lw=1.8, label=method)
            ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(color="#e6e6e6")
            ax.set_xlabel("step" if row else "")
        axes[row, 0].legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(str(out))


def table(jobs: dict[str, list[Job]]) -> Table:
    """The values at the last step, one row per method."""
    result = Table(title="last step: mean over the seeds (lowest to highest)")
    for name in ("method", *CURVES.values()):
        result.add_column(name, justify="left" if name == "method" else "right")
    for method, runs in jobs.items():
        finals = [spread(runs, metric)[1][:, -1] for metric in CURVES]
        result.add_row(method, *(f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})" for x in finals))
    return result


def run_all(jobs: list[Job], num_parallel: int) -> Iterator[Job]:
    """The jobs as they finish. The first failure cancels those that have not started, and is raised."""
    with ThreadPoolExecutor(num_parallel) as pool:
        futures = {pool.submit(job.run): job for job in jobs}
        for future in as_completed(futures):
            if future.exception() is not None:
                pool.shutdown(cancel_futures=True)
            future.result()
            yield futures[future]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each method")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel runs; each uses about one core")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_methods"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every run, e.g. steps=50")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    jobs = {
        method: [Job(method, seed, out, tuple(options.overrides)) for seed in range(options.seeds)]
        for method in METHODS
    }
    # Seed by seed, so that an interrupted comparison has equally many seeds of each method.
    by_seed = [job for same_seed in zip(*jobs.values(), strict=True) for job in same_seed]
    for _ in track(run_all(by_seed, options.jobs), total=len(by_seed), description="runs"):
        pass
    draw(jobs, out / "comparison.png")
    Console(width=160).print(table(jobs))
    print(out / "comparison.png")


if __name__ == "__main__":
    main()
