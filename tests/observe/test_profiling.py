"""The trace of a step: rows of all processes on one time axis, whatever their hosts' clocks say."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_hapo.observe.profiling import clock_correction_ns, step_trace
from megatron_hapo.observe.spans import Span, SpanRecorder, Timeline, recorded

MS = 1_000_000
NOW = 1_700_000_000_123_456_789
"""Nanoseconds of a wall clock have more digits than a float."""


def spans(*named: tuple[str, float, float], ahead_ms: float = 0) -> list[Span]:
    """Spans from (name, begin, end) in milliseconds, by a clock that is ahead."""
    return [Span(n, NOW + int((b + ahead_ms) * MS), NOW + int((e + ahead_ms) * MS)) for n, b, e in named]


STAGES = spans(("rollout", 0, 50), ("log_probs", 60, 80), ("update", 100, 200), ("weight_sync", 200, 230))
RANK = (("log_probs", 61, 79), ("update", 102, 150), ("update", 152, 199), ("send_weights", 201, 220))


def rows(trace: dict[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """Row name to (span, begin, end) in milliseconds."""
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    found: dict[str, list[tuple[str, float, float]]] = {name: [] for name in names.values()}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            begin = event["ts"] / 1e3
            found[names[event["pid"]]].append((event["name"], begin, begin + event["dur"] / 1e3))
    return found


def test_every_process_is_a_row_on_the_drivers_time_axis() -> None:
    trace = step_trace(
        Timeline("driver", "a", STAGES),
        [
            Timeline("trainer rank 0", "a", spans(*RANK)),
            Timeline("engine 0", "b", spans(("advance", 1, 49))),
            Timeline("reward worker 0", "a", []),
        ],
    )
    got = rows(trace)
    assert list(got) == ["driver (a)", "trainer rank 0 (a)", "engine 0 (b)", "reward worker 0 (a)"]
    assert got["driver (a)"][2] == ("update", 100, 200)
    assert got["trainer rank 0 (a)"] == [pytest.approx(span) for span in RANK]
    assert got["engine 0 (b)"] == [("advance", 1, 49)]
    assert trace["otherData"]["begin"].startswith("2023-11-14T22:13:20.123")
    order = [e["args"]["sort_index"] for e in trace["traceEvents"] if e["name"] == "process_sort_index"]
    assert order == [0, 1, 2, 3]


@pytest.mark.parametrize("ahead_ms", [-30_000, -3, 0, 0.5, 30_000])
def test_a_clock_is_corrected_as_far_as_cause_and_effect_demand(ahead_ms: float) -> None:
    """The rank's spans leave 1 ms of their stages on either side: a smaller offset cannot be detected."""
    correction = clock_correction_ns(STAGES, spans(*RANK, ahead_ms=ahead_ms)) / MS
    if abs(ahead_ms) <= 1:
        assert correction == 0
    else:
        assert correction == pytest.approx(-ahead_ms - (1 if ahead_ms < 0 else -1))


def test_a_correction_holds_for_all_rows_of_its_host_and_is_shown() -> None:
    trace = step_trace(
        Timeline("driver", "a", STAGES),
        [
            Timeline("trainer rank 0", "b", spans(*RANK, ahead_ms=500)),
            Timeline("engine 0", "b", spans(("advance", 1, 49), ahead_ms=500)),
            Timeline("engine 1", "c", spans(("advance", 1, 49), ahead_ms=0.2)),
        ],
    )
    got = rows(trace)
    assert list(got)[1:] == [
        "trainer rank 0 (b, clock corrected by -499.0 ms)",
        "engine 0 (b, clock corrected by -499.0 ms)",
        "engine 1 (c)",
    ]
    assert got["engine 0 (b, clock corrected by -499.0 ms)"][0] == ("advance", pytest.approx(2), pytest.approx(50))


def test_overlapping_spans_are_in_separate_lanes() -> None:
    advance = spans(("a", 0, 10), ("b", 5, 30), ("c", 10, 20), ("d", 12, 14), ("e", 30, 31))
    trace = step_trace(Timeline("driver", "a", STAGES), [Timeline("engine 0", "a", advance[::-1])])
    lanes = {event["name"]: event["tid"] for event in trace["traceEvents"] if event["name"] in "abcde"}
    assert lanes == {"a": 0, "b": 1, "c": 0, "d": 2, "e": 0}


def test_spans_are_kept_only_between_start_and_finish() -> None:
    class Part:
        spans = SpanRecorder("part")

        @recorded
        def work(self, number: int) -> int:
            return number + 1

        @recorded
        def fail(self) -> None:
            raise ZeroDivisionError

    part = Part()
    assert part.work(1) == 2
    part.spans.start()
    assert part.work(2) == 3
    with pytest.raises(ZeroDivisionError):
        part.fail()
    timeline = part.spans.finish()
    assert part.work(3) == 4
    assert [span.name for span in timeline.spans] == ["work", "fail"]
    assert all(span.begin_ns <= span.end_ns for span in timeline.spans)
    assert part.spans.finish().spans == []
