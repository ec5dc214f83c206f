"""Tries rewards of the user's own on sample rows, in a sandboxed worker, before anything else of a run starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hapo.config import Config
from megatron_hapo.config.scorer_names import is_own
from megatron_hapo.errors import RewardError
from megatron_hapo.reward.composition import job_of, scorers_of
from megatron_hapo.reward.pool import open_workers
from megatron_hapo.reward.programs import CodeTestsError, tests_of_row
from megatron_hapo.reward.worker import Job, Outcome
from megatron_hapo.types import Prompt

logger = logging.getLogger(__name__)

ROWS = 8
"""Prompts of each scorer that are tried."""


@dataclass(frozen=True)
class TriedScorer:
    """What a scorer gave for sample responses."""

    scorer: str
    outcomes: tuple[Outcome, ...]

    @property
    def failures(self) -> list[str]:
        """The reasons of the failures."""
        return [outcome.reason for outcome in self.outcomes if outcome.failure is not None]

    @property
    def warning(self) -> str | None:
        """What a user should look at; None if nothing."""
        if self.failures:
            return (
                f"{self.scorer}: fails on {len(self.failures)} of {len(self.outcomes)} sample responses: "
                f"{self.failures[0]}; such responses get reward.wrong"
            )
        totals = {outcome.total for outcome in self.outcomes}
        if len(totals) == 1:
            return (
                f"{self.scorer}: gives {totals.pop():g} to all of {len(self.outcomes)} sample responses, right and "
                "wrong ones; a constant reward teaches nothing"
            )
        return None


def check_own_rewards(config: Config, prompts: Sequence[Prompt]) -> list[str]:
    """Warnings about the rewards of the user's own, which are tried on responses to these prompts and logged.

    Raises:
        RewardError: a function cannot be imported or called, or fails on every response.
    """
    _check_tests(config, prompts)
    tried = try_own_rewards(config, prompts)
    for scorer in tried:
        if len(scorer.failures) == len(scorer.outcomes):
            raise RewardError(f"{scorer.scorer}: fails on every sample response: {scorer.failures[0]}")
    warnings = [scorer.warning for scorer in tried if scorer.warning is not None]
    for warning in warnings:
        logger.warning("%s", warning)
    return warnings


def _check_tests(config: Config, prompts: Sequence[Prompt]) -> None:
    """Raise RewardError if rows whose programs are to be tested have no tests."""
    for prompt in prompts:
        if "code" in scorers_of(prompt, config.reward):
            try:
                tests_of_row(prompt.ground_truth, prompt.columns)
            except CodeTestsError as error:
                raise RewardError(f"scorer code: row {prompt.uid}: {error}") from None


def try_own_rewards(config: Config, prompts: Sequence[Prompt]) -> list[TriedScorer]:
    """What each of the user's own scorers gives for sample responses to at most ROWS of its prompts."""
    jobs: dict[str, list[Job]] = {}
    rows: dict[str, int] = {}
    for prompt in prompts:
        for scorer in filter(is_own, scorers_of(prompt, config.reward)):
            rows[scorer] = rows.get(scorer, 0) + 1
            if rows[scorer] <= ROWS:
                texts = sample_responses(prompt.ground_truth)
                jobs.setdefault(scorer, []).extend(job_of(prompt, text, scorer, config.reward) for text in texts)
    if not jobs:
        return []
    pool = open_workers(config.reward.model_copy(update={"workers": 1}), tuple(jobs))
    try:
        return [TriedScorer(scorer, tuple(pool.run(its_jobs))) for scorer, its_jobs in jobs.items()]
    finally:
        pool.close()


def sample_responses(ground_truth: str) -> tuple[str, ...]:
    """Responses that state the truth in the usual forms, and others that do not."""
    right = (f"Answer: {ground_truth}", f"<answer>{ground_truth}</answer>", f"It is \\boxed{{{ground_truth}}}.")
    return (*right, ground_truth, "", "I do not know.")
