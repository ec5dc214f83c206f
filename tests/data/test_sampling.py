"""The order of prompts: epochs, mixtures and the curriculum, and that a restored state continues it exactly."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from megatron_hapo.config import CurriculumConfig
from megatron_hapo.data.sampling import PromptMixture, PromptSampler, PromptSource
from megatron_hapo.errors import DataError
from megatron_hapo.types import Prompt, Rollout, Score, ScoredGroup

CURRICULUM = CurriculumConfig(enabled=True, revisit=0.25)


def sampler(size: int, *, shuffle: bool = True, seed: int = 0, name: str = "", **options: Any) -> PromptSampler:
    prompts = [
        Prompt(uid=f"{name}x/{i}", token_ids=np.array([i], dtype=np.int32), ground_truth="", data_source="x")
        for i in range(size)
    ]
    return PromptSampler(prompts, seed=seed, shuffle=shuffle, **options)


def mixture(sizes: dict[str, int], weights: dict[str, float], **options: Any) -> PromptMixture:
    return PromptMixture({name: sampler(size, name=f"{name}/", **options) for name, size in sizes.items()}, weights)


def group(prompt: Prompt, *correctness: float) -> ScoredGroup:
    """The responses to a prompt with these scores."""
    one = np.zeros(1, np.float32)
    rollout = Rollout(
        prompt=prompt,
        response_ids=one.astype(np.int32),
        rollout_log_probs=one,
        temperatures=one,
        policy_versions=one.astype(np.int32),
        finish_reason="stop",
    )
    return ScoredGroup([rollout] * len(correctness), [Score(reward=c, correctness=c) for c in correctness])


def rows(prompts: list[Prompt]) -> list[int]:
    return [int(p.token_ids[0]) for p in prompts]


def test_an_epoch_holds_every_prompt_once_in_an_order_of_its_own():
    order = sampler(12)
    first, second = [rows(order.next(4)) + rows(order.next(4)) + rows(order.next(4)) for _ in range(2)]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert rows(sampler(12).next(12)) == first
    assert rows(sampler(12, seed=1).next(12)) != first


@pytest.mark.parametrize("shuffle", [True, False])
def test_no_batch_contains_a_prompt_twice(shuffle):
    order = sampler(10, shuffle=shuffle)
    for count in [4, 4, 4, 7, 10, 3, 9] * 20:
        assert len(set(rows(order.next(count)))) == count


def test_without_shuffling_prompts_keep_the_order_of_the_data():
    order = sampler(5, shuffle=False)
    assert [rows(order.next(3)) for _ in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_fewer_prompts_than_a_batch_are_repeated_equally_often():
    prompts = sampler(3).next(9)
    assert sorted(rows(prompts)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({prompt.uid for prompt in prompts}) == 9, "repetitions with the same uid would get the same responses"


def test_a_restored_sampler_continues_where_the_other_stopped():
    one, other = sampler(10), sampler(10)
    one.next(4)
    one.next(4)
    other.restore(one.state())
    assert [rows(one.next(4)) for _ in range(5)] == [rows(other.next(4)) for _ in range(5)]


def test_no_prompts_is_an_error():
    with pytest.raises(DataError, match="no prompts"):
        sampler(0)


def names(prompts: list[Prompt]) -> Counter[str]:
    return Counter(prompt.uid.partition("/")[0] for prompt in prompts)


def test_a_mixture_gives_each_source_its_share_in_every_batch():
    prompts = mixture({"a": 50, "b": 20, "c": 7}, {"a": 5, "b": 2, "c": 1})
    for _ in range(10):
        assert names(prompts.next(16)) == {"a": 10, "b": 4, "c": 2}
    exact = mixture({"a": 50, "b": 20}, {"a": 0.7, "b": 0.3})
    total: Counter[str] = Counter()
    for number in range(1, 40):
        total += names(exact.next(3))
        assert abs(total["a"] - 0.7 * 3 * number) < 1


def test_each_source_of_a_mixture_has_epochs_of_its_own():
    prompts = mixture({"a": 6, "b": 3}, {"a": 1, "b": 1})
    drawn = [prompt.uid for _ in range(6) for prompt in prompts.next(6)]
    assert Counter(drawn) == {**{f"a/x/{i}": 3 for i in range(6)}, **{f"b/x/{i}": 6 for i in range(3)}}
    assert drawn[::2] != sorted(drawn[::2])


def test_a_source_that_is_smaller_than_its_share_repeats_under_other_uids():
    drawn = mixture({"a": 40, "b": 2}, {"a": 1, "b": 1}).next(12)
    assert len({prompt.uid for prompt in drawn}) == 12
    assert sorted(rows([prompt for prompt in drawn if prompt.uid.startswith("b/")])) == [0, 0, 0, 1, 1, 1]


def solve(prompts: PromptSource, drawn: list[Prompt], draw: random.Random) -> None:
    """Record results in which one half of the prompts never teaches anything."""
    prompts.record([group(p, 1.0, float(p.token_ids[0] % 2 == 0 or draw.random() < 0.2)) for p in drawn])


@pytest.mark.parametrize("curriculum", [CurriculumConfig(), CURRICULUM], ids=["plain", "curriculum"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_resume_anywhere_in_a_mixture_or_curriculum_draws_what_the_uninterrupted_run_draws(
    mixed, shuffle, curriculum
):
    """Prompts and results of 40 steps, interrupted after each of them; the state passes through JSON."""
    options = {"shuffle": shuffle, "curriculum": curriculum, "seed": 3}

    def start() -> PromptSource:
        return mixture({"a": 13, "b": 29}, {"a": 1, "b": 2.5}, **options) if mixed else sampler(31, **options)

    whole, resumed = start(), start()
    result, result_resumed = random.Random(0), random.Random(0)
    for step in range(40):
        drawn = whole.next(8)
        assert [p.uid for p in drawn] == [p.uid for p in resumed.next(8)], step
        solve(whole, drawn, result)
        solve(resumed, drawn, result_resumed)
        state = json.loads(json.dumps(resumed.state()))
        resumed = start()
        resumed.restore(state)
        assert resumed.state() == whole.state()


def test_a_prompt_that_teaches_nothing_is_drawn_in_its_share_of_the_epochs():
    prompts = sampler(40, curriculum=CURRICULUM)
    drawn: Counter[int] = Counter()
    for step in range(2000):
        batch = prompts.next(4)
        if step >= 100:
            drawn += Counter(rows(batch))
        # Prompts below 10 are solved by all responses, those below 20 by none.
        prompts.record(
            [
                group(p, *((1, 1) if i < 10 else (0, 0) if i < 20 else (0, 1)))
                for p, i in zip(batch, rows(batch), strict=True)
            ]
        )
    useful, useless = np.mean([drawn[i] for i in range(20, 40)]), [drawn[i] for i in range(20)]
    assert min(useless) > 0
    assert np.mean(useless) / useful == pytest.approx(CURRICULUM.revisit, rel=0.1)
    assert prompts.metrics() == {"curriculum/rare_share": 0.5}


def test_a_prompt_becomes_rare_after_its_groups_and_common_again_with_one_that_differs():
    prompts = sampler(2, curriculum=CurriculumConfig(enabled=True, after=2))
    (prompt,) = [p for p in prompts.next(2) if p.uid == "x/0"]
    shares = []
    for scores in ((1, 1), (0, 0), (0, 1), (0, 0)):
        prompts.record([group(prompt, *scores)])
        shares.append(prompts.metrics()["curriculum/rare_share"])
    assert shares == [0, 0.5, 0, 0]


def test_a_batch_of_a_curriculum_contains_no_prompt_twice_and_is_always_filled():
    prompts = sampler(6, curriculum=CurriculumConfig(enabled=True, revisit=0.01))
    for _ in range(30):
        batch = prompts.next(5)
        assert len(set(rows(batch))) == 5
        prompts.record([group(prompt, 0, 0) for prompt in batch])
    assert sorted(rows(prompts.next(12))) == sorted([*range(6)] * 2)


def test_repetitions_in_a_batch_count_for_their_prompt():
    prompts = sampler(1, curriculum=CurriculumConfig(enabled=True, after=2))
    prompts.record([group(prompt, 1, 1) for prompt in prompts.next(2)])
    assert prompts.metrics() == {"curriculum/rare_share": 1.0}


def test_the_state_of_other_data_begins_what_is_new():
    old = mixture({"a": 9, "b": 9}, {"a": 1, "b": 1})
    old.next(6)
    changed = mixture({"a": 9, "c": 9}, {"a": 1, "c": 1})
    changed.restore(old.state())
    assert changed.state() == {"taken": {"a": 0, "c": 0}, "sources": {"a": 3, "c": 0}}
    single = sampler(9, curriculum=CURRICULUM)
    single.restore(7)  # of a run without a curriculum
    assert single.state() == {"position": 7, "unvaried": {}}


def test_a_mixture_names_the_accuracy_of_each_source():
    prompts = mixture({"a": 9, "b": 9}, {"a": 1, "b": 1}, curriculum=CURRICULUM)
    prompts.record([group(p, 1, 0, 0, p.uid[0] == "b") for p in prompts.next(4)])
    assert prompts.metrics() == {"source/a/accuracy": 0.25, "source/b/accuracy": 0.5, "curriculum/rare_share": 0.0}
    assert prompts.metrics() == {"curriculum/rare_share": 0.0}
