"""Ray without torchrun: its start is repeated, its failure is one line, and its head does not grow with every call."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from megatron_hapo.config import LaunchConfig
from megatron_hapo.errors import RolloutError
from megatron_hapo.launch.ray import local_ray as module
from megatron_hapo.launch.ray.cluster import RayNode, connected
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.launch.ray.node import timed_out
from tests.time_limits import patient

TIMEOUT = "The current node timed out during startup.\nThis could happen because\nthe GCS has become overloaded."


class Starts:
    """Stands for ray.init: fails some times."""

    def __init__(self, failures: int, error: Exception | None = None):
        self.failures, self.number = failures, 0
        self.error = error or Exception(TIMEOUT)

    def __call__(self, **options: Any) -> None:
        self.number += 1
        if self.number <= self.failures:
            raise self.error


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ray, "shutdown", lambda: None)
    monkeypatch.setattr(module, "_core_processes", dict)
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


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("no such resource")])
def test_a_start_that_fails_for_another_reason_is_not_repeated(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    starts = Starts(9, error)
    monkeypatch.setattr(module.ray, "init", starts)
    with pytest.raises(RolloutError) as caught, local_ray(300):
        pass
    assert starts.number == 1
    assert str(caught.value) == f"Ray did not start: {type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Failed to start GCS. Last connection error: None"), TimeoutError("late"), Exception(TIMEOUT)],
)
def test_rays_ways_to_say_that_it_was_late(error: Exception) -> None:
    assert timed_out(error)


def test_a_head_with_another_token_is_not_late() -> None:
    assert not timed_out(
        RuntimeError("Failed to connect to GCS. Last connection error: RPC error: InvalidAuthToken: ...")
    )


KILLED_IN_A_CALL = """
with module.local_ray(advice='start it again'):
    actor = ray.remote(type('Idle', (), {'ready': lambda self: None})).options(num_cpus=0).remote()
    ray.get(actor.ready.remote())
    os.kill(module._core_processes()[name], signal.SIGKILL)
    while True:
        ray.get(actor.ready.remote())
"""
KILLED_IN_THE_START = """
def kill():
    while module.worker._global_node is None:
        time.sleep(0.001)
    os.kill(module._core_processes()[name], signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
with module.local_ray(advice='start it again'):
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("code", "name"),
    [(KILLED_IN_A_CALL, "raylet"), (KILLED_IN_A_CALL, "gcs_server"), (KILLED_IN_THE_START, "gcs_server")],
    ids=["raylet", "gcs_server", "starting_gcs_server"],
)
def test_the_death_of_ray_is_one_line(code: str, name: str) -> None:
    imports = "import os, signal, threading, time, ray\nfrom megatron_hapo.launch.ray import local_ray as module\n"
    with subprocess.Popen(
        [sys.executable, "-c", f"{imports}name = {name!r}{code}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as run:  # fmt: skip
        started: set[psutil.Process] = set()
        while run.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                started |= set(psutil.Process(run.pid).children(recursive=True))
            time.sleep(0.1)
        assert run.stdout is not None
        output = run.stdout.read()
    assert output == f"Ray's {name} died; start it again\n"
    assert run.returncode == 2
    _, alive = psutil.wait_procs(started, timeout=patient(60))
    assert not alive


class Echo:
    def call(self, value: int) -> int:
        return value


def events_of_calls() -> list[Any]:
    """The events of calls that Ray's head keeps, after some calls of an actor."""
    remote: Any = ray.remote
    actor = remote(Echo).options(num_cpus=0).remote()
    assert ray.get([actor.call.remote(number) for number in range(20)]) == list(range(20))
    time.sleep(2.5)  # Ray reports every second
    return ray.timeline() or []


def test_the_head_keeps_no_event_of_a_call() -> None:
    with local_ray():
        assert events_of_calls() == []


@pytest.mark.slow
def test_the_head_under_torchrun_keeps_no_event_of_a_call(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    # One node on loopback, for this process and for Ray's.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
    settings = LaunchConfig(start_timeout_seconds=patient(600))
    head = RayNode(settings, folder=folder, ip="127.0.0.1", head_address=None)
    try:
        with connected(head.address, ip="127.0.0.1"):
            assert events_of_calls() == []
    finally:
        head.close()
