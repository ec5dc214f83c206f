"""Which scorers judge a response, and one score from what they say. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_hapo.config import RewardConfig
from megatron_hapo.config.scorer_names import function_of, is_own
from megatron_hapo.reward.programs import CodeTestsError, share_passed, tests_of_row
from megatron_hapo.reward.worker import Job, Outcome
from megatron_hapo.types import Prompt


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


def job_of(prompt: Prompt, response: str, scorer: str, config: RewardConfig) -> Job:
    """The job of one scorer on one response. That of `code` holds the tests without their results."""
    if scorer != "code":
        row = prompt.columns if is_own(scorer) else {}
        return Job(response, prompt.ground_truth, prompt.data_source, scorer, row)
    try:
        tests = tests_of_row(prompt.ground_truth, prompt.columns).for_worker()
    except CodeTestsError as error:
        return Job(response, "", prompt.data_source, scorer, {"fault": str(error)})
    how = {"test_seconds": config.code.test_seconds, "stop_at_failure": config.code.credit == "all_or_nothing"}
    return Job(response, "", prompt.data_source, scorer, tests | how)


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
    if failed is not None:
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
        name = function_of(scorer)[1] if is_own(scorer) else scorer
        total += weight * value
        parts[name] = value
        parts |= {f"{name}_{part}": number for part, number in outcome.parts.items()}
    return Earned(total, Outcome(first.correctness, total=total, parts=parts), differs=True)
