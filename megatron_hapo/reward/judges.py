"""All judges of a config, asked while the reward workers score."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from megatron_hapo.config.service_settings import JudgeConfig
from megatron_hapo.reward.judge import PATH, judge_request, read_score
from megatron_hapo.reward.request_loop import RequestLoop
from megatron_hapo.reward.service import Answer, Service
from megatron_hapo.reward.worker import Outcome
from megatron_hapo.types import Asked, Prompt


@dataclass(frozen=True)
class Question:
    """A response that one judge is to score."""

    judge: str
    prompt: Prompt
    response: str


class Judges:
    """Judges by name.

    Args:
        loop: in which they are asked.
    Raises:
        RewardError: the environment lacks a judge's key.
    """

    def __init__(self, configs: Mapping[str, JudgeConfig], loop: RequestLoop):
        self._configs, self._loop = configs, loop
        self._services = {
            name: Service(f"reward.judges.{name}", config, path=PATH, read=partial(read_score, config), loop=loop)
            for name, config in configs.items()
        }

    def start(self, questions: Sequence[Question]) -> Future[list[Outcome]]:
        """Ask the judges; the future has the outcome of each question, in their order, or a RewardError.

        Cancelling the future ends the requests.
        """
        return self._loop.start(self._score(questions))

    async def _score(self, questions: Sequence[Question]) -> list[Outcome]:
        by_judge = {name: [q for q in questions if q.judge == name] for name in self._services}
        tasks = {name: asyncio.ensure_future(self._ask(name, its)) for name, its in by_judge.items() if its}
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        outcomes = {name: iter(task.result()) for name, task in tasks.items()}
        return [next(outcomes[question.judge]) for question in questions]

    async def _ask(self, name: str, questions: Sequence[Question]) -> list[Outcome]:
        config = self._configs[name]
        bodies = [judge_request(config, question.prompt, question.response) for question in questions]
        return [_outcome(answer) for answer in await self._services[name].ask_all(bodies)]


def _outcome(answer: Answer[float]) -> Outcome:
    asked = Asked(answer.requests, answer.seconds, failed=answer.failure is not None)
    return Outcome(answer.value or 0.0, answer.failure, answer.reason, asked=asked)
