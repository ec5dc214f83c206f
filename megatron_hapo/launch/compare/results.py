"""What an experiment shows: tables of paired differences, and sentences that say no more than the intervals."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_hapo.config.experiment import Arm, Experiment, PlannedRun
from megatron_hapo.errors import DataError, HapoError
from megatron_hapo.launch.compare.curves import Budget, Curve, Difference, common_budget, compare, read_curve
from megatron_hapo.launch.compare.figure import draw
from megatron_hapo.launch.compare.runs import is_finished

FIGURE, TEXT, NUMBERS = "comparison.png", "RESULTS.md", "results.json"


@dataclass(frozen=True)
class Column:
    """One comparison: a statistic when every run had spent as much."""

    title: str
    k: int
    budget: Budget
    spent: float


def write_results(experiment: Experiment, runs: Sequence[PlannedRun]) -> Path:
    """Write tables, sentences, figure and numbers into the experiment's folder, and return the path of the text.

    Arms of which not all runs are finished are left out, and named.

    Raises:
        DataError: nothing can be compared yet, or a file cannot be written.
    """
    folder = runs[0].config.run_dir.parent
    arms, missing = _finished(runs)
    text = [f"# {experiment.name}\n", _what_was_run(experiment, runs)]
    settings = dict.fromkeys(run.arm.setting for run in runs)
    numbers: dict[str, dict[str, dict[str, float]]] = {}
    curves: dict[str, dict[int, Curve]] = {}
    for setting in settings:
        labels = dict.fromkeys(run.arm.label for run in runs if run.arm.setting == setting)
        of_setting = {label: arms[label] for label in labels if label in arms}
        baseline = Arm(experiment.baseline, setting).label
        if baseline not in of_setting:
            text.append(f"The runs of the baseline{f' under {setting}' if setting else ''} are not finished.\n")
            continue
        curves |= of_setting
        columns = _columns(list(of_setting.values()))
        table = {
            label: [
                compare(by_seed, of_setting[baseline], k=column.k, budget=column.budget, spent=column.spent)
                for column in columns
            ]
            for label, by_seed in of_setting.items()
        }
        text += [*([f"## {setting}\n"] if setting else []), _table(baseline, columns, table)]
        text.append(_sentences(baseline, columns, table))
        numbers |= {
            label: {column.title: asdict(found) for column, found in zip(columns, row, strict=True)}
            for label, row in table.items()
        }
    if not curves:
        raise DataError(f"{folder}: nothing to compare yet: no arm has all of its runs, or the baseline has not")
    if missing:
        text.append(f"Left out, since not all of their runs are finished: {', '.join(missing)}.\n")
    draw(curves, folder / FIGURE)
    text.append(f"![curves of the methods]({FIGURE})\n")
    text.append("Means over the seeds, with bands of one standard error.\n")
    try:
        (folder / NUMBERS).write_text(json.dumps(numbers, indent=1))
        (folder / TEXT).write_text("\n".join(text))
    except OSError as error:
        raise HapoError(f"{folder}: cannot be written: {error.strerror}") from None
    return folder / TEXT


def _finished(runs: Sequence[PlannedRun]) -> tuple[dict[str, dict[int, Curve]], list[str]]:
    """Curves by arm and seed, and the arms of which runs are missing."""
    by_arm: dict[str, list[PlannedRun]] = {}
    for run in runs:
        by_arm.setdefault(run.arm.label, []).append(run)
    missing = [label for label, of_arm in by_arm.items() if not all(map(is_finished, of_arm))]
    finished = {
        label: {run.seed: _curve(run) for run in sorted(of_arm, key=lambda run: run.seed)}
        for label, of_arm in by_arm.items()
        if label not in missing
    }
    return finished, missing


def _curve(run: PlannedRun) -> Curve:
    config = run.config
    responses = config.batch.prompts_per_step * config.batch.samples_per_prompt
    return read_curve(config.run_dir, responses, named_sets=len(config.data.eval_sets) > 1)


def _columns(curves: Sequence[Mapping[int, Curve]]) -> list[Column]:
    runs = [curve for by_seed in curves for curve in by_seed.values()]
    last, samples = int(common_budget(runs, "steps")), runs[0].samples
    middle = int(min(runs[0].steps, key=lambda step: abs(step - last / 2)))
    columns = [Column(f"pass@1, step {middle}", 1, "steps", middle), Column(f"pass@1, step {last}", 1, "steps", last)]
    if samples > 1:
        columns.append(Column(f"pass@{samples}, step {last}", samples, "steps", last))
    units: dict[Budget, str] = {"responses": "responses", "seconds": "s"}
    for budget, unit in units.items():
        spent = common_budget(runs, budget)
        columns.append(Column(f"pass@1, {spent:,.0f} {unit}", 1, budget, spent))
    return columns


def _what_was_run(experiment: Experiment, runs: Sequence[PlannedRun]) -> str:
    config = runs[0].config
    batch = config.batch
    sizes = [f"{len(experiment.methods)} methods", f"{len(experiment.seeds)} seeds"]
    if experiment.settings:
        sizes.append(f"{len(experiment.settings)} settings")
    return (
        f"{', '.join(sizes)}: {len(runs)} runs of {config.steps} steps of {batch.prompts_per_step} prompts with "
        f"{batch.samples_per_prompt} responses each; {experiment.parallel} at a time on a machine of {os.cpu_count()} "
        "cores. Times depend on what else the machine does; the other columns do not.\n"
    )


def _table(baseline: str, columns: Sequence[Column], table: Mapping[str, Sequence[Difference]]) -> str:
    lines = [
        f"Differences in points from {baseline}, paired by seed and problem, with 95 % bootstrap intervals; bold where "
        "the interval leaves out zero. The intervals are not adjusted for their number.\n",
        f"| method | {' | '.join(column.title for column in columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    for label, row in table.items():
        cells = [f"{found.value:.3f}" if label == baseline else _cell(found) for found in row]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(found: Difference) -> str:
    change = f"{100 * found.difference:+.1f}"
    change = f"**{change}**" if found.is_shown else change
    return f"{found.value:.3f} ({change}; {100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _sentences(baseline: str, columns: Sequence[Column], table: Mapping[str, Sequence[Difference]]) -> str:
    lines = []
    for number, column in enumerate(columns):
        rows = {label: row[number] for label, row in table.items() if label != baseline}
        above = [label for label, found in rows.items() if found.low > 0]
        below = [label for label, found in rows.items() if found.high < 0]
        open_ = [label for label in rows if label not in above and label not in below]
        parts = [
            f"{verdict} {baseline}: {', '.join(labels)}"
            for verdict, labels in (("above", above), ("below", below), ("no difference shown from", open_))
            if labels
        ]
        if parts:
            lines.append(f"- {column.title}: {'; '.join(parts)}.")
    return "\n".join([*lines, ""])
