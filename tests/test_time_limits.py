"""The factor of the tests' time limits."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests import time_limits
from tests.time_limits import patient


@pytest.fixture
def measured_again() -> Iterator[None]:
    time_limits._factor.cache_clear()
    yield
    time_limits._factor.cache_clear()


@pytest.mark.parametrize(
    ("workers", "load", "slowness", "limit"),
    [(1, 0.1, 0.9, 30), (1, 8, 1.5, 120), (2, 2, 3, 90), (1, 500, 1, 600), (2, 0.1, 0.9, 60)],
)
def test_a_limit_follows_load_speed_and_workers(
    measured_again: None, monkeypatch: pytest.MonkeyPatch, workers: int, load: float, slowness: float, limit: float
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", str(workers))
    moments = iter([0.0, slowness * time_limits._NOMINAL_SECONDS])
    monkeypatch.setattr(time_limits.time, "perf_counter", lambda: next(moments))
    monkeypatch.setattr(time_limits.os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert patient(30) == pytest.approx(limit)
