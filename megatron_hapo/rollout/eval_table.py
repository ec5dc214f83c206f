"""The results of an evaluation as a table of models and sets, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_hapo.rollout.eval_statistics import Estimate, estimate, paired_difference, statistics_of
from megatron_hapo.rollout.evaluation import Evaluated, metric_name, part_means

ALL = "all sets"
"""The row over all sets, in which each counts the same; no set has a name with a space."""


@dataclass(frozen=True)
class SetResult:
    """One model's statistics on one set, or on all."""

    num_problems: int
    num_samples: int | None
    """Responses to each problem; None: the sets have different numbers."""
    estimates: Mapping[str, Estimate]
    """By statistic: avg, pass@K, maj, and the mean of each part of the rewards as reward/NAME."""
    differences: Mapping[str, Estimate]
    """To the first model, over the problems that both have; empty for the first."""


def compare(models: Mapping[str, Mapping[str, Sequence[Evaluated]]]) -> dict[str, dict[str, SetResult]]:
    """For each model, the result of each set by its name and, if there are several sets, of all."""
    values = {
        model: {name: _ProblemValues(problems) for name, problems in sets.items()} for model, sets in models.items()
    }
    reference = next(iter(values))
    results = {}
    for model, sets in values.items():
        parts = {name: [name] for name in sets}
        if len(sets) > 1:
            parts[ALL] = [*sets]
        first = {} if model == reference else values[reference]
        results[model] = {
            name: _result([sets[part] for part in of], [first[part] for part in of if first])
            for name, of in parts.items()
        }
    return results


def print_table(results: Mapping[str, Mapping[str, SetResult]], console: Console | None = None) -> None:
    """Print a table for each model: its results in percent with their intervals, and the differences to the first."""
    console = console or Console()
    first = next(iter(results))
    for model, sets in results.items():
        if len(results) > 1:
            console.print(model, markup=False, style="bold", soft_wrap=True)
        console.print(_model_table(sets, is_first=model == first))
    note = "percent, with 95 % bootstrap intervals over the problems"
    if any(
        map(_is_part, (statistic for sets in results.values() for row in sets.values() for statistic in row.estimates))
    ):
        note = f"{note}; reward/... in the reward's own unit"
    note = f"{note}; differences are to {first}" if len(results) > 1 else note
    console.print(note, markup=False, soft_wrap=True)


def _model_table(sets: Mapping[str, SetResult], *, is_first: bool) -> Table:
    table = Table(box=SIMPLE_HEAD)
    has_names = list(sets) != [""]
    if has_names:
        table.add_column("set", overflow="fold")
    table.add_column("problems", justify="right", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    has_parts = any(_is_part(statistic) for row in sets.values() for statistic in row.estimates)
    table.add_column("value" if has_parts else "percent", justify="right", no_wrap=True)
    if not is_first:
        table.add_column("difference", justify="right", no_wrap=True)
    for name, row in sets.items():
        for number, (statistic, value) in enumerate(row.estimates.items()):
            labels = [name if number == 0 else ""] if has_names else []
            cells = [str(row.num_problems) if number == 0 else "", _title(statistic, row), _cell(statistic, value)]
            if not is_first:
                difference = row.differences.get(statistic)
                cells.append("" if difference is None else _cell(statistic, difference, signed=True))
            table.add_row(*labels, *cells)
    return table


def as_json(results: Mapping[str, Mapping[str, SetResult]]) -> dict[str, Any]:
    """The results as JSON values: for each model and set the estimates and their differences to the first model."""
    return {model: {name or "eval": asdict(row) for name, row in sets.items()} for model, sets in results.items()}


class _ProblemValues:
    """The statistics of each problem of a set."""

    def __init__(self, problems: Sequence[Evaluated]):
        uids = [problem.result.uid for problem in problems]
        self.num_problems = len(uids)
        self.num_samples = len(problems[0].result.correct)
        self.by_uid: dict[str, dict[str, float]] = {
            name: dict(zip(uids, values_P.tolist(), strict=True))
            for name, values_P in statistics_of([problem.result for problem in problems]).items()
        }
        """The values of each statistic; those of a part of the rewards may be missing for some problems."""
        self.by_uid |= part_means(problems)

    def values(self, statistic: str) -> np.ndarray:
        """[P] float64 values of one statistic."""
        return np.array([*self.by_uid[statistic].values()])


def _result(sets: Sequence[_ProblemValues], first: Sequence[_ProblemValues]) -> SetResult:
    """The result over these sets; `first` has those of the first model, and is empty for it."""
    common = [statistic for statistic in sets[0].by_uid if all(statistic in part.by_uid for part in sets)]
    numbers = {part.num_samples for part in sets}
    if len(numbers) > 1:
        common = [statistic for statistic in common if statistic != "maj"]
    differences = {}
    for statistic in common if first else ():
        pairs = zip(first, sets, strict=True)
        if all(statistic in part.by_uid for part in first):
            paired = [paired_difference(a.by_uid[statistic], b.by_uid[statistic]) for a, b in pairs]
            if all(len(values_P) for values_P in paired):
                differences[statistic] = estimate(paired)
    return SetResult(
        sum(part.num_problems for part in sets),
        numbers.pop() if len(numbers) == 1 else None,
        {statistic: estimate([part.values(statistic) for part in sets]) for statistic in common},
        differences,
    )


def _title(statistic: str, row: SetResult) -> str:
    if _is_part(statistic):
        return statistic
    return metric_name(statistic, "n" if row.num_samples is None else row.num_samples)


def _is_part(statistic: str) -> bool:
    return statistic.startswith("reward/")


def _cell(statistic: str, value: Estimate, *, signed: bool = False) -> str:
    scale, form = (1, ".3g") if _is_part(statistic) else (100, ".1f")
    form = f"+{form}" if signed else form
    return f"{scale * value.value:{form}} [{scale * value.low:{form}}, {scale * value.high:{form}}]"
