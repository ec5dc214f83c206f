"""The runs of an experiment as curves, and paired differences between its methods with bootstrap intervals.

The mean over problems is a mean over evaluation sets of their means, as in `eval/accuracy`. Shape letters: `S` seeds,
`P` problems of all sets, `E` evaluations of a run, `B` bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hapo.errors import DataError, one_line
from megatron_hapo.observe.metrics import METRICS_FILE, read_metrics
from megatron_hapo.rollout.eval_statistics import CONFIDENCE, RESAMPLES, pass_at_k

type Budget = Literal["steps", "responses", "seconds"]
_SEED = 20250916


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run: its evaluations, and what it had cost when it made them."""

    steps: np.ndarray
    """[E] int64, ascending."""
    responses: np.ndarray
    """[E] float64, training responses that had been sampled, those of dropped groups included."""
    seconds: np.ndarray
    """[E] float64, seconds of training steps without their evaluations."""
    uids: tuple[str, ...]
    """Of the P problems."""
    sets: np.ndarray
    """[P] int64, which evaluation set a problem belongs to, from 0."""
    correct: np.ndarray
    """[E, P] int64, how many of the responses to a problem were correct."""
    samples: int
    """Responses to each problem."""
    rows: list[dict[str, float]]
    """Its metrics by step."""

    def costs(self, budget: Budget) -> np.ndarray:
        """[E], what each evaluation had cost in this currency."""
        match budget:
            case "steps":
                return self.steps.astype(np.float64)
            case "responses":
                return self.responses
            case "seconds":
                return self.seconds
            case _:
                assert_never(budget)

    def mean(self, k: int) -> np.ndarray:
        """[E] float64, pass@k: the mean over the sets of their means over problems."""
        return self.pass_at(k) @ problem_weights(self.sets)

    def pass_at(self, k: int) -> np.ndarray:
        """[E, P] float64, pass@k of every problem; k = 1 is the share of correct responses."""
        by_count = np.array([pass_at_k(count, self.samples, k) for count in range(self.samples + 1)])
        return by_count[self.correct]

    def pass_when(self, k: int, budget: Budget, spent: float) -> np.ndarray:
        """[P], pass@k when so much had been spent: linear between the two evaluations around it."""
        costs_E, values_EP = self.costs(budget), self.pass_at(k)
        after = int(np.clip(np.searchsorted(costs_E, spent), 1, len(costs_E) - 1))
        low, high = costs_E[after - 1], costs_E[after]
        share = float(np.clip((spent - low) / max(high - low, 1e-12), 0, 1))
        return (1 - share) * values_EP[after - 1] + share * values_EP[after]


@dataclass(frozen=True)
class Difference:
    """A method's value, and its paired difference from the baseline's."""

    value: float
    difference: float
    low: float
    high: float

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def read_curve(run_dir: Path, responses_per_step: int, *, named_sets: bool = False) -> Curve:
    """The curve of a finished run.

    Args:
        responses_per_step: responses that a step trains on.
        named_sets: whether the evaluation has several sets, which are told apart by what precedes the row in a uid.
    Raises:
        DataError: metrics or recorded evaluations are missing.
    """
    rows = read_metrics(run_dir / METRICS_FILE)
    tables = {}
    for path in sorted((run_dir / "rollouts").glob("eval_*.parquet")):
        try:
            tables[int(path.stem.removeprefix("eval_"))] = pq.read_table(path, columns=["uid", "sample", "correctness"])
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read: {one_line(error)}") from None
    if not rows or len(tables) < 2:
        raise DataError(
            f"{run_dir}: a comparison needs metrics and at least two recorded evaluations, got {len(tables)}"
        )
    counts = {step: _correct_by_problem(table) for step, table in tables.items()}
    uids = tuple(counts[min(counts)])
    if any(set(of_step) != set(uids) for of_step in counts.values()):
        raise DataError(f"{run_dir}: the evaluations are of different problems")
    steps = sorted(counts)
    training = [row for row in rows if row["step"] > 0]
    generated = [responses_per_step / max(row.get("rollout/kept_groups", 1.0), 1e-9) for row in training]
    seconds = [row["time/step"] - row.get("time/eval", 0.0) for row in training]

    def until(step: int, costs: Sequence[float]) -> float:
        return float(sum(cost for row, cost in zip(training, costs, strict=True) if row["step"] <= step))

    return Curve(
        steps=np.array(steps),
        responses=np.array([until(step, generated) for step in steps]),
        seconds=np.array([until(step, seconds) for step in steps]),
        uids=uids,
        sets=np.unique([uid.rpartition("/")[0] if named_sets else "" for uid in uids], return_inverse=True)[1],
        correct=np.array([[counts[step][uid][0] for uid in uids] for step in steps]),
        samples=next(iter(counts[steps[0]].values()))[1],
        rows=rows,
    )


def _correct_by_problem(table: pa.Table) -> dict[str, tuple[int, int]]:
    """uid -> correct responses, and all."""
    found: dict[str, tuple[int, int]] = {}
    for uid, correctness in zip(table["uid"].to_pylist(), table["correctness"].to_pylist(), strict=True):
        right, total = found.get(uid, (0, 0))
        found[uid] = (right + (correctness == 1.0), total + 1)
    return found


def common_budget(curves: Sequence[Curve], budget: Budget) -> float:
    """What every run has spent by its last evaluation: the least of all runs."""
    return min(float(curve.costs(budget)[-1]) for curve in curves)


def compare(
    method: Mapping[int, Curve], baseline: Mapping[int, Curve], *, k: int, budget: Budget, spent: float
) -> Difference:
    """The method against the baseline, paired by seed and problem, when both had spent so much.

    Args:
        method, baseline: seed -> curve, of the same seeds and problems.
    """
    assert method.keys() == baseline.keys(), "runs are paired by their seeds"
    values_SP = np.array([curve.pass_when(k, budget, spent) for curve in method.values()])
    differences_SP = values_SP - np.array([baseline[seed].pass_when(k, budget, spent) for seed in method])
    sets_P = next(iter(method.values())).sets
    low, high = interval(differences_SP, sets_P)
    weights_P = problem_weights(sets_P)
    return Difference(float((values_SP @ weights_P).mean()), float((differences_SP @ weights_P).mean()), low, high)


def problem_weights(sets_P: np.ndarray) -> np.ndarray:
    """[P] float64, the share of each problem in a mean over sets of their means; the shares add up to 1."""
    _, set_P, sizes = np.unique(sets_P, return_inverse=True, return_counts=True)
    return 1 / (sizes[set_P] * len(sizes))


def interval(differences_SP: np.ndarray, sets_P: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, under resampling of seeds and of each set's problems, with replacement.

    All seeds see the same problems, so both are resampled independently, and the interval says how the difference would
    vary over other seeds and other problems. It is rather too wide than too narrow. The resamples are always the same.

    Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1(2), 2007.
    """
    generator = np.random.default_rng(_SEED)

    def shares(size: int) -> np.ndarray:
        return generator.multinomial(size, np.full(size, 1 / size), RESAMPLES) / size

    means_BP = shares(len(differences_SP)) @ differences_SP
    of_sets = [np.flatnonzero(sets_P == number) for number in np.unique(sets_P)]
    means_B = np.mean([(means_BP[:, found] * shares(len(found))).sum(1) for found in of_sets], axis=0)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means_B, (tail, 1 - tail))
    return float(low), float(high)
