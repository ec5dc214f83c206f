"""Prints the first samples of a run, so that a wrong template, tokenizer or scorer is seen at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from megatron_hapo.data.sampling import SamplerState
from megatron_hapo.errors import one_line
from megatron_hapo.observe.token_text import Decode
from megatron_hapo.rollout.collect import Collected, GroupSource, StageClock
from megatron_hapo.types import Sampling, Score, ScoredGroup

_CHARACTERS = 600
"""Of a prompt or response; the records have the whole text."""


class FirstSamples:
    """GroupSource that shows the best and the worst response of the first group that it passes on.

    Args:
        show: prints lines.
    """

    def __init__(self, groups: GroupSource, decode: Decode, show: Callable[[list[str]], None]):
        self._groups, self._decode, self._show = groups, decode, show
        self._shown = False

    def collect(self, step: int, sampling: Sampling, clock: StageClock) -> Collected:
        """The groups of the source, unchanged."""
        collected = self._groups.collect(step, sampling, clock)
        if not self._shown and collected.groups:
            self._shown = True
            self._show(_lines(collected.groups[0], self._decode))
        return collected

    def state(self) -> SamplerState:
        """The source's."""
        return self._groups.state()

    def settle(self, clock: StageClock) -> None:
        """Settles the source."""
        self._groups.settle(clock)

    def finished_groups(self) -> dict[str, np.ndarray]:
        """The source's."""
        return self._groups.finished_groups()

    def restore(self, state: SamplerState, finished: Mapping[str, np.ndarray]) -> None:
        """Restores the source."""
        self._groups.restore(state, finished)


def _lines(group: ScoredGroup, decode: Decode) -> list[str]:
    """The group's prompt, and its best and worst response; what a model wrote cannot control a terminal."""
    responses = sorted(zip(group.rollouts, group.scores, strict=True), key=lambda pair: -pair[1].reward)
    shown = [responses[0], responses[-1]] if len(responses) > 1 else responses
    lines = [f"first prompt: {_short(decode(tuple(group.rollouts[0].prompt.token_ids.tolist())))}"]
    for rollout, score in shown:
        about = f"reward {score.reward:g}{_failure(score)}, {len(rollout.response_ids)} tokens, {rollout.finish_reason}"
        lines.append(f"response ({about}): {_short(decode(tuple(rollout.response_ids.tolist())))}")
    return lines


def _failure(score: Score) -> str:
    return "" if score.failure is None else f" ({score.failure})"


def _short(text: str) -> str:
    return one_line(text[:_CHARACTERS] + (" ..." if len(text) > _CHARACTERS else ""))
