"""A failed or silent rank ends the run of all others, and the driver's error tells what happened."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore

from megatron_hapo.errors import HapoError, TrainingError
from megatron_hapo.launch.torchrun import watch as module
from megatron_hapo.launch.torchrun.watch import WISH_TO_STOP, Watch


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[Watch]]]:
    """Makes the watches of a world, all in this process."""
    monkeypatch.setattr(module, "SIGN_SECONDS", 0.05)
    monkeypatch.setattr(module, "SILENT_SECONDS", 1.0)
    # it would end pytest itself
    monkeypatch.setattr(module.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(module.faulthandler, "cancel_dump_traceback_later", lambda: None)
    made: list[Watch] = []

    def make(world_size: int) -> list[Watch]:
        store = HashStore()
        Watch.prepare(store, [f"trainer rank {rank} (host, process {rank})" for rank in range(world_size)])
        made.extend(Watch(store, rank=rank, world_size=world_size) for rank in range(world_size))
        return made

    yield make
    for watch in made:
        watch.close()


def test_a_traceback_reaches_the_driver_wherever_it_waits(watches) -> None:
    driver, second, third = watches(3)

    def fail() -> None:
        try:
            raise ZeroDivisionError("in the optimizer")
        except ZeroDivisionError as error:
            second.fail(error)

    threading.Timer(0.2, fail).start()
    told = r"trainer rank 1 .*failed:\n(.|\n)*in fail(.|\n)*in the optimizer"
    with pytest.raises(TrainingError, match=told), driver.interrupting():
        threading.Event().wait(30)
    assert third.failed.wait(5)


def test_our_own_errors_arrive_as_they_are(watches) -> None:
    driver, second = watches(2)
    second.fail(TrainingError("step 3: gradient norm is nan"))
    with pytest.raises(TrainingError, match=r"^step 3: gradient norm is nan$"), driver.interrupting():
        threading.Event().wait(30)


def test_the_first_account_counts_not_its_echo(watches, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that loses a connection waits for the account of the one that failed first."""
    monkeypatch.setattr(module, "_REPORT_SECONDS", 10.0)
    driver, second, third = watches(3)
    echo = threading.Thread(target=third.fail, args=(RuntimeError("connection closed by peer"),))
    echo.start()
    second.fail(TrainingError("the cause"))
    echo.join()
    assert driver.failed.wait(5)
    for watch in (driver, third):
        assert isinstance(watch.error, HapoError)
        assert str(watch.error) == "the cause"


def test_a_silent_rank_is_named(watches) -> None:
    driver, second, _ = watches(3)
    second.close()  # stands for a process that was killed: it gives no more signs
    named = r"no sign of life .* from trainer rank 1 \(host, process 1\): killed"
    with pytest.raises(TrainingError, match=named), driver.interrupting():
        threading.Event().wait(30)


def test_ranks_notice_that_rank_0_is_gone(watches) -> None:
    driver, second = watches(2)
    driver.close()
    assert second.failed.wait(30)
    assert "no sign of life" in str(second.error)


def test_rank_0_ends_after_the_others(watches) -> None:
    driver, second, third = watches(3)
    second.close()
    closing = threading.Timer(0.5, third.close)
    start = time.monotonic()
    closing.start()
    driver.wait_for_others(30)
    assert 0.4 < time.monotonic() - start < 20
    driver.wait_for_others(30)
    closing.join()
    assert not driver.failed.is_set()


def test_the_end_of_the_agent_ends_the_rank(watches, monkeypatch: pytest.MonkeyPatch) -> None:
    (driver,) = watches(1)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert driver.failed.wait(5)
    assert str(driver.error) == "the torchrun agent of trainer rank 0 (host, process 0) has ended"


def test_a_wish_to_stop_arrives_as_a_signal_at_the_driver_only_while_it_runs(watches) -> None:
    driver, second = watches(2)
    stops: list[int] = []
    second.ask_to_stop()
    second.ask_to_stop()
    time.sleep(0.3)
    with driver.interrupting():
        signal.signal(WISH_TO_STOP, lambda number, frame: stops.append(number))
        time.sleep(0.5)
    assert stops == [WISH_TO_STOP]


def test_a_wish_to_stop_ends_what_has_no_answer_to_it(watches) -> None:
    driver, second = watches(2)
    second.ask_to_stop()
    with pytest.raises(KeyboardInterrupt), driver.interrupting():
        time.sleep(5)
