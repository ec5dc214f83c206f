"""avg@n, pass@k, maj@n and their intervals against numbers worked out by hand and against scipy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from megatron_hapo.rollout.eval_statistics import (
    Estimate,
    ProblemResult,
    estimate,
    majority_is_correct,
    paired_difference,
    pass_at_k,
    pass_ks,
    statistics_of,
)


def result(uid: str, correct: str, answers: str) -> ProblemResult:
    """From one letter a response: 1 or 0, and its answer, or - for none."""
    return ProblemResult(uid, tuple(c == "1" for c in correct), tuple(None if a == "-" else a for a in answers))


def test_pass_at_k_by_hand() -> None:
    # 2 of 4 are correct: of the 6 pairs, one holds the two wrong ones; every triple holds a correct one.
    assert pass_at_k(2, 4, 1) == 0.5
    assert pass_at_k(2, 4, 2) == pytest.approx(5 / 6)
    assert pass_at_k(2, 4, 3) == 1.0
    assert pass_at_k(0, 8, 8) == 0.0
    assert pass_at_k(1, 8, 4) == 0.5


@pytest.mark.parametrize("num_correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_counts_all_subsets(num_correct: int, k: int) -> None:
    samples = [1] * num_correct + [0] * (6 - num_correct)
    subsets = [any(subset) for subset in combinations(samples, k)]
    assert pass_at_k(num_correct, 6, k) == pytest.approx(np.mean(subsets))


def test_pass_at_k_is_exact_for_many_samples() -> None:
    assert pass_at_k(1, 1000, 10) == pytest.approx(0.01, rel=1e-12)


@pytest.mark.parametrize(
    ("correct", "answers", "expected"),
    [
        ("1100", "aabc", 1),  # two votes for the truth, one for each of the others
        ("1000", "abbc", 0),
        ("1100", "aabb", 1 / 2),  # a tie of two answers
        ("1000", "abcd", 1 / 4),
        ("1000", "a---", 1),  # no answer, no vote
        ("0000", "----", 0),
        ("0000", "aaaa", 0),
        ("1100", "xybb", 1 / 2),  # correct in two notations: two votes for one answer
    ],
)
def test_majority_by_hand(correct: str, answers: str, expected: float) -> None:
    outcome = result("", correct, answers)
    assert majority_is_correct(outcome.correct, outcome.answers) == expected


def test_statistics_of_problems_by_hand() -> None:
    values = statistics_of([result("a", "1100", "aabc"), result("b", "0001", "aabc"), result("c", "0000", "----")])
    assert list(values) == ["avg", "pass@2", "pass@4", "maj"]
    np.testing.assert_allclose(values["avg"], [1 / 2, 1 / 4, 0])
    np.testing.assert_allclose(values["pass@2"], [5 / 6, 1 / 2, 0])
    np.testing.assert_allclose(values["pass@4"], [1, 1, 0])
    np.testing.assert_allclose(values["maj"], [1, 0, 0])


def test_what_cannot_be_said_is_left_out() -> None:
    assert list(statistics_of([result("a", "1", "a")])) == ["avg"]
    assert list(statistics_of([result("a", "10", "--")])) == ["avg", "pass@2"]
    assert [pass_ks(n) for n in (1, 2, 3, 6, 8, 9)] == [[], [2], [2, 3], [2, 4, 6], [2, 4, 8], [2, 4, 8, 9]]


def test_intervals_by_hand() -> None:
    # A resample of {0, 1} has the mean 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    assert estimate([np.array([0.0, 1.0])]) == Estimate(0.5, 0.0, 1.0)
    assert estimate([np.array([0.25])]) == Estimate(0.25, 0.25, 0.25)
    assert estimate([np.ones(50)]) == Estimate(1.0, 1.0, 1.0)
    # 10 problems of which 5 are solved: the number of solved ones is binomial(10, 1/2); P(at most 1) = 0.011,
    # P(at most 2) = 0.055, so the quantiles at 2.5 % and 97.5 % are 2 and 8.
    assert estimate([np.array([0.0] * 5 + [1.0] * 5)]) == Estimate(0.5, 0.2, 0.8)


def test_intervals_agree_with_scipy() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(0).beta(0.4, 0.7, 200)
    ours = estimate([values])
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_the_interval_over_sets_resamples_each_of_them_independently() -> None:
    """For large sets the mean of two has the variance (s1^2 / n1 + s2^2 / n2) / 4, also if they have the same size."""
    generator = np.random.default_rng(0)
    sets = [generator.random(400), generator.random(400) ** 3]
    both = estimate(sets)
    deviation = np.sqrt(sum(values.var() / len(values) for values in sets)) / 2
    assert both.value == pytest.approx(np.mean([values.mean() for values in sets]))
    assert (both.high - both.low) == pytest.approx(2 * 1.96 * deviation, rel=0.03)


def test_the_interval_of_a_paired_difference_is_narrower_than_that_of_unpaired_ones() -> None:
    generator = np.random.default_rng(0)
    easy = generator.random(300)
    before = {str(i): value for i, value in enumerate(easy)}
    after = {uid: value + 0.05 + 0.02 * generator.standard_normal() for uid, value in before.items()}
    difference = estimate([paired_difference(before, after)])
    assert difference.low < 0.05 < difference.high
    assert difference.high - difference.low < 0.006
    alone = estimate([easy])
    assert alone.high - alone.low > 0.05


def test_pairs_are_the_problems_that_both_have() -> None:
    np.testing.assert_allclose(paired_difference({"a": 0.5, "b": 1.0, "c": 0.0}, {"c": 1.0, "a": 0.25}), [-0.25, 1.0])


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        interval = estimate([generator.random(100) ** 2])  # the mean of U^2 is 1/3
        covered += interval.low <= 1 / 3 <= interval.high
    assert 88 <= covered <= 100
