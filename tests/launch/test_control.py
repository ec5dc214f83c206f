"""Commands reach all ranks, and results come back in the order of ranks; real gloo ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from megatron_hapo.errors import TrainingError, WeightSyncError
from megatron_hapo.launch.torchrun.control import Commander, ControlGroup, serve, serve_driver
from megatron_hapo.resharding.transfer import TransferStoppedError
from megatron_hapo.trainer.over_ranks import RankObject
from tests.distributed import run_ranks
from tests.time_limits import patient


class Target(RankObject):
    """A stand-in for a trainer rank."""

    def __init__(self, rank: int):
        self.rank, self.yielded = rank, 0

    def results(self, method: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Iterator[Any]:
        if method == "double":
            yield 2 * arguments[0] + self.rank + options["plus"]
        elif method == "own":
            yield [self.rank, *arguments]
        elif method == "stream":
            for number in range(3 if self.rank == 1 else 5):
                self.yielded += 1
                yield np.full(200_000, 10 * self.rank + number)
        elif method == "yielded":
            yield self.yielded
        elif method == "sync":
            if self.rank == 1:
                raise TransferStoppedError("stopped, because another rank failed")
            if self.rank == 2:
                raise WeightSyncError("the cause")
            yield None


def channel_rank(rank: int) -> None:
    control, target = ControlGroup(), Target(rank)
    if rank > 0:
        serve(control, target)
        return
    commander = Commander()
    thread = threading.Thread(target=serve_driver, args=(control, target, commander))
    thread.start()
    doubled = commander.call("double", np.arange(3), plus=100, timeout_seconds=patient(60))
    np.testing.assert_array_equal(doubled, [[100, 102, 104], [101, 103, 105], [102, 104, 106]])
    assert commander.call_each("own", [("a",), ("b",), ("c",)], timeout_seconds=patient(60)) == [
        [0, "a"],
        [1, "b"],
        [2, "c"],
    ]

    stream = commander.stream("stream", timeout_seconds=patient(60))
    first = next(stream)
    threading.Event().wait(0.5)
    assert target.yielded < 5, "a generator must wait while nobody takes what it yields"
    assert [int(first[0]), *(int(array[0]) for array in stream)] == [0, 1, 2, 3, 4, 10, 11, 12, 20, 21, 22, 23, 24]
    assert commander.call("yielded", timeout_seconds=patient(60)) == [5, 3, 5]

    # The ranks keep serving after a failed sync; its cause is raised, not the errors that followed from it.
    with pytest.raises(WeightSyncError, match=r"^the cause$"):
        commander.call("sync", timeout_seconds=patient(60))
    assert commander.call("own", 1, timeout_seconds=patient(60)) == [[0, 1], [1, 1], [2, 1]]
    commander.stop()
    thread.join(patient(60))
    assert not thread.is_alive()


def test_commands_reach_all_ranks_and_results_come_back_in_order() -> None:
    run_ranks(3, channel_rank, timeout_seconds=400)


def test_a_rank_that_does_not_answer_in_time_is_named() -> None:
    with pytest.raises(TrainingError, match=r"update: no answer within 0.1 s from trainer rank 0"):
        Commander().call("update", timeout_seconds=0.1)


def test_only_a_trainer_ranks_own_methods_can_be_called() -> None:
    rank: Any = object()
    with pytest.raises(ValueError, match="a trainer rank has no verb '__reduce__'"):
        next(RankObject(rank, 0).results("__reduce__", (), {}))
