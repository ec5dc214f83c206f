"""Which scorers judge a response, and one score from what they say. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from megatron_hapo.config import RewardConfig
from megatron_hapo.config.scorer_names import is_own, part_name
from megatron_hapo.reward.programs import CodeTestsError, share_passed, tests_of_row
from megatron_hapo.reward.worker import Job, Outcome
from megatron_hapo.types import Asked, Prompt


class Earned(NamedTuple):
    """What a response earned before any penalty."""

    reward: float
    outcome: Outcome
    """Of all scorers together."""
    differs: bool
    """Whether the reward says more than correctness does."""


def scorers_of(prompt: Prompt, config: RewardConfig) -> dict[str, float | None]:
    """The scorers of a prompt's responses with their weights; a single scorer has none.

    An evaluation set's own comes first, then that of the data source, then `reward.scorer`.
    """
    single = prompt.scorer or config.scorers.get(prompt.data_source)
    return {single: None} if single is not None else config.default_scorers


def jobs_of(scored: Sequence[tuple[Prompt, str, str]], config: RewardConfig) -> list[Job]:
    """The job of a worker for each prompt, response and scorer. Jobs of one prompt and scorer share their row, which is
    then sent once for all of them."""
    rows: dict[tuple[int, str], Mapping[str, Any]] = {}
    jobs = []
    for prompt, response, scorer in scored:
        key = (id(prompt), scorer)
        if key not in rows:
            rows[key] = _row(prompt, scorer, config)
        truth = "" if scorer == "code" else prompt.ground_truth
        jobs.append(Job(response, truth, prompt.data_source, scorer, rows[key]))
    return jobs


def _row(prompt: Prompt, scorer: str, config: RewardConfig) -> Mapping[str, Any]:
    """What a scorer needs of a row: for `code` the tests without their results."""
    if scorer != "code":
        return prompt.columns if is_own(scorer) else {}
    try:
        tests = tests_of_row(prompt.ground_truth, prompt.columns).for_worker()
    except CodeTestsError as error:
        return {"fault": str(error)}
    how = {"test_seconds": config.code.test_seconds, "stop_at_failure": config.code.credit == "all_or_nothing"}
    return tests | how


def graded(prompt: Prompt, scorer: str, outcome: Outcome, config: RewardConfig) -> Outcome:
    """The outcome with its correctness: that of a program follows from the results of its tests."""
    if scorer != "code" or outcome.failure is not None:
        return outcome
    share = share_passed(tests_of_row(prompt.ground_truth, prompt.columns), outcome.digests)
    return replace(outcome, correctness=share if config.code.credit == "share" else float(share == 1), digests=())


def earned(weights: dict[str, float | None], outcomes: Sequence[Outcome], config: RewardConfig) -> Earned:
    """The reward of a response from the outcomes of its scorers.

    Args:
        weights: the scorers with their weights, in the order of `outcomes`.
    """
    failed = next((outcome for outcome in outcomes if outcome.failure is not None), None)
    asked = _asked(outcomes)
    if failed is not None:
        failed = replace(failed, asked=asked)
        return Earned(config.wrong, failed, differs=len(weights) > 1 or is_own(next(iter(weights))))
    first = outcomes[0]
    if len(weights) == 1 and None in weights.values():
        if first.total is not None:
            return Earned(first.total, first, differs=True)
        return Earned(config.wrong + first.correctness * (config.correct - config.wrong), first, differs=False)
    total, parts = 0.0, {}
    for (scorer, weight), outcome in zip(weights.items(), outcomes, strict=True):
        assert weight is not None, "only a single scorer has no weight"
        value = outcome.correctness if outcome.total is None else outcome.total
        name = part_name(scorer)
        total += weight * value
        parts[name] = value
        parts |= {f"{name}_{part}": number for part, number in outcome.parts.items()}
    return Earned(total, Outcome(first.correctness, total=total, parts=parts, asked=asked), differs=True)


def _asked(outcomes: Sequence[Outcome]) -> Asked | None:
    """What it took to ask the servers of all scorers."""
    asked = [outcome.asked for outcome in outcomes if outcome.asked is not None]
    if not asked:
        return None
    return Asked(
        sum(one.requests for one in asked), sum(one.seconds for one in asked), any(one.failed for one in asked)
    )
