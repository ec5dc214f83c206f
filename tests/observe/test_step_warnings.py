"""Warnings of a step: each condition once, with what to do, and the stage that made a step slow."""

from __future__ import annotations

import pytest

from megatron_hapo.observe.step_warnings import StepWarnings

GOOD = {
    "entropy/mean": 0.5, "rollout/mismatch_kl": 1e-5, "response_length/truncated": 0.0,
    "rollout/informative_groups": 0.6, "time/step": 3.0, "time/rollout": 2.0, "time/update": 1.0,
}  # fmt: skip


def warnings_of(*rows: dict[str, float | None]) -> list[list[str]]:
    """The warnings of ten good steps, which must have none, and then of these."""
    watch = StepWarnings()
    for step in range(1, 11):
        assert watch.of_step(step, GOOD) == []
    return [watch.of_step(step, GOOD | row) for step, row in enumerate(rows, start=11)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"entropy/mean": 0.049}, "entropy/mean fell to 0.049 nats, less than a tenth of the 0.5 of the first steps"),
        ({"rollout/mismatch_kl": 2e-3}, "rollout/mismatch_kl rose to 0.002 nats, from 1e-05 in the first steps"),
        ({"response_length/truncated": 0.25}, "25% of the responses were cut off at rollout.max_response_tokens"),
        ({"rollout/informative_groups": 0.0}, "no group has both right and wrong responses"),
    ],
)
def test_each_condition_is_told_once(row: dict[str, float | None], expected: str) -> None:
    (first,), *others = warnings_of(row, row, {}, row)
    assert first.startswith(expected)
    assert others == [[], [], []]


def test_small_changes_and_missing_values_are_no_conditions() -> None:
    rows: list[dict[str, float | None]] = [
        {"entropy/mean": 0.051}, {"rollout/mismatch_kl": 9e-4}, {"response_length/truncated": 0.2},
        {"entropy/mean": None, "rollout/informative_groups": None, "time/step": None},
        {"rollout/mismatch_kl": 2e-2, "rollout/staleness_max": 1.0},
    ]  # fmt: skip
    assert warnings_of(*rows) == [[], [], [], [], []]


def test_a_slow_step_names_the_stage_every_time() -> None:
    slow: dict[str, float | None] = {"time/step": 9.0, "time/rollout": 7.5, "time/update": 1.5}
    want = ["step {} took 9.0 s, usually 3.0 s, mostly in rollout: 7.5 s, usually 2.0 s"]
    assert warnings_of(slow, {}, slow) == [[want[0].format(11)], [], [want[0].format(13)]]
    assert warnings_of({"time/step": 5.9}) == [[]]


def test_what_becomes_usual_is_no_longer_told() -> None:
    slow: dict[str, float | None] = {"time/step": 9.0, "time/rollout": 8.0}
    found = warnings_of(*[slow] * 15)
    assert found[0]
    assert found[-1] == []


def test_the_first_steps_are_only_compared_with_themselves() -> None:
    watch = StepWarnings()
    assert watch.of_step(0, {"eval/accuracy": 0.1}) == []
    assert watch.of_step(1, GOOD | {"time/step": 60.0}) == []
    assert watch.of_step(2, GOOD | {"entropy/mean": 0.001}) == []
