"""Evaluation sets: how each is sampled, and its metrics, scored without the overlong penalty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np

from megatron_hapo.config import Config
from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.observe.running_stages import stage
from megatron_hapo.protocols import RewardPool, RolloutPool
from megatron_hapo.rollout.collect import generate_scored
from megatron_hapo.rollout.eval_statistics import ProblemResult, statistics_of
from megatron_hapo.types import Prompt, Sampling, ScoredGroup

EVAL_SEED = 1 << 40  # outside the seeds of the training steps


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts that are evaluated alike."""

    name: str
    """Empty if `data.eval` is a single source."""
    prompts: Sequence[Prompt]
    sampling: Sampling


@dataclass(frozen=True)
class Evaluated:
    """The responses to one problem, as far as statistics need them."""

    result: ProblemResult
    lengths: tuple[int, ...]
    """Tokens of each response."""
    truncated: tuple[bool, ...]
    """Whether it was cut off at the longest response."""
    parts: tuple[Mapping[str, float], ...] = ()
    """The named parts of its reward."""


def evaluation_sets(config: Config, prompts: Mapping[str, Sequence[Prompt]]) -> list[EvaluationSet]:
    """The sets of `data.eval`. Seeds are the same at every step, so that steps are comparable."""
    sets = []
    for name, source in config.data.eval_sets.items():
        how = config.eval.of_set(source, max_response_tokens=config.rollout.max_response_tokens)
        sampling = Sampling(
            samples=how.samples, temperature=how.temperature, top_p=how.top_p,
            max_response_tokens=how.max_response_tokens, stop_token_ids=config.rollout.stop_token_ids,
            seed=config.seed + EVAL_SEED,
        )  # fmt: skip
        scored = [replace(prompt, scorer=how.scorer) for prompt in prompts[name]] if how.scorer else prompts[name]
        sets.append(EvaluationSet(name, scored, sampling))
    return sets


def evaluate(
    pool: RolloutPool,
    rewards: RewardPool,
    sets: Sequence[EvaluationSet],
    *,
    record: Callable[[list[ScoredGroup]], object] = lambda groups: None,
) -> dict[str, float]:
    """The metrics of all sets, each response sampled and scored once; `record` gets the groups of all sets."""
    evaluated, recorded = {}, []
    for part in sets:
        with stage(part.name) if part.name else nullcontext():
            groups = generate_scored(pool, rewards, part.prompts, part.sampling, StepClock())
        recorded += groups
        evaluated[part.name] = [
            Evaluated(
                ProblemResult(
                    group.rollouts[0].prompt.uid,
                    tuple(score.correct for score in group.scores),
                    tuple(score.answer for score in group.scores),
                ),
                tuple(len(rollout.response_ids) for rollout in group.rollouts),
                tuple(rollout.finish_reason == "length" for rollout in group.rollouts),
                tuple(score.parts for score in group.scores),
            )
            for group in groups
        ]
    record(recorded)
    return evaluation_metrics(evaluated)


def evaluation_metrics(evaluated: Mapping[str, Sequence[Evaluated]]) -> dict[str, float]:
    """The metrics of sets by their names. Named sets have `eval/NAME/...`, and `eval/...` is the mean over the sets."""
    metrics = {}
    plain = {name: _plain_metrics(problems) for name, problems in evaluated.items()}
    for name, problems in evaluated.items():
        if name:
            metrics |= {f"eval/{name}/{metric}": value for metric, value in plain[name].items()}
            num_samples = len(problems[0].result.correct)
            for statistic, values_P in statistics_of([problem.result for problem in problems]).items():
                if statistic != "avg":
                    metrics[f"eval/{name}/{metric_name(statistic, num_samples)}"] = float(values_P.mean())
    for metric in dict.fromkeys(metric for values in plain.values() for metric in values):
        metrics[f"eval/{metric}"] = float(np.mean([values[metric] for values in plain.values() if metric in values]))
    return metrics


def part_means(problems: Sequence[Evaluated]) -> dict[str, dict[str, float]]:
    """For each named part of the rewards, as `reward/NAME`: its mean over a problem's responses that have it, by uid.

    Problems without such a response are left out.
    """
    means: dict[str, dict[str, float]] = {}
    for name in sorted({name for problem in problems for parts in problem.parts for name in parts}):
        of_problems = {p.result.uid: [parts[name] for parts in p.parts if name in parts] for p in problems}
        means[f"reward/{name}"] = {uid: float(np.mean(values)) for uid, values in of_problems.items() if values}
    return means


def metric_name(statistic: str, num_samples: int | str) -> str:
    """What a statistic is called for this number of samples, e.g. avg@8."""
    return statistic if "@" in statistic else f"{statistic}@{num_samples}"


def _plain_metrics(problems: Sequence[Evaluated]) -> dict[str, float]:
    return {
        "accuracy": float(np.mean([right for problem in problems for right in problem.result.correct])),
        "response_length": float(np.mean([length for problem in problems for length in problem.lengths])),
        "truncated": float(np.mean([cut for problem in problems for cut in problem.truncated])),
        **{name: float(np.mean([*values.values()])) for name, values in part_means(problems).items()},
    }
