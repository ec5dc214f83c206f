"""Tries judges and rewards of the user's own on sample rows, before anything else of a run starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from megatron_hapo.config import Config
from megatron_hapo.config.scorer_names import is_own, judge_of, judge_scorer
from megatron_hapo.config.service_settings import ServiceConfig
from megatron_hapo.errors import RewardError
from megatron_hapo.reward.composition import graded, jobs_of, scorers_of
from megatron_hapo.reward.judges import Judges, Question
from megatron_hapo.reward.pool import open_workers
from megatron_hapo.reward.programs import CodeTestsError, tests_of_row
from megatron_hapo.reward.request_loop import RequestLoop
from megatron_hapo.reward.sandbox_server import SandboxServer
from megatron_hapo.reward.worker import Job, Outcome
from megatron_hapo.types import Prompt

logger = logging.getLogger(__name__)

ROWS = 8
"""Prompts of each scorer that are tried."""
JUDGE_SECONDS = 20.0
"""A judge that answers no request for this long is down already at the start."""


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
        totals = {outcome.correctness if outcome.total is None else outcome.total for outcome in self.outcomes}
        if len(totals) == 1:
            return (
                f"{self.scorer}: gives {totals.pop():g} to all of {len(self.outcomes)} sample responses, right and "
                "wrong ones; a constant reward teaches nothing"
            )
        return None


def check_own_rewards(config: Config, prompts: Sequence[Prompt]) -> list[str]:
    """Warnings about judges and rewards of the user's own, which are tried on responses to these prompts and logged.

    Raises:
        RewardError: a function cannot be imported or called, a judge or the sandbox server does not answer, or one of
            them fails on every response.
    """
    _check_tests(config, prompts)
    _check_server(config)
    tried = [*try_own_rewards(config, prompts), *try_judges(config, prompts)]
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
                scored = [(prompt, text, scorer) for text in texts]
                jobs.setdefault(scorer, []).extend(jobs_of(scored, config.reward))
    if not jobs:
        return []
    pool = open_workers(config.reward.model_copy(update={"workers": 1}), tuple(jobs))
    try:
        return [TriedScorer(scorer, tuple(pool.run(its_jobs))) for scorer, its_jobs in jobs.items()]
    finally:
        pool.close()


def try_judges(config: Config, prompts: Sequence[Prompt]) -> list[TriedScorer]:
    """What each judge gives for a response that states the truth and for one that does not, to its first prompt.

    Raises:
        RewardError: a judge refuses the request, or has not answered within JUDGE_SECONDS.
    """
    questions: dict[str, list[Question]] = {}
    for prompt in prompts:
        for scorer in scorers_of(prompt, config.reward):
            name = judge_of(scorer)
            if name is not None and name not in questions:
                right, *_, wrong = sample_responses(prompt.ground_truth)
                questions[name] = [Question(name, prompt, text) for text in (right, wrong)]
    if not questions:
        return []
    loop = RequestLoop()
    try:
        judges = Judges({name: _impatient(config.reward.judges[name]) for name in questions}, loop)
        outcomes = iter(judges.start([question for asked in questions.values() for question in asked]).result())
        return [TriedScorer(judge_scorer(name), tuple(islice(outcomes, 2))) for name in questions]
    finally:
        loop.close()


def _check_server(config: Config) -> None:
    """Raise RewardError if the sandbox server, if there is one, does not run a program."""
    code = config.reward.code
    if code.server is None:
        return
    reward = config.reward.model_copy(
        update={"code": code.model_copy(update={"server": _impatient(code.server), "credit": "share"})}
    )
    program = "```python\nprint(int(input()) + 1)\n```"
    tests = json.dumps({"inputs": ["1"], "outputs": ["2"]})
    prompt = Prompt(uid="trial", token_ids=np.zeros(0, np.int32), ground_truth=tests, data_source="")
    loop = RequestLoop()
    try:
        (outcome,) = SandboxServer(reward, loop).start(jobs_of([(prompt, program, "code")], reward)).result()
    finally:
        loop.close()
    if outcome.failure is not None or graded(prompt, "code", outcome, reward).correctness < 1:
        reason = outcome.reason or "it gave another result"
        raise RewardError(f"reward.code.server: {code.server.url} does not run a program that adds 1: {reason}")


def _impatient[S: ServiceConfig](settings: S) -> S:
    """The settings with which a server is asked at the start."""
    return settings.model_copy(update={"when_down": "end", "down_after_seconds": JUDGE_SECONDS})


def sample_responses(ground_truth: str) -> tuple[str, ...]:
    """Responses that state the truth in the usual forms, and others that do not."""
    right = (f"Answer: {ground_truth}", f"<answer>{ground_truth}</answer>", f"It is \\boxed{{{ground_truth}}}.")
    return (*right, ground_truth, "", "I do not know.")
