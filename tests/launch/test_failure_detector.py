"""A rank that fails or whose heartbeat stops ends the run on all ranks, and the driver's error names the cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed import FileStore, HashStore

from megatron_hapo.errors import HapoError, TrainingError
from megatron_hapo.launch.torchrun import failure_detector as module
from megatron_hapo.launch.torchrun.failure_detector import STOP_SIGNAL, FailureDetector
from tests.time_limits import patient


@pytest.fixture
def detectors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[FailureDetector]]]:
    """Makes the detectors of a world of ranks, all in this process."""
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "HEARTBEAT_TIMEOUT_SECONDS", 1.0)
    # this timer would end pytest itself
    monkeypatch.setattr(module.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(module.faulthandler, "cancel_dump_traceback_later", lambda: None)
    made: list[FailureDetector] = []

    def make(world_size: int) -> list[FailureDetector]:
        store = HashStore()
        FailureDetector.prepare(store, [f"trainer rank {rank} (host, process {rank})" for rank in range(world_size)])
        made.extend(FailureDetector(store, rank=rank, world_size=world_size) for rank in range(world_size))
        return made

    yield make
    for detector in made:
        detector.close()


def test_a_traceback_reaches_the_driver_wherever_it_waits(detectors) -> None:
    driver, second, third = detectors(3)

    def fail() -> None:
        try:
            raise ZeroDivisionError("in the optimizer")
        except ZeroDivisionError as error:
            second.fail(error)

    threading.Timer(0.2, fail).start()
    report = r"trainer rank 1 .*failed:\n(.|\n)*in fail(.|\n)*in the optimizer"
    with pytest.raises(TrainingError, match=report), driver.raising_failures():
        threading.Event().wait(30)
    assert third.failed.wait(patient(5))


def test_errors_of_our_own_reach_the_driver_unchanged(detectors) -> None:
    driver, second = detectors(2)
    second.fail(TrainingError("step 3: gradient norm is nan"))
    with pytest.raises(TrainingError, match=r"^step 3: gradient norm is nan$"), driver.raising_failures():
        threading.Event().wait(30)


def test_the_first_failure_is_raised_not_its_consequences(detectors, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that loses a connection waits for the report of the rank that failed first."""
    monkeypatch.setattr(module, "_REPORT_SECONDS", 10.0)
    driver, second, third = detectors(3)
    consequence = threading.Thread(target=third.fail, args=(RuntimeError("connection closed by peer"),))
    consequence.start()
    second.fail(TrainingError("the cause"))
    consequence.join()
    assert driver.failed.wait(patient(5))
    for detector in (driver, third):
        assert isinstance(detector.error, HapoError)
        assert str(detector.error) == "the cause"


def test_a_rank_whose_heartbeat_stops_is_named(detectors) -> None:
    driver, second, _ = detectors(3)
    second.close()  # stands for a process that was killed: its heartbeat stops
    named = r"no heartbeat for .* from trainer rank 1 \(host, process 1\): killed"
    with pytest.raises(TrainingError, match=named), driver.raising_failures():
        threading.Event().wait(30)


SECOND_RANK = """
import ctypes, sys, time
from torch.distributed import FileStore
from megatron_hapo.launch.torchrun import failure_detector as module

path, scale, pause = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
for name in ("HEARTBEAT_SECONDS", "HEARTBEAT_TIMEOUT_SECONDS", "STORE_TIMEOUT_SECONDS"):
    setattr(module, name, getattr(module, name) * scale)
detector = module.FailureDetector(FileStore(path, 2), rank=1, world_size=2)
time.sleep(0.3)
ctypes.PyDLL(None).usleep(int(1e6 * pause))  # unlike CDLL, keeps Python's lock
time.sleep(0.3)
assert detector.error is None, detector.error
detector.close()
"""


@pytest.mark.parametrize(("share", "lost"), [(1.0, False), (2.0, True)])
def test_a_rank_may_stand_still_for_as_long_as_a_healthy_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, lost: bool
) -> None:
    """Real processes, since all threads of one stand still. On an idle machine a run's times are divided by 20."""
    scale = min(0.2, patient(0.05))
    for name in ("HEARTBEAT_SECONDS", "HEARTBEAT_TIMEOUT_SECONDS"):
        monkeypatch.setattr(module, name, getattr(module, name) * scale)
    store = FileStore(str(tmp_path / "store"), 2)
    FailureDetector.prepare(store, ["driver", "second"])
    pause = share * module.LONGEST_PAUSE_SECONDS * scale
    command = [sys.executable, "-c", SECOND_RANK, str(tmp_path / "store"), str(scale), str(pause)]
    with subprocess.Popen(command) as second:
        while store.get("heartbeat/1") == b"0":
            assert second.poll() is None
            time.sleep(0.01)
        driver = FailureDetector(store, rank=0, world_size=2)
        code = second.wait()
        found = driver.error
        driver.close()
    if lost:
        assert code != 0, "its own timer ends it as well"
        assert "from second: killed" in str(found)
    else:
        assert (code, found) == (0, None)


def test_the_other_ranks_notice_when_rank_0_is_gone(detectors) -> None:
    driver, second = detectors(2)
    driver.close()
    assert second.failed.wait(patient(30))
    assert "no heartbeat" in str(second.error)


def test_rank_0_waits_for_the_others_to_close(detectors) -> None:
    driver, second, third = detectors(3)
    second.close()
    closing = threading.Timer(0.5, third.close)
    start = time.monotonic()
    closing.start()
    driver.wait_for_others(30)
    assert 0.4 < time.monotonic() - start < 20
    driver.wait_for_others(30)
    closing.join()
    assert not driver.failed.is_set()


def test_a_rank_fails_when_its_torchrun_agent_ends(detectors, monkeypatch: pytest.MonkeyPatch) -> None:
    (driver,) = detectors(1)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert driver.failed.wait(patient(5))
    assert str(driver.error) == "the torchrun agent of trainer rank 0 (host, process 0) has ended"


def test_a_stop_request_reaches_the_driver_once_and_only_while_it_runs(detectors) -> None:
    driver, second = detectors(2)
    stops: list[int] = []
    second.request_stop()
    second.request_stop()
    time.sleep(0.3)
    with driver.raising_failures():
        signal.signal(STOP_SIGNAL, lambda number, _: stops.append(number))
        time.sleep(0.5)
    assert stops == [STOP_SIGNAL]


def test_a_stop_request_raises_keyboard_interrupt_if_nobody_handles_it(detectors) -> None:
    driver, second = detectors(2)
    second.request_stop()
    with pytest.raises(KeyboardInterrupt), driver.raising_failures():
        time.sleep(5)
