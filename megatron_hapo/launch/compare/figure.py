"""The figure of an experiment: learning curves, pass@k, entropy, response lengths and clipped tokens by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_hapo.errors import DataError
from megatron_hapo.launch.compare.curves import Budget, Curve
from megatron_hapo.observe.report import STYLE
from megatron_hapo.rollout.eval_statistics import pass_ks

type Curves = Mapping[str, Mapping[int, Curve]]
"""Label of an arm -> seed -> curve."""
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d31")
"""Okabe and Ito's palette, distinguishable by colour-blind readers, without its yellow."""
LINES = ("-", "--", ":")


def draw(curves: Curves, path: Path) -> None:
    """Write the figure: means over the seeds, with bands of one standard error.

    Raises:
        DataError: the file cannot be written.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(17, 8.4), dpi=110, layout="constrained")
        axes = figure.subplots(2, 4)
        titles: dict[Budget, str] = {
            "steps": "step",
            "responses": "responses sampled",
            "seconds": "seconds of training",
        }
        for ax, budget in zip(axes[0], titles, strict=False):
            _learning_curves(ax, curves, budget)
            ax.set(title="pass@1, evaluation", xlabel=titles[budget])
        _pass_at_k(axes[0, 3], curves)
        _metric(axes[1, 0], curves, "entropy/mean", "Entropy, nats per token")
        _entropy_against_accuracy(axes[1, 1], curves)
        _metric(axes[1, 2], curves, "response_length/mean", "Response length, tokens")
        _clipping(axes[1, 3], curves)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=9)
        try:
            FigureCanvasAgg(figure).print_png(str(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from None


def _style(number: int) -> tuple[str, str]:
    return COLORS[number % len(COLORS)], LINES[number // len(COLORS) % len(LINES)]


def _band(ax: Axes, number: int, label: str, x: np.ndarray, values_SX: np.ndarray) -> None:
    color, line = _style(number)
    mean_X, error_X = values_SX.mean(0), _standard_error(values_SX)
    ax.fill_between(x, mean_X - error_X, mean_X + error_X, color=color, alpha=0.12, lw=0)
    ax.plot(x, mean_X, line, color=color, lw=1.7, label=label)


def _standard_error(values_SX: np.ndarray) -> np.ndarray:
    seeds = len(values_SX)
    return values_SX.std(0, ddof=1) / np.sqrt(seeds) if seeds > 1 else np.zeros(values_SX.shape[1:])


def _learning_curves(ax: Axes, curves: Curves, budget: Budget) -> None:
    for number, (label, by_seed) in enumerate(curves.items()):
        costs_SE = np.array([curve.costs(budget) for curve in by_seed.values()])
        values_SE = np.array([curve.mean(1) for curve in by_seed.values()])
        _band(ax, number, label, costs_SE.mean(0), values_SE)


def _metric(ax: Axes, curves: Curves, metric: str, title: str) -> None:
    for number, (label, by_seed) in enumerate(curves.items()):
        steps, values_SX = _series(list(by_seed.values()), metric)
        if len(steps):
            _band(ax, number, label, steps, values_SX)
    ax.set(title=title, xlabel="step")


def _series(runs: Sequence[Curve], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which all runs have the metric, and its values there, [seeds, steps]."""
    found = [{row["step"]: row[metric] for row in run.rows if row.get(metric) is not None} for run in runs]
    steps = sorted(set.intersection(*(set(of_run) for of_run in found)))
    return np.array(steps), np.array([[of_run[step] for step in steps] for of_run in found])


def _entropy_against_accuracy(ax: Axes, curves: Curves) -> None:
    """Both at the evaluations: does a method keep its entropy while it learns, or pay with it?"""
    for number, by_seed in enumerate(curves.values()):
        runs = list(by_seed.values())
        steps, entropies_SX = _series(runs, "entropy/mean")
        accuracies = [{int(step): value for step, value in zip(run.steps, run.mean(1), strict=True)} for run in runs]
        shared = [i for i, step in enumerate(steps) if all(int(step) in of_run for of_run in accuracies)]
        if shared:
            color, line = _style(number)
            x = np.mean([[of_run[int(steps[i])] for i in shared] for of_run in accuracies], axis=0)
            ax.plot(x, entropies_SX[:, shared].mean(0), line, color=color, lw=1.5, marker="o", ms=4)
    ax.set(title="Entropy against pass@1", xlabel="pass@1, evaluation", ylabel="nats per token")


def _pass_at_k(ax: Axes, curves: Curves) -> None:
    for number, (label, by_seed) in enumerate(curves.items()):
        runs = list(by_seed.values())
        ks = [1, *pass_ks(runs[0].samples)]
        values_SK = np.array([[run.mean(k)[-1] for k in ks] for run in runs])
        _band(ax, number, label, np.arange(len(ks)), values_SK)
        ax.set_xticks(range(len(ks)), [str(k) for k in ks])
    ax.set(title="pass@k, last evaluation", xlabel="k")


def _clipping(ax: Axes, curves: Curves) -> None:
    """Clipped tokens, % of all: below and above the range together."""
    for number, (label, by_seed) in enumerate(curves.items()):
        runs = list(by_seed.values())
        steps, low_SX = _series(runs, "loss/clip_fraction_low")
        other, high_SX = _series(runs, "loss/clip_fraction_high")
        if len(steps) and np.array_equal(steps, other):
            _band(ax, number, label, steps, 100 * (low_SX + high_SX))
    ax.set(title="Clipped tokens, % of all", xlabel="step")
