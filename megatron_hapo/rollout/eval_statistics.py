"""Statistics of an evaluation: avg@n, pass@k and maj@n of each problem, and bootstrap intervals of their means. Pure.

Shape letters: `P` problems, `B` bootstrap resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
_SEED = 20250916
_CHUNK_VALUES = 4_000_000
"""Resampled values that are held in memory at once."""


@dataclass(frozen=True)
class ProblemResult:
    """How the responses to one problem turned out."""

    uid: str
    correct: tuple[bool, ...]
    answers: tuple[str | None, ...]
    """The stated answer of each response, as text; None: it states none."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its interval."""

    value: float
    low: float
    high: float


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """The probability that at least one of k responses, drawn from the samples without replacement, is correct.

    It is an unbiased estimate of the probability for k new responses.

    Source: Chen et al., Evaluating Large Language Models Trained on Code, arXiv:2107.03374, equation 1.
    """
    assert 1 <= k <= num_samples, f"k={k} of {num_samples} samples"
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_is_correct(correct: Sequence[bool], answers: Sequence[str | None]) -> float:
    """1 if the most frequent answer is correct, else 0; of answers that are equally frequent each counts its share.

    All correct responses vote for one answer, in whatever notation; the others vote by the text of their answers, and
    those that state none do not vote. Without a vote the result is 0.
    """
    votes = Counter(answer for right, answer in zip(correct, answers, strict=True) if not right and answer is not None)
    for_truth = sum(correct)
    most = max([for_truth, *votes.values()])
    if most == 0 or for_truth < most:
        return 0.0
    return 1.0 / (1 + sum(count == most for count in votes.values()))


def statistics_of(results: Sequence[ProblemResult]) -> dict[str, np.ndarray]:
    """[P] float64 values of each problem by name: `avg` over its responses, `pass@K` for K = 2, 4, 8, ... and their
    number, and `maj`, unless no response of the set states an answer."""
    num_samples = len(results[0].correct)
    assert all(len(result.correct) == num_samples for result in results), "problems have different numbers of samples"
    counts = [sum(result.correct) for result in results]
    values = {"avg": [count / num_samples for count in counts]}
    for k in pass_ks(num_samples):
        values[f"pass@{k}"] = [pass_at_k(count, num_samples, k) for count in counts]
    if num_samples > 1 and any(answer is not None for result in results for answer in result.answers):
        values["maj"] = [majority_is_correct(result.correct, result.answers) for result in results]
    return {name: np.array(of_problems, dtype=np.float64) for name, of_problems in values.items()}


def pass_ks(num_samples: int) -> list[int]:
    """The k of pass@k for a number of samples: powers of two, and the number itself."""
    powers = [2**power for power in range(1, num_samples.bit_length()) if 2**power < num_samples]
    return [*powers, num_samples] if num_samples > 1 else []


def estimate(sets_P: Sequence[np.ndarray]) -> Estimate:
    """The mean over sets of their means over problems, with its percentile bootstrap interval.

    Problems are resampled within each set, with all their responses: the interval says how the mean would vary over
    problems of the same kind. The resamples are always the same, so equal values give equal intervals.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    resampled_B = np.mean([_resampled_means(values_P, stream) for stream, values_P in enumerate(sets_P)], axis=0)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled_B, (tail, 1 - tail))
    return Estimate(float(np.mean([values_P.mean() for values_P in sets_P])), float(low), float(high))


def paired_difference(before: Mapping[str, float], after: Mapping[str, float]) -> np.ndarray:
    """[P] differences of the problems that both have, by uid, in the order of `before`; `estimate` gives the interval.

    Pairing removes what both models have in common, which problems are easy, and so narrows the interval.
    """
    return np.array([after[uid] - value for uid, value in before.items() if uid in after], dtype=np.float64)


def _resampled_means(values_P: np.ndarray, stream: int) -> np.ndarray:
    """[B] means of as many problems, drawn with replacement; the draws of different streams are independent."""
    size = len(values_P)
    generator = np.random.default_rng([_SEED, stream])
    chunk = max(1, min(RESAMPLES, _CHUNK_VALUES // size))
    means = [
        values_P[generator.integers(0, size, (min(chunk, RESAMPLES - start), size))].mean(axis=1)
        for start in range(0, RESAMPLES, chunk)
    ]
    return np.concatenate(means)
