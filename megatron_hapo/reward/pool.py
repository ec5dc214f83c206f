"""Scores rollouts: by reward workers, in which a response can affect only its own reward, and by judges beside them."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from megatron_hapo.config import RewardConfig
from megatron_hapo.config.scorer_names import is_own, judge_of
from megatron_hapo.data.prompts import load_tokenizer
from megatron_hapo.errors import RewardError
from megatron_hapo.observe import running_stages
from megatron_hapo.observe.spans import Timeline
from megatron_hapo.reward.composition import Earned, earned, graded, jobs_of, scorers_of
from megatron_hapo.reward.judges import Judges, Question
from megatron_hapo.reward.own_scorer import readable_folders
from megatron_hapo.reward.request_loop import RequestLoop
from megatron_hapo.reward.sandbox_server import SandboxServer
from megatron_hapo.reward.scorers import overlong_penalty, voted_answer
from megatron_hapo.reward.worker import Outcome
from megatron_hapo.reward.worker_pool import WorkerPool, unisolated_message
from megatron_hapo.types import Prompt, Rollout, Score

logger = logging.getLogger(__name__)

MIN_RESPONSES_OF_BROKEN = 4
"""A function of the user's own that fails on all of at least this many responses ends the run."""


class ProcessRewardPool:
    """Scores rollouts by the config's rules; a context manager that stops what it has started.

    Raises:
        RewardError: workers do not start, or would have to evaluate answers without isolation.
    """

    def __init__(
        self,
        config: RewardConfig,
        tokenizer_path: Path | str,
        max_response_tokens: int,
        *,
        scorers: Collection[str] = (),
    ):
        """
        Args:
            scorers: those of the config's evaluation sets (`RewardConfig.used_scorers`).
        """
        self._config = config
        self._max_response_tokens = max_response_tokens
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._lock = threading.Lock()  # training is scored beside an evaluation
        self._scorers = Scorers(config, scorers)
        try:
            isolation = self._scorers.workers.isolation()
            logger.info("isolation of reward workers: %s", isolation)
            if not isolation.any and not config.allow_unisolated and "math" in config.default_scorers:
                raise RewardError(unisolated_message("Answers", isolation))
        except BaseException:
            self._scorers.close()
            raise

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """A score for each rollout, in their order."""
        texts = self._tokenizer.batch_decode([r.response_ids.tolist() for r in rollouts], skip_special_tokens=True)
        with self._lock:
            results = self._scorers.score([rollout.prompt for rollout in rollouts], texts)
        _log_failures(rollouts, [result.outcome for result in results])
        return [self._score(*scored) for scored in zip(rollouts, texts, results, strict=True)]

    def start_profile(self) -> None:
        """Start recording what each worker does."""
        for row in self._scorers.workers.rows:
            row.start()

    def finish_profile(self) -> list[Timeline]:
        """The recorded activity of each worker."""
        return [row.finish() for row in self._scorers.workers.rows]

    def close(self) -> None:
        """Stop the worker processes and the judges' thread."""
        self._scorers.close()

    def __enter__(self) -> ProcessRewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score(self, rollout: Rollout, text: str, result: Earned) -> Score:
        config, outcome = self._config, result.outcome
        penalty = overlong_penalty(
            len(rollout.response_ids),
            max_response_tokens=self._max_response_tokens,
            buffer_tokens=config.overlong.buffer_tokens,
            factor=config.overlong.factor,
        )
        return Score(
            reward=result.reward + penalty,
            correctness=outcome.correctness,
            failure=outcome.failure,
            answer=voted_answer(text),
            earned=result.reward if result.differs else None,
            parts=outcome.parts,
            asked=outcome.asked,
        )


_Place = Literal["workers", "judges", "server"]
_PLACES: tuple[_Place, ...] = get_args(_Place)


class Scorers:
    """All scorers of a config, ready to score.

    Args:
        scorers: those that the config names elsewhere than in `reward`.
    Raises:
        RewardError: the environment lacks the key of a judge or of the sandbox server.
    """

    def __init__(self, config: RewardConfig, scorers: Collection[str] = ()):
        self._config = config
        self._loop = RequestLoop()
        try:
            self._judges = Judges(config.judges, self._loop)
            self._server = SandboxServer(config, self._loop) if config.code.server is not None else None
        except BaseException:
            self._loop.close()
            raise
        self.workers = open_workers(config, scorers)

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Earned]:
        """What the response to each prompt earned, by all of its scorers.

        Raises:
            RewardError: see `WorkerPool.run` and `Service.ask_all`; or a function of the user's own failed on every
                response.
        """
        config = self._config
        weights = [scorers_of(prompt, config) for prompt in prompts]
        scored = [
            (prompt, text, scorer)
            for prompt, text, its_scorers in zip(prompts, texts, weights, strict=True)
            for scorer in its_scorers
        ]
        running_stages.report(0, len(scored), "scores")
        places = [self._place(scorer) for _, _, scorer in scored]
        by_place = {place: [of for of, its in zip(scored, places, strict=True) if its == place] for place in _PLACES}
        questions = [Question(str(judge_of(scorer)), prompt, text) for prompt, text, scorer in by_place["judges"]]
        with contextlib.ExitStack() as stack:
            answers = {}
            if questions:
                answers["judges"] = self._judges.start(questions)
            if by_place["server"]:
                assert self._server is not None, "a place is the server only if there is one"
                answers["server"] = self._server.start(jobs_of(by_place["server"], config))
            for answer in answers.values():
                stack.callback(answer.cancel)  # without effect if it is there
            results = {"workers": iter(self.workers.run(jobs_of(by_place["workers"], config)))}
            results |= {place: iter(answer.result()) for place, answer in answers.items()}
        together = [next(results[place]) for place in places]
        _refuse_broken_scorers([scorer for _, _, scorer in scored], together)
        remaining = iter(
            [
                graded(prompt, scorer, outcome, config)
                for (prompt, _, scorer), outcome in zip(scored, together, strict=True)
            ]
        )
        return [earned(its_scorers, [*islice(remaining, len(its_scorers))], config) for its_scorers in weights]

    def close(self) -> None:
        """Stop the worker processes and the thread of the requests."""
        self.workers.close()
        self._loop.close()

    def _place(self, scorer: str) -> _Place:
        """Where a scorer works."""
        if judge_of(scorer) is not None:
            return "judges"
        return "server" if scorer == "code" and self._server is not None else "workers"


def open_workers(config: RewardConfig, scorers: Collection[str] = ()) -> WorkerPool:
    """The worker processes of a config.

    Args:
        scorers: those that the config names elsewhere than in `reward`.
    """
    own = {*config.default_scorers, *config.scorers.values(), *scorers}
    return WorkerPool(
        num_workers=config.workers,
        timeout_seconds=config.timeout_seconds,
        memory_bytes=config.memory_bytes,
        allow_unisolated=config.allow_unisolated,
        readable=readable_folders(own),
    )


def _refuse_broken_scorers(scorers: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """Raise RewardError if a function of the user's own raised an error on all of several responses."""
    by_scorer: dict[str, list[Outcome]] = {}
    for scorer, outcome in zip(scorers, outcomes, strict=True):
        if is_own(scorer):
            by_scorer.setdefault(scorer, []).append(outcome)
    for scorer, its_outcomes in by_scorer.items():
        if len(its_outcomes) >= MIN_RESPONSES_OF_BROKEN and all(o.failure == "crash" for o in its_outcomes):
            raise RewardError(
                f"{scorer}: failed on all of {len(its_outcomes)} responses, the first time with: "
                f"{its_outcomes[0].reason}"
            )


def _log_failures(rollouts: Sequence[Rollout], outcomes: Sequence[Outcome]) -> None:
    failed = [(rollout, outcome) for rollout, outcome in zip(rollouts, outcomes, strict=True) if outcome.failure]
    if failed:
        rollout, outcome = failed[0]
        logger.warning(
            "%d of %d responses could not be scored and count as wrong; the first, to %s: %s (%s)",
            len(failed),
            len(rollouts),
            rollout.prompt.uid,
            outcome.failure,
            outcome.reason,
        )
