"""The demo's task: sums of small numbers, solved term by term. Needs no download and no torch.

A question looks like `7+8-3=`; its worked solution lists the running totals: `7+8=15 15-3=12 Answer: 12`. A hash of the
text divides all questions into two halves. Even seeds draw from one half and odd seeds from the other, so training and
held-out questions never overlap.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

DATA_SOURCE = "arithmetic"
ANSWER_MARKER = "Answer:"
SUBTRACT = 0.3
"""Probability that a term is subtracted, where the total stays non-negative."""


@dataclass(frozen=True)
class Problem:
    """One question with its answer and a correct solution."""

    question: str
    """E.g. `7+8-3=`; no running total is negative."""
    answer: str
    solution: str
    """A correct worked solution, which ends in the answer."""
    data_source: str = DATA_SOURCE


def problems(*, size: int, seed: int, min_terms: int = 3, max_terms: int = 5, max_number: int = 9) -> list[Problem]:
    """`size` distinct problems; the same arguments always give the same problems.

    Args:
        seed: an even and an odd seed never give the same question.
        min_terms, max_terms: inclusive bounds on how many numbers a question has.
        max_number: the largest number; the smallest is 1.
    Raises:
        ValueError: the bounds contradict each other, or allow fewer than `size` questions.
    """
    if not 2 <= min_terms <= max_terms:
        raise ValueError(f"min_terms and max_terms must satisfy 2 <= min <= max, got {min_terms} and {max_terms}")
    if max_number < 1:
        raise ValueError(f"max_number must be at least 1, got {max_number}")

    def draw(rng: random.Random) -> Problem:
        terms = _draw_terms(rng, num_terms=rng.randint(min_terms, max_terms), max_number=max_number)
        return Problem(question=_question(terms), answer=str(sum(terms)), solution=_work_out(terms))

    try:
        return distinct_problems(draw, size=size, seed=seed)
    except ValueError as error:
        raise ValueError(
            f"{error} with {min_terms} to {max_terms} terms up to {max_number}: raise max_terms or max_number, or "
            "lower size"
        ) from None


def distinct_problems(draw: Callable[[random.Random], Problem | None], *, size: int, seed: int) -> list[Problem]:
    """`size` problems with different questions from the half that belongs to the seed.

    Args:
        draw: a problem, or None for one that does not count.
    Raises:
        ValueError: too few different questions were drawn.
    """
    rng = random.Random(seed)
    found: dict[str, Problem] = {}
    for _ in range(100 * size + 1000):
        if len(found) == size:
            break
        problem = draw(rng)
        if problem is not None and zlib.crc32(problem.question.encode()) % 2 == seed % 2:
            found[problem.question] = problem
    if len(found) < size:
        raise ValueError(f"found only {len(found)} of {size} different questions")
    return list(found.values())


def demonstration(problem: Problem, rng: random.Random, *, slip: float) -> str:
    """A worked solution that drops each carry or borrow with probability `slip`, and continues from the wrong total.

    The demo's model is pre-trained on these. It learns the format and every sum without a carry, and stays uncertain
    exactly where a carry matters.
    """
    return _work_out(_parse(problem.question), forgets=lambda: rng.random() < slip)


def _draw_terms(rng: random.Random, *, num_terms: int, max_number: int) -> list[int]:
    terms = [rng.randint(1, max_number)]
    while len(terms) < num_terms:
        number = rng.randint(1, max_number)
        subtract = rng.random() < SUBTRACT and sum(terms) >= number
        terms.append(-number if subtract else number)
    return terms


def _question(terms: list[int]) -> str:
    return "".join(f"{term:+d}" for term in terms).removeprefix("+") + "="


def _parse(question: str) -> list[int]:
    return [int(term) for term in question.removesuffix("=").replace("-", "+-").split("+")]


def _work_out(terms: list[int], *, forgets=lambda: False) -> str:
    total, steps = terms[0], []
    for term in terms[1:]:
        result = total + term
        if _carries(total, term) and forgets():
            result += -10 if term > 0 else 10
        steps.append(f"{total}{term:+d}={result}")
        total = result
    return " ".join([*steps, ANSWER_MARKER, str(total)])


def _carries(total: int, term: int) -> bool:
    """Whether adding the term carries out of the units digit, or borrows from the tens."""
    units = total % 10 + (abs(term) % 10) * (1 if term > 0 else -1)
    return units > 9 or (units < 0 and total >= 10)
