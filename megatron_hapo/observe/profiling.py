"""Profiled steps: a torch trace of every trainer rank, and one trace of the whole step over all processes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.observe.spans import Span, Timeline
from megatron_hapo.protocols import RewardPool, RolloutEngine, RolloutPool, Trainer, TrainerWorker

STEP_TRACE = "step.json.gz"
_DURING = {
    **{name: name for name in ("log_probs", "update")},
    "updated_tokens": "update",
    **dict.fromkeys(("send_weights", "weight_buckets"), "weight_sync"),
    **dict.fromkeys(("receive_weights", "load_bucket", "verify", "end_weight_update"), "weight_sync"),
}
"""Span name in other processes -> stage of the driver that waits for it."""


class StepProfiler:
    """Creates each step's clock; during the steps in `steps` every process records what it does.

    Args:
        folder: gets a folder `step_XXXXXXXX` for each profiled step; the host of every rank must share it.
    """

    def __init__(
        self, steps: Collection[int], folder: Path, *, trainer: Trainer, pool: RolloutPool, rewards: RewardPool
    ):
        self._steps, self._folder = steps, folder
        self._trainer, self._pool, self._rewards = trainer, pool, rewards

    @contextmanager
    def clock(self, step: int) -> Iterator[StepClock]:
        """The clock of the step that runs inside the context."""
        if step not in self._steps:
            yield StepClock()
            return
        folder = self._folder / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        self._pool.broadcast(RolloutEngine.start_profile)
        self._rewards.start_profile()
        self._trainer.broadcast(TrainerWorker.start_profile)
        clock = StepClock()
        yield clock
        others = [
            *self._trainer.broadcast(TrainerWorker.finish_profile, folder),
            *self._pool.broadcast(RolloutEngine.finish_profile),
            *self._rewards.finish_profile(),
        ]
        write_step_trace(folder / STEP_TRACE, clock.timeline(), others)


def write_step_trace(path: Path, driver: Timeline, others: Sequence[Timeline]) -> None:
    """Writes `step_trace` as gzipped JSON, for Perfetto or chrome://tracing."""
    with gzip.open(path, "wt") as file:
        json.dump(step_trace(driver, others), file)


def step_trace(driver: Timeline, others: Sequence[Timeline]) -> dict[str, Any]:
    """The step in Chrome's trace format: one row per process, in microseconds since the driver's first span.

    Processes on the driver's host share its clock. The clocks of other hosts are taken as they are, unless they
    contradict the order of cause and effect: see `clock_correction_ns`. The name of a row mentions its correction.
    """
    begin_ns = min(span.begin_ns for span in driver.spans)
    corrections = {
        host: clock_correction_ns(driver.spans, [s for t in others if t.host == host for s in t.spans])
        for host in {timeline.host for timeline in others} - {driver.host}
    }
    events: list[dict[str, Any]] = []
    for row, timeline in enumerate([driver, *others]):
        correction_ns = corrections.get(timeline.host, 0)
        note = f", clock corrected by {correction_ns / 1e6:+.1f} ms" if correction_ns else ""
        name = f"{timeline.process} ({timeline.host}{note})"
        events.append({"ph": "M", "name": "process_name", "pid": row, "tid": 0, "args": {"name": name}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": row, "tid": 0, "args": {"sort_index": row}})
        events += [
            {
                "ph": "X", "name": span.name, "cat": "step", "pid": row, "tid": lane,
                "ts": (span.begin_ns + correction_ns - begin_ns) / 1e3, "dur": (span.end_ns - span.begin_ns) / 1e3,
            }
            for span, lane in _in_lanes(timeline.spans)
        ]  # fmt: skip
    begin = datetime.fromtimestamp(begin_ns / 1e9, UTC).isoformat()
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"begin": begin, "begin_ns": begin_ns}}


def _in_lanes(spans: Sequence[Span]) -> Iterator[tuple[Span, int]]:
    """Each span and the first free lane for it: viewers cannot show overlapping spans in one lane."""
    ends: list[int] = []
    for span in sorted(spans, key=lambda span: span.begin_ns):
        lane = next((lane for lane, end_ns in enumerate(ends) if end_ns <= span.begin_ns), len(ends))
        ends[lane : lane + 1] = [span.end_ns]
        yield span, lane


def clock_correction_ns(stages: Sequence[Span], spans: Sequence[Span]) -> int:
    """The smallest shift in nanoseconds that puts each of a host's spans inside the stage that waited for it.

    The driver requests an update after its stage `update` has begun, and continues when all ranks have answered. If
    spans of a host lie outside their stage, its clock differs from the driver's by at least this much.
    """
    windows = {
        name: (min(s.begin_ns for s in stages if s.name == name), max(s.end_ns for s in stages if s.name == name))
        for name in {stage.name for stage in stages}
    }
    bounded = [(span, windows[_DURING[span.name]]) for span in spans if _DURING.get(span.name) in windows]
    least = max((begin - span.begin_ns for span, (begin, _) in bounded), default=0)
    most = min((end - span.end_ns for span, (_, end) in bounded), default=0)
    return least if least > 0 else min(0, most)
