"""The task of checked sums: its problems, its demonstrations, and the shape that they give to a model's responses."""

import random
import re

import pytest

from megatron_hapo.config import CheckedSumsData
from megatron_hapo.data import checked_sums
from megatron_hapo.data.arithmetic import Problem
from megatron_hapo.data.checked_sums import MAX_TRIES, NUM_CARRIES, demonstration, problems
from megatron_hapo.data.demo_model import make_tokenizer
from megatron_hapo.data.prompts import load_prompts
from megatron_hapo.reward.scorers import score

EXAMPLE = Problem("7+8+3+9+4=", "31", "15 18 27 31|6004 Answer: 31", "checked_sums")


def test_solutions_are_correct():
    found = problems(size=400, seed=0)
    assert len({problem.question for problem in found}) == 400
    for problem in found:
        terms = [int(term) for term in problem.question[:-1].split("+")]
        sums = [sum(terms[:end]) for end in range(2, 6)]
        totals, remainders, answer = re.fullmatch(r"(.*)\|(\d{4}) Answer: (\d+)", problem.solution).groups()
        assert totals == " ".join(map(str, sums))
        assert remainders == "".join(str(total % 9) for total in sums)
        assert problem.answer == answer == str(sums[-1])
        assert sums[-1] // 10 in NUM_CARRIES


def test_training_and_held_out_questions_never_overlap():
    train = {problem.question for problem in problems(size=3000, seed=2)}
    assert not train & {problem.question for problem in problems(size=300, seed=1)}


def test_a_dropped_carry_is_seen_by_the_check_and_tried_again():
    rng = random.Random(0)
    assert demonstration(EXAMPLE, rng, slip=0.0) == EXAMPLE.solution
    attempt = "5 8 7 1|6004"  # all three carries dropped
    assert demonstration(EXAMPLE, rng, slip=1.0) == "x".join([attempt] * MAX_TRIES) + " Answer: 1"
    for _ in range(300):
        *failed, last = demonstration(EXAMPLE, rng, slip=0.5).split(" Answer: ")[0].split("x")
        assert all(not attempt.endswith(" 31|6004") for attempt in failed)
        assert len(failed) == MAX_TRIES - 1 or last == "15 18 27 31|6004"


def test_wrong_demonstrations_are_half_as_long_again_as_right_ones():
    tokenizer, rng, lengths = make_tokenizer(), random.Random(1), {True: [], False: []}
    for problem in problems(size=1500, seed=0):
        text = demonstration(problem, rng, slip=0.65)
        lengths[text.endswith(f" {problem.answer}")].append(len(tokenizer.encode(text)))
    right, wrong = (sum(lengths[key]) / len(lengths[key]) for key in (True, False))
    assert wrong / right > 1.5
    assert 0.2 < len(lengths[True]) / 1500 < 0.35


def test_prompts_need_no_file_and_are_scored_exactly():
    source = CheckedSumsData(type="checked_sums", size=10, seed=1)
    loaded = load_prompts(source, make_tokenizer(), chat_template=True, max_prompt_tokens=32)
    answer = loaded.prompts[0].ground_truth
    assert {prompt.data_source for prompt in loaded.prompts} == {"checked_sums"}
    assert score(f"1|2x3|4 Answer: {answer}", answer, "checked_sums") == 1.0
    assert score(f"Answer: {answer}0", answer, "checked_sums") == 0.0


def test_seeds_and_sizes_give_the_same_problems():
    assert problems(size=20, seed=4) == problems(size=30, seed=4)[:20]


def test_more_problems_than_there_are_cannot_be_had(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checked_sums, "MAX_NUMBER", 5)  # with the task's own it takes minutes to draw all
    with pytest.raises(ValueError, match="found only"):
        problems(size=1_000, seed=0)
