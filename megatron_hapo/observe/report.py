"""The curves of a run as one picture, from its metrics.jsonl; several runs share the axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_hapo.errors import DataError, one_line
from megatron_hapo.observe.metrics import METRICS_FILE, read_metrics

COLORS = ("#1f6fb4", "#d9822b", "#3a923a", "#b03a48", "#7a5aa6", "#6b6b6b")
STAGES = ("rollout", "reward", "log_probs", "update", "weight_sync")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Run:
    """Metrics of one run, and its colour."""

    name: str
    rows: list[dict[str, float]]
    color: str

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and values of the rows that have this metric; values that no axis can show are left out."""
        points = [(row["step"], row[metric]) for row in self.rows if _can_be_drawn(row.get(metric))]
        return [step for step, _ in points], [value for _, value in points]


def write_report(*run_dirs: Path) -> Path:
    """Path of the picture of these runs, in the folder of the first: `curves.png`, or `comparison.png` for several.

    Raises:
        DataError: no folder is given, one has no metrics, or the picture cannot be written.
    """
    if not run_dirs:
        raise DataError("a report needs at least one run folder")
    runs = [_read(run_dir, COLORS[i % len(COLORS)]) for i, run_dir in enumerate(run_dirs)]
    with mpl.rc_context(STYLE):
        figure = _draw(runs)
        out = run_dirs[0] / ("curves.png" if len(runs) == 1 else "comparison.png")
        try:
            FigureCanvasAgg(figure).print_png(str(out))
        except OSError as error:
            raise DataError(f"{out}: cannot be written: {error.strerror}") from error
    return out


def _can_be_drawn(value: float | None) -> bool:
    return value is not None and abs(value) < 1e100


def _read(run_dir: Path, color: str) -> Run:
    rows = read_metrics(run_dir / METRICS_FILE)
    if not rows:
        raise DataError(f"{run_dir}: no metrics in {METRICS_FILE}; it must be the folder of a run")
    # A dollar sign would begin a formula.
    return Run(name=one_line(run_dir.resolve().name).replace("$", r"\$"), rows=rows, color=color)


def _draw(runs: Sequence[Run]) -> Figure:
    figure = Figure(figsize=(15, 6.6), dpi=110, layout="constrained")
    axes = figure.subplots(2, 4)
    _lines(
        axes[0, 0], runs, "Accuracy, evaluation", {"accuracy": "eval/accuracy"}, marker="o", label_ends=len(runs) == 1
    )
    axes[0, 0].set_ylim(0, 1.02)
    _lines(axes[0, 1], runs, "Reward, training", {"mean": "reward/mean"})
    _lines(axes[0, 2], runs, "Entropy, nats", {"mean": "entropy/mean", "pivot quantile": "entropy/pivot"})
    axes[0, 2].set_ylim(bottom=0)
    _temperature(axes[0, 3], runs)
    _lines(axes[1, 0], runs, "Response length, tokens", {"mean": "response_length/mean"})
    clip_fractions = {"low": "loss/clip_fraction_low", "high": "loss/clip_fraction_high"}
    _lines(axes[1, 1], runs, "Clipped tokens, % of all", clip_fractions, scale=100)
    axes[1, 1].set_ylim(bottom=0)
    _lines(axes[1, 2], runs, "|log-prob engine - trainer|", {"mean": "rollout/logprob_abs_diff"})
    _whole_decades(axes[1, 2], [value for run in runs for value in run.series("rollout/logprob_abs_diff")[1]])
    if len(runs) == 1:
        _seconds_over_steps(axes[1, 3], runs[0])
    else:
        _mean_seconds(axes[1, 3], runs)
        handles = [Line2D([], [], color=run.color, lw=2.5, label=_legend(run)) for run in runs]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(runs), fontsize=10)
    figure.suptitle(runs[0].name if len(runs) == 1 else "", fontsize=12, fontweight="bold", x=0.01, ha="left")
    return figure


def _lines(
    ax: Axes,
    runs: Sequence[Run],
    title: str,
    metrics: dict[str, str],
    *,
    marker: str = "",
    label_ends: bool = False,
    scale: float = 1,
) -> None:
    """Each metric of each run: colours are runs and line styles metrics; with a single run, colours are metrics."""
    for run in runs:
        for i, metric in enumerate(metrics.values()):
            steps, values = run.series(metric)
            color = run.color if len(runs) > 1 else COLORS[i]
            line_style = ("-", "--")[i] if len(runs) > 1 else "-"
            values = [scale * value for value in values]
            ax.plot(steps, values, line_style, color=color, lw=1.6, marker=marker, ms=4)
            if label_ends and values:
                for k, offset in ((0, (7, -10)), (-1, (-2, 6))):
                    ax.annotate(f"{values[k]:.2f}", (steps[k], values[k]), xytext=offset, textcoords="offset points")
    if len(metrics) > 1:
        styles = ("-", "--") if len(runs) > 1 else ("-", "-")
        colors = ("#555555", "#555555") if len(runs) > 1 else COLORS
        ax.legend(
            handles=[
                Line2D([], [], color=color, ls=style, lw=1.6, label=name)
                for name, style, color in zip(metrics, styles, colors, strict=False)
            ]
        )
    _finish(ax, title)


def _legend(run: Run) -> str:
    accuracy = run.series("eval/accuracy")[1]
    return f"{run.name}, accuracy {accuracy[0]:.2f} to {accuracy[-1]:.2f}" if accuracy else run.name


def _whole_decades(ax: Axes, values: Sequence[float]) -> None:
    """Makes the axis logarithmic with powers of ten as limits, so that noise within a decade looks like noise."""
    positive = [value for value in values if value > 0]
    if positive:
        ax.set_yscale("log")
        ax.set_ylim(10 ** math.floor(math.log10(min(positive))), 10 ** (math.floor(math.log10(max(positive))) + 1))


def _temperature(ax: Axes, runs: Sequence[Run]) -> None:
    """The mean as a line within the band from the lowest to the highest temperature of the step."""
    for run in runs:
        steps, mean = run.series("temperature/mean")
        low, high = run.series("temperature/min")[1], run.series("temperature/max")[1]
        if len(steps) == len(low) == len(high):
            ax.fill_between(steps, low, high, color=run.color, alpha=0.18, lw=0)
        ax.plot(steps, mean, color=run.color, lw=1.6)
    _finish(ax, "Sampling temperature, min to max")


def _seconds_over_steps(ax: Axes, run: Run) -> None:
    """Stacked seconds of the stages; the remainder of time/step is the driver's own time."""
    rows = [row for row in run.rows if _can_be_drawn(row.get("time/step"))]
    steps = [row["step"] for row in rows]
    stacks = [[_drawn_or_zero(row.get(f"time/{stage}")) for row in rows] for stage in STAGES]
    rest = [max(row["time/step"] - sum(column), 0.0) for row, column in zip(rows, zip(*stacks), strict=True)]  # noqa: B905
    if rows:
        names = [*(stage.replace("_", " ") for stage in STAGES), "other"]
        ax.stackplot(steps, *stacks, rest, labels=names, colors=COLORS, alpha=0.85, lw=0)
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0))
        ax.set_ylim(bottom=0)
    _finish(ax, "Seconds per step")


def _drawn_or_zero(value: float | None) -> float:
    return value if value is not None and _can_be_drawn(value) else 0.0


def _mean_seconds(ax: Axes, runs: Sequence[Run]) -> None:
    """One stacked bar per run: mean seconds of each stage."""
    left = [0.0] * len(runs)
    for stage, color in zip(STAGES, COLORS, strict=False):
        values = [run.series(f"time/{stage}")[1] for run in runs]
        means = [sum(value) / len(value) if value else 0.0 for value in values]
        ax.barh(range(len(runs)), means, left=left, color=color, alpha=0.85, label=stage.replace("_", " "), height=0.5)
        left = [a + b for a, b in zip(left, means, strict=True)]
    ax.set_yticks(range(len(runs)), [run.name for run in runs])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    ax.set_title("Seconds per step, mean")


def _finish(ax: Axes, title: str) -> None:
    ax.set_title(title)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.margins(x=0.02)
