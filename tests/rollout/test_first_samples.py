"""The first samples of a run are shown once, and cannot control a terminal."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.rollout.collect import Collected
from megatron_hapo.rollout.first_samples import FirstSamples
from megatron_hapo.types import Prompt, Rollout, Sampling, Score, ScoredGroup

SAMPLING = Sampling(samples=3, temperature=1.0, max_response_tokens=9, seed=0)

GROUPS = {"response_ids": np.zeros(3, np.int32)}


def group(*texts: str) -> ScoredGroup:
    """Responses whose token ids are their characters; the reward is the length."""
    ids = [np.frombuffer(text.encode("utf-32-le"), np.int32) for text in ("1+1=", *texts)]
    prompt = Prompt(uid="0", token_ids=ids[0], ground_truth="2", data_source="math")
    rollouts = [
        Rollout(
            prompt=prompt, response_ids=of_text, rollout_log_probs=np.zeros(len(of_text), np.float32),
            temperatures=np.ones(len(of_text), np.float32), policy_versions=np.zeros(len(of_text), np.int32),
            finish_reason="stop",
        )
        for of_text in ids[1:]
    ]  # fmt: skip
    return ScoredGroup(rollouts, [Score(reward=len(text), correctness=0.0) for text in texts])


class Source:
    """One group, step after step."""

    def __init__(self, *texts: str):
        self._collected = Collected(groups=[group(*texts)], kept_share=1.0)

    def collect(self, *_: Any) -> Collected:
        return self._collected

    def state(self) -> int:
        return 7

    def settle(self, clock: object) -> None:
        self.is_settled = True

    def finished_groups(self) -> dict[str, np.ndarray]:
        return GROUPS

    def restore(self, state: object, finished: object) -> None:
        assert state == 7
        assert finished is GROUPS


def decode(ids: Any) -> str:
    return "".join(map(chr, ids))


def test_the_best_and_the_worst_response_are_shown_once() -> None:
    lines: list[str] = []
    source = Source("12", "1\x1b[2J%s", "1")
    shown = FirstSamples(cast(Any, source), decode, lines.extend)
    for step in (1, 2):
        assert shown.collect(step, SAMPLING, StepClock()) is source.collect()
    assert lines == [
        "first prompt: 1+1=",
        r"response (reward 7, 7 tokens, stop): 1\x1b[2J%s",
        "response (reward 1, 1 tokens, stop): 1",
    ]
    assert shown.state() == 7
    assert shown.finished_groups() is GROUPS
    shown.restore(7, GROUPS)
    shown.settle(StepClock())
    assert source.is_settled


def test_a_single_response_is_shown_once_and_a_long_one_in_part() -> None:
    lines: list[str] = []
    FirstSamples(cast(Any, Source("x" * 5000)), decode, lines.extend).collect(1, SAMPLING, StepClock())
    first, only = lines
    assert first == "first prompt: 1+1="
    assert only.endswith("x" * 600 + " ...")
