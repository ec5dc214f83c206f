"""The results of an evaluation as a table of models and sets, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_hapo.rollout.eval_statistics import Estimate, estimate, paired_difference, statistics_of
from megatron_hapo.rollout.evaluation import Evaluated

ALL = "all sets"
"""The row over all sets, in which each counts the same; no set has a name with a space."""


@dataclass(frozen=True)
class SetResult:
    """One model's statistics on one set, or on all."""

    num_problems: int
    num_samples: int | None
    """Responses to each problem; None: the sets have different numbers."""
    estimates: Mapping[str, Estimate]
    """By statistic: avg, pass@K, maj."""
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
    """Print each model's results in percent with their 95 % intervals, and the differences to the first model."""
    console = console or Console()
    rows = [row for sets in results.values() for row in sets.values()]
    statistics = dict.fromkeys(statistic for row in rows for statistic in row.estimates)
    has_models, has_sets = len(results) > 1, any(len(sets) > 1 or "" not in sets for sets in results.values())
    table = Table(
        box=SIMPLE_HEAD, caption="percent, with 95 % bootstrap intervals over the problems", caption_justify="left"
    )
    for shown, title in ((has_models, "model"), (has_sets, "set")):
        if shown:
            table.add_column(title, overflow="fold")
    table.add_column("problems", justify="right")
    table.add_column("samples", justify="right")
    for statistic in statistics:
        table.add_column(_title(statistic, rows), justify="right", no_wrap=True)
    if has_models:
        table.add_column("avg: difference to the first", justify="right", no_wrap=True)
    for model, sets in results.items():
        for number, (name, row) in enumerate(sets.items()):
            labels = [*([model if number == 0 else ""] if has_models else []), *([name] if has_sets else [])]
            cells = [_cell(row.estimates.get(statistic)) for statistic in statistics]
            difference = [_cell(row.differences.get("avg"), signed=True)] if has_models else []
            samples = "mixed" if row.num_samples is None else str(row.num_samples)
            table.add_row(*labels, str(row.num_problems), samples, *cells, *difference)
    console.print(table)


def as_json(results: Mapping[str, Mapping[str, SetResult]]) -> dict[str, Any]:
    """The results as JSON values: for each model and set the estimates and their differences to the first model."""
    return {model: {name or "eval": asdict(row) for name, row in sets.items()} for model, sets in results.items()}


class _ProblemValues:
    """The statistics of each problem of a set."""

    def __init__(self, problems: Sequence[Evaluated]):
        self.uids = [problem.result.uid for problem in problems]
        self.num_samples = len(problems[0].result.correct)
        self.statistics = statistics_of([problem.result for problem in problems])

    def by_uid(self, statistic: str) -> dict[str, float]:
        """The values of one statistic."""
        return dict(zip(self.uids, self.statistics[statistic].tolist(), strict=True))


def _result(sets: Sequence[_ProblemValues], first: Sequence[_ProblemValues]) -> SetResult:
    """The result over these sets; `first` has those of the first model, and is empty for it."""
    common = [statistic for statistic in sets[0].statistics if all(statistic in part.statistics for part in sets)]
    numbers = {part.num_samples for part in sets}
    if len(numbers) > 1:
        common = [statistic for statistic in common if statistic != "maj"]
    differences = {}
    for statistic in common if first else ():
        pairs = zip(first, sets, strict=True)
        if all(statistic in part.statistics for part in first):
            paired = [paired_difference(a.by_uid(statistic), b.by_uid(statistic)) for a, b in pairs]
            if all(len(values_P) for values_P in paired):
                differences[statistic] = estimate(paired)
    return SetResult(
        sum(len(part.uids) for part in sets),
        numbers.pop() if len(numbers) == 1 else None,
        {statistic: estimate([part.statistics[statistic] for part in sets]) for statistic in common},
        differences,
    )


def _title(statistic: str, rows: Sequence[SetResult]) -> str:
    numbers = {row.num_samples for row in rows}
    number = str(*numbers) if len(numbers) == 1 and None not in numbers else "n"
    return statistic if "@" in statistic else f"{statistic}@{number}"


def _cell(value: Estimate | None, *, signed: bool = False) -> str:
    if value is None:
        return ""
    form = "+.1f" if signed else ".1f"
    return f"{100 * value.value:{form}} [{100 * value.low:{form}}, {100 * value.high:{form}}]"
