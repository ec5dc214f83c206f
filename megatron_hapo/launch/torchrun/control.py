"""The command channel of torchrun's ranks: rank 0 names a method, every rank calls it, rank 0 collects the results.

The channel is a gloo group of its own, whichever backend trains. Batches are broadcast over it, so rank 0 sends each a
few times and not once per rank; the rendezvous store would keep them all in one process, and Ray would have to run in
every rank. Values are encoded by `messages`, never pickled. Nothing here has a deadline, because a rank may wait hours
for the next command; a failed rank exits, and the failure detector ends the run.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_hapo.errors import TrainingError, WeightSyncError
from megatron_hapo.launch.torchrun.messages import decode, encode
from megatron_hapo.observe.running_stages import WorkCount
from megatron_hapo.resharding.transfer import TransferStoppedError
from megatron_hapo.trainer.over_ranks import RankObject

_FOREVER = timedelta(days=30)
_BUFFERED = 2
"""Number of results that rank 0 receives before the driver takes one."""


class ControlGroup:
    """Messages between rank 0 and the other ranks. Constructing it is a collective call of all ranks."""

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=_FOREVER)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank. Collective; the argument of other ranks is ignored."""
        data = self._buffer(encode(value)) if self.rank == 0 else None
        length = torch.tensor([0 if data is None else len(data)])
        dist.broadcast(length, 0, group=self._group)
        if data is None:
            data = self._empty(int(length))
        dist.broadcast(data, 0, group=self._group)
        return value if self.rank == 0 else decode(data.numpy())

    def send(self, value: Any, rank: int) -> None:
        """Send a value to a rank, which must call `receive`."""
        data = self._buffer(encode(value))
        dist.send(torch.tensor([len(data)]), rank, group=self._group)
        dist.send(data, rank, group=self._group)

    def receive(self, rank: int) -> Any:
        """The value that the rank sends to this one."""
        length = torch.tensor([0])
        dist.recv(length, rank, group=self._group)
        data = self._empty(int(length))
        dist.recv(data, rank, group=self._group)
        return decode(data.numpy())

    @staticmethod
    def _buffer(data: bytearray) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(data, dtype=np.uint8))

    @staticmethod
    def _empty(num_bytes: int) -> torch.Tensor:
        return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8))


@dataclass(frozen=True, kw_only=True)
class _Job:
    method: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    each: Sequence[tuple[Any, ...]] | None = None
    """Arguments per rank, which replace `arguments`."""


class Commander:
    """The driver's end of the channel, in rank 0's main thread; `serve_driver` runs in another thread there."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._answers: queue.Queue[tuple[int, Any] | None] = queue.Queue(_BUFFERED)
        self._one_at_a_time = threading.Lock()
        self.count = WorkCount()
        """How far rank 0 is."""

    def call(self, method: str, *arguments: Any, timeout_seconds: float, **options: Any) -> list[Any]:
        """The method's result on each rank.

        Raises:
            TrainingError: a rank did not answer in time.
            WeightSyncError: the method raised it on a rank.
        """
        return self._results(_Job(method=method, arguments=arguments, options=options), timeout_seconds)

    def call_each(self, method: str, each: Sequence[tuple[Any, ...]], *, timeout_seconds: float) -> list[Any]:
        """As `call`, with different arguments for each rank."""
        return self._results(_Job(method=method, each=each), timeout_seconds)

    def stream(self, method: str, *, timeout_seconds: float, **options: Any) -> Iterator[Any]:
        """What the ranks' generators yield, rank after rank, advanced only as fast as the results are consumed."""
        yield from (item for _, item in self._run(_Job(method=method, options=options), timeout_seconds))

    def stop(self) -> None:
        """Let `serve` return on every rank."""
        self._jobs.put(None)

    def _results(self, job: _Job, timeout_seconds: float) -> list[Any]:
        results = [result for _, result in self._run(job, timeout_seconds)]
        errors = [result for result in results if isinstance(result, WeightSyncError)]
        for error in [*(e for e in errors if not isinstance(e, TransferStoppedError)), *errors]:
            raise error
        return results

    def _run(self, job: _Job, timeout_seconds: float) -> Iterator[tuple[int, Any]]:
        with self._one_at_a_time:
            self._jobs.put(job)
            last = -1
            while True:
                try:
                    answer = self._answers.get(timeout=timeout_seconds)
                except queue.Empty:
                    raise TrainingError(
                        f"{job.method}: no answer within {timeout_seconds:g} s from trainer rank {last + 1}"
                    ) from None
                if answer is None:
                    return
                last = answer[0]
                yield answer

    # ----- called in rank 0's other thread

    def next_job(self) -> _Job | None:
        """The driver's next command; None when there are no more."""
        return self._jobs.get()

    def answer(self, rank: int, value: Any) -> None:
        """Pass one result of a rank to the driver."""
        self._answers.put((rank, value))

    def end(self) -> None:
        """Tell the driver that all ranks have finished the command."""
        self._answers.put(None)


def serve(control: ControlGroup, target: RankObject) -> None:
    """Carry out commands until rank 0 stops the channel. Called on every rank but 0."""
    while (command := control.broadcast()) is not None:
        method, arguments, options, each = command
        for result in _results(target, method, control.receive(0) if each else arguments, options):
            failed = isinstance(result, WeightSyncError)
            control.send((type(result).__name__, str(result)) if failed else (result,), 0)
        control.send(None, 0)


def _results(
    target: RankObject, method: str, arguments: Sequence[Any], options: Mapping[str, Any]
) -> Iterator[Any | WeightSyncError]:
    """The target's results. A WeightSyncError counts as a result, because the ranks go on after a failed sync."""
    try:
        yield from target.results(method, arguments, options)
    except WeightSyncError as error:
        yield error


def _received(message: list[Any] | tuple[Any, ...]) -> Any:
    if len(message) == 1:
        return message[0]
    kind, text = message
    return (TransferStoppedError if kind == TransferStoppedError.__name__ else WeightSyncError)(text)


def serve_driver(control: ControlGroup, target: RankObject, commander: Commander) -> None:
    """Forward the driver's commands, take part in them, and return the results of all ranks. Called on rank 0.

    Results are received rank after rank. A generator may wait for the other ranks of its tensor-parallel group, of
    which only the first yields, but never for a rank whose results are received later.
    """
    while (job := commander.next_job()) is not None:
        control.broadcast((job.method, job.arguments, job.options, job.each is not None))
        others = range(1, control.size)
        if job.each is not None:
            for rank in others:
                control.send(job.each[rank], rank)
        for result in _results(target, job.method, job.arguments if job.each is None else job.each[0], job.options):
            commander.answer(0, result)
        for rank in others:
            while (message := control.receive(rank)) is not None:
                commander.answer(rank, _received(message))
        commander.end()
    control.broadcast(None)
