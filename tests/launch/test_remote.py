"""Streams of several processes: their items in order, and whoever fails is the one that is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from megatron_hapo.errors import RankDiedError, TrainingError
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.launch.ray.remote import items
from tests.time_limits import patient


class Source:
    """Yields numbers; what else it does follows from its orders."""

    def ready(self) -> None:
        """Returns once the process has started, which no time limit of a stream should include."""

    def stream(self, first: int, orders: str) -> Iterator[int]:
        yield first
        if orders == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if orders == "wait":
            time.sleep(3600)
        if orders == "fail":
            raise ZeroDivisionError("a fault of the test")
        yield from (number for number in range(first + 1, first + 5))  # Ray sends into it, as into a generator


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    with local_ray():
        yield


def numbers(*orders: str, timeout_seconds: float = 600) -> Iterator[int]:
    """What the streams of as many processes yield, under these orders."""
    remote: Any = ray.remote(Source)
    options = {"num_returns": "streaming", "_generator_backpressure_num_objects": 2}
    actors = [remote.options(num_cpus=0).remote() for _ in orders]
    ray.get([actor.ready.remote() for actor in actors])
    streams = {
        f"rank {rank}": actor.stream.options(**options).remote(10 * rank, orders[rank])
        for rank, actor in enumerate(actors)
    }
    try:
        found = items(
            streams, timeout_seconds=timeout_seconds, what="streaming", error=TrainingError, died=RankDiedError
        )
        yield from (ray.get(item) for item in found)
    finally:
        for actor in actors:
            ray.kill(actor)


def test_items_come_stream_after_stream() -> None:
    assert list(numbers("", "")) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("orders", [("", "die"), ("die", ""), ("wait", "die")])
def test_the_process_that_died_is_named_even_if_another_one_waits_for_it(orders: tuple[str, ...]) -> None:
    with pytest.raises(RankDiedError, match=f"streaming: rank {orders.index('die')}: the process died"):
        list(numbers(*orders))


def test_the_error_of_a_stream_is_raised_and_not_handed_on() -> None:
    found = []
    with pytest.raises(ZeroDivisionError, match="a fault of the test"):
        found.extend(numbers("fail", ""))
    assert set(found) <= {0}  # what it yielded before is good


def test_a_late_stream_is_named() -> None:
    with pytest.raises(TrainingError, match=r"streaming: no answer within \S+ s from rank 1"):
        list(numbers("", "wait", timeout_seconds=patient(3)))


def test_a_process_that_ray_ends_for_want_of_memory_is_told_in_one_line() -> None:
    """A Ray of its own, which takes the memory for full from the start."""
    script = (
        "import ray, time\n"
        "from megatron_hapo.errors import TrainingError\n"
        "from megatron_hapo.launch.ray.local_ray import local_ray\n"
        "from megatron_hapo.launch.ray.remote import gather\n"
        "class Sleeper:\n"
        "    def sleep(self): time.sleep(3600)\n"
        "with local_ray():\n"
        "    actor = ray.remote(Sleeper).options(num_cpus=0).remote()\n"
        "    try: gather({'rank 0': actor.sleep.remote()}, timeout_seconds=600, what='sleeping', error=TrainingError)\n"
        "    except TrainingError as error: print(error)\n"
    )
    full = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | full, capture_output=True, text=True, timeout=patient(300)
    )
    assert done.stdout.startswith("sleeping: rank 0: the process died: "), done.stdout + done.stderr
    assert "Ray ended it because the machine's memory was nearly full" in done.stdout
    assert len(done.stdout.splitlines()) == 1
