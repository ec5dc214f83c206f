"""Sampling and scoring alone: files, interruptions and other settings, with a scripted pool and scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_hapo.errors import HapoError
from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.observe.record_tables import RecordTables
from megatron_hapo.observe.view.build_view import write_view
from megatron_hapo.rollout.generation import Generation
from megatron_hapo.rollout.replay import RecordedGroups
from megatron_hapo.types import Prompt, Rollout, Sampling, Score
from tests.observe.test_records import ORIGIN, decode, encode, make_config

SETTINGS = {"seed": 0, "rollout": {"temperature": 1.0}}


class Pool:
    """Responses that depend on the prompt, the seed and the sample only; fails at a call."""

    def __init__(self, fails_at: int | None = None):
        self.calls, self._fails_at = 0, fails_at

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        self.calls += 1
        if self.calls == self._fails_at:
            raise KeyboardInterrupt
        return [[self._rollout(prompt, sampling.seed + sample) for sample in range(2)] for prompt in prompts]

    def _rollout(self, prompt: Prompt, seed: int) -> Rollout:
        draw = np.random.default_rng([int(prompt.uid), seed])
        ids = draw.integers(0, 256, 3, dtype=np.int32)
        values = draw.random((2, 3), dtype=np.float32)
        return Rollout(prompt=prompt, response_ids=ids, rollout_log_probs=-values[0], temperatures=1 + values[1],
                       policy_versions=np.zeros(3, np.int32), finish_reason="stop")  # fmt: skip


class Rewards:
    """Prompt 0 is always solved, prompt 1 never, the others by their first response."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        right = [r.prompt.uid == "0" or (r.prompt.uid != "1" and i % 2 == 0) for i, r in enumerate(rollouts)]
        return [Score(reward=2.0 * yes - 1, correctness=float(yes), answer=str(yes)) for yes in right]


def generation(folder: Path, *, count: int = 5, settings: Any = SETTINGS) -> Generation:
    prompts = [
        Prompt(uid=str(number), token_ids=encode(f"{number}="), ground_truth="1", data_source="sums")
        for number in range(count)
    ]
    config = make_config(folder)
    return Generation(folder, prompts, config, settings, RecordTables(config, decode, ORIGIN))


def complete(made: Generation, *, fails_at: int | None = None) -> int:
    """Number of calls of the pool."""
    pool: Any = Pool(fails_at)
    rewards: Any = Rewards()
    made.complete(pool, rewards)
    return pool.calls


def contents(folder: Path) -> dict[str, Any]:
    return {path.name: pq.read_table(path) for path in sorted((folder / "rollouts").iterdir())}


def test_an_interrupted_generation_goes_on_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert complete(generation(whole)) == 3  # two prompts a file
    with pytest.raises(KeyboardInterrupt):
        complete(generation(cut), fails_at=2)
    assert generation(cut).missing() == [2, 3]
    assert complete(generation(cut)) == 2
    assert list(contents(whole)) == [f"step_0000000{number}.parquet" for number in (1, 2, 3)]
    assert contents(cut).keys() == contents(whole).keys()
    assert all(table.equals(contents(whole)[name]) for name, table in contents(cut).items())
    assert complete(generation(cut)) == 0


def test_the_summary_counts_prompts_that_all_or_none_of_their_responses_solve(tmp_path: Path) -> None:
    made = generation(tmp_path)
    complete(made)
    summary = made.summary()
    assert (summary.prompts, summary.responses, summary.tokens) == (5, 10, 30)
    assert (summary.accuracy, summary.reward) == (0.5, 0.0)
    assert (summary.solved, summary.unsolved) == (0.2, 0.2)


def test_more_prompts_complete_the_last_file_and_add_others(tmp_path: Path) -> None:
    complete(generation(tmp_path, count=3))
    more = generation(tmp_path, count=6)
    assert more.missing() == [2, 3]
    complete(more)
    assert more.summary().prompts == 6
    assert generation(tmp_path, count=2).summary().prompts == 2


def test_records_of_other_settings_or_of_a_run_are_refused(tmp_path: Path) -> None:
    complete(generation(tmp_path))
    other = SETTINGS | {"rollout": {"temperature": 0.5}}
    with pytest.raises(HapoError, match=r"other: rollout\); remove it, or choose another folder with --out"):
        generation(tmp_path, settings=other)
    (tmp_path / "rollouts/step_00000002.parquet").write_bytes(b"PAR1")
    with pytest.raises(HapoError, match=r"cannot be read.*choose another folder"):
        generation(tmp_path)


def test_what_was_generated_can_be_viewed_and_replayed(tmp_path: Path) -> None:
    complete(generation(tmp_path, count=4))
    assert write_view([tmp_path]).is_file()
    config = make_config(tmp_path).model_copy(update={"replay": tmp_path / "rollouts", "steps": 2})
    replayed = RecordedGroups(config, ORIGIN, vocab_size=256)
    replayed.check(first_step=0)
    sampling = Sampling(samples=2, temperature=1, max_response_tokens=9, seed=0)
    groups = replayed.collect(2, sampling, StepClock()).groups
    assert [group.rollouts[0].prompt.uid for group in groups] == ["2", "3"]
    assert [[score.correct for score in group.scores] for group in groups] == [[True, False]] * 2
    with pytest.raises(HapoError, match="another model"):
        RecordedGroups(config, replace(ORIGIN, model="x"), vocab_size=256).check(first_step=0)
