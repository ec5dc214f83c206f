"""Sums that are checked and tried again: a small task on which the entropy of tokens matters.

A question looks like `7+8+3+9+4=`. A try lists the running totals, then the running sums modulo 9, which need no carry.
If the last of them contradicts the last total, the try ends in `x` and another follows; otherwise, or after the last
try, comes the answer:

    15 18 17 21|6004x15 18 27 31|6004 Answer: 31

Only whether a carry is written is left to chance: a few uncertain tokens (forks) among certain ones. The remainders
show every dropped carry, so wrong responses use all tries and are longer than right ones. These are the two properties
of long reasoning that methods of entropy control argue with, and that plain sums (`arithmetic`) lack.
"""

from __future__ import annotations

import random

from megatron_hapo.data.arithmetic import ANSWER_MARKER, Problem, distinct_problems

DATA_SOURCE = "checked_sums"
NUM_TERMS = 5
MAX_NUMBER = 9
NUM_CARRIES = (2, 3)
"""Every question needs this many carries, so that no question is much easier than another."""
MAX_TRIES = 4


def problems(*, size: int, seed: int) -> list[Problem]:
    """`size` distinct problems; the same arguments always give the same problems.

    Args:
        seed: an even and an odd seed never give the same question.
    Raises:
        ValueError: there are fewer than `size` questions.
    """
    return distinct_problems(_draw, size=size, seed=seed)


def demonstration(problem: Problem, rng: random.Random, *, slip: float) -> str:
    """A worked solution that drops each carry with probability `slip`, checks itself, and tries again.

    A model that is pre-trained on these knows the format, the check and every sum without a carry, and is uncertain
    exactly where a carry matters: a try succeeds with probability (1 - slip) ** number of carries.
    """
    terms = _terms(problem.question)
    tries, totals = [], list[int]()
    for _ in range(MAX_TRIES):
        totals = _totals(terms, lambda: rng.random() < slip)
        tries.append(f"{' '.join(map(str, totals))}|{_remainders(terms)}")
        if totals[-1] % 9 == sum(terms) % 9:
            break
    return f"{'x'.join(tries)} {ANSWER_MARKER} {totals[-1]}"


def _draw(rng: random.Random) -> Problem | None:
    """A problem, or None if the question that was drawn has too few or too many carries."""
    terms = [rng.randint(1, MAX_NUMBER) for _ in range(NUM_TERMS)]
    if sum(terms) // 10 not in NUM_CARRIES:  # each carry adds one to the tens of the total
        return None
    question = "+".join(map(str, terms)) + "="
    solution = f"{' '.join(map(str, _totals(terms, lambda: False)))}|{_remainders(terms)} {ANSWER_MARKER} {sum(terms)}"
    return Problem(question=question, answer=str(sum(terms)), solution=solution, data_source=DATA_SOURCE)


def _terms(question: str) -> list[int]:
    return [int(term) for term in question.removesuffix("=").split("+")]


def _totals(terms: list[int], drops_carry) -> list[int]:
    """The running totals from the second term on. A dropped carry lowers all that follow by ten."""
    total, totals = terms[0], []
    for term in terms[1:]:
        carries = total % 10 + term > 9
        total += term - 10 * (carries and drops_carry())
        totals.append(total)
    return totals


def _remainders(terms: list[int]) -> str:
    return "".join(str(sum(terms[:end]) % 9) for end in range(2, len(terms) + 1))
