"""Ray without torchrun: its start is repeated, its failure is one line, and its head does not grow with every call."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray

from megatron_hapo.config import LaunchConfig
from megatron_hapo.errors import RolloutError
from megatron_hapo.launch.ray import local_ray as module
from megatron_hapo.launch.ray.cluster import RayNode, connected
from megatron_hapo.launch.ray.local_ray import local_ray
from tests.time_limits import patient

TIMEOUT = "The current node timed out during startup.\nThis could happen because\nthe GCS has become overloaded."


class Starts:
    """Stands for ray.init: fails some times."""

    def __init__(self, failures: int):
        self.failures, self.number = failures, 0

    def __call__(self, **options: Any) -> None:
        self.number += 1
        if self.number <= self.failures:
            raise Exception(TIMEOUT)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_start_that_times_out_is_repeated(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(4)
    monkeypatch.setattr(module.ray, "init", starts)
    with local_ray(300):
        assert starts.number == 5


@pytest.mark.parametrize(("seconds", "tries"), [(300, 5), (0, 1)])
def test_starts_that_fail_are_one_line(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, seconds: float, tries: int
) -> None:
    starts = Starts(9)
    monkeypatch.setattr(module.ray, "init", starts)
    with pytest.raises(RolloutError) as error, local_ray(seconds):
        pass
    assert starts.number == tries
    assert str(error.value) == (
        f"Ray did not start ({tries} tries; launch.start_timeout_seconds={seconds}): Exception: "
        + TIMEOUT.replace("\n", " ")
    )


class Echo:
    def call(self, value: int) -> int:
        return value


def events_of_calls() -> list[Any]:
    """The events of calls that Ray's head keeps, after some calls of an actor."""
    remote: Any = ray.remote
    actor = remote(Echo).options(num_cpus=0).remote()
    assert ray.get([actor.call.remote(number) for number in range(20)]) == list(range(20))
    time.sleep(2.5)  # Ray reports every second
    return ray.timeline()


def test_the_head_keeps_no_event_of_a_call() -> None:
    with local_ray():
        assert events_of_calls() == []


@pytest.mark.slow
def test_the_head_under_torchrun_keeps_no_event_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    head = RayNode(LaunchConfig(start_timeout_seconds=patient(600)), ip="127.0.0.1", head_address=None)
    try:
        with connected(head.address, ip="127.0.0.1"):
            assert events_of_calls() == []
    finally:
        head.close()
