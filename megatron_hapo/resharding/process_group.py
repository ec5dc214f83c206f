"""Carries a plan out between processes of several hosts, as messages of a process group: `send` and `receive`.

The group holds all trainer ranks, then all engine ranks; it is made for the first sync and kept (`Membership`) until
one fails. Both ends go through the buckets of all their channels in rounds, with two buffers a channel, so that packing
a bucket overlaps sending the one before it. No round can wait for a later one, hence no order of ranks can deadlock.

Every wait ends at the deadline. Whoever fails says so in the store where the ranks have met and leaves the group, which
closes its connections: the others then fail at once.
"""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hapo.errors import WeightSyncError
from megatron_hapo.resharding.plan import Channel, Piece
from megatron_hapo.resharding.transfer import Bucket, Transfer, TransferStoppedError, cut_buckets, rectangle

_c10d: Any = dist  # torch 2.14's annotations leave its stores and process groups out
_BUFFERS = 2
_POLL_SECONDS = 0.0005


class Membership:
    """A rank's place in the group, kept from one sync to the next."""

    def __init__(self) -> None:
        self._group: Any = None
        self._store: Any = None
        self._key: tuple[str, int] | None = None

    def group(self, transfer: Transfer, rank: int, deadline: float) -> Any:
        """The group of this transfer. All ranks call it.

        Raises:
            WeightSyncError: not all came before the deadline; names those missing.
        """
        assert transfer.meeting is not None
        key = (transfer.plan, transfer.meeting.generation)
        if self._group is None or key != self._key:
            self._group, self._key = None, key
            self._store = _enter(transfer, rank, deadline)
            self._group = _join(self._store, transfer, rank, deadline)
        return self._group

    @contextmanager
    def leaving_on_failure(self, who: str) -> Iterator[None]:
        """If the block raises, leaves the group and tells why.

        Raises:
            TransferStoppedError: in the place of a broken connection, where another rank had failed before.
        """
        try:
            yield
        except BaseException as error:
            first = who
            if self._group is not None:
                with suppress(RuntimeError, _c10d.DistError):  # the store may be what has gone
                    first = self._store.compare_set("failed", "", who).decode()
            self._leave(error)
            if isinstance(error, _BrokenError) and first != who:
                raise TransferStoppedError(f"{error}: stopped, because {first} failed") from None
            raise

    def _leave(self, error: BaseException | None) -> None:
        """Closes the group's connections; for that its last reference must go."""
        self._group = None
        while error is not None:  # its frames hold messages under way, which hold the group
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__


class _BrokenError(WeightSyncError):
    """A connection of the group broke, not always the one to the rank that failed."""


def send(
    channels: Sequence[Channel], matrices: Mapping[str, Tensor], transfer: Transfer, member: Membership, *, rank: int
) -> int:
    """Send everything of a rank's channels; the bytes that went. A rank that has none still belongs to the group.

    Args:
        matrices: the rank's parameters, two-dimensional, of any float dtype.
        rank: of the trainer.
    Raises:
        WeightSyncError: a receiver is late, or went away.
    """
    with member.leaving_on_failure(f"trainer rank {rank}"):
        return _send(channels, matrices, transfer, member, rank)


def receive(
    sources: Mapping[int, Sequence[Piece]],
    matrices: Mapping[str, Tensor],
    transfer: Transfer,
    member: Membership,
    *,
    engine: int,
    engine_rank: int,
) -> int:
    """Fill an engine rank's parameters with what all trainer ranks send; the bytes that came.

    Args:
        sources: for each trainer rank, the pieces that it sends, in the plan's order.
        matrices: the engine rank's parameters, two-dimensional, in the transfer's dtype.
    Raises:
        WeightSyncError: a sender is late, or went away.
    """
    with member.leaving_on_failure(f"engine {engine}, rank {engine_rank}"):
        return _receive(sources, matrices, transfer, member, engine, engine_rank)


def open_store(address: str) -> tuple[Any, int]:
    """A store where ranks of several hosts find each other, listening on this address only; and its port."""
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        listening = server.detach()
    return _c10d.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening), port


def _send(
    channels: Sequence[Channel], matrices: Mapping[str, Tensor], transfer: Transfer, member: Membership, rank: int
) -> int:
    assert transfer.meeting is not None
    deadline = time.monotonic() + transfer.deadline_seconds
    group = member.group(transfer, rank, deadline)
    ends = [
        _End(
            f"trainer rank {c.source_rank} to engine {c.engine}, rank {c.engine_rank}",
            transfer.meeting.engine_rank(c.engine, c.engine_rank), c.sources, matrices, transfer,
        )
        for c in channels
    ]  # fmt: skip
    for number in range(max((len(end.buckets) for end in ends), default=0) + _BUFFERS):
        for end in ends:
            end.finish(number - _BUFFERS, "sending weights", deadline)
            if number < len(end.buckets):
                for piece, place in end.places(number):
                    place.copy_(rectangle(matrices[piece.parameter], piece))
                end.start(number, group.send)
    return sum(bucket.num_bytes for end in ends for bucket in end.buckets)


def _receive(
    sources: Mapping[int, Sequence[Piece]],
    matrices: Mapping[str, Tensor],
    transfer: Transfer,
    member: Membership,
    engine: int,
    engine_rank: int,
) -> int:
    assert transfer.meeting is not None
    deadline = time.monotonic() + transfer.deadline_seconds
    group = member.group(transfer, transfer.meeting.engine_rank(engine, engine_rank), deadline)
    ends = [
        _End(f"trainer rank {rank} to engine {engine}, rank {engine_rank}", rank, pieces, matrices, transfer)
        for rank, pieces in sources.items()
    ]
    for end in ends:
        for number in range(min(_BUFFERS, len(end.buckets))):
            end.start(number, group.recv)
    for number in range(max((len(end.buckets) for end in ends), default=0)):
        for end in ends:
            if number >= len(end.buckets):
                continue
            end.finish(number, "receiving weights", deadline)
            for piece, place in end.places(number):
                rectangle(matrices[piece.parameter], piece).copy_(place)
            if number + _BUFFERS < len(end.buckets):
                end.start(number + _BUFFERS, group.recv)
    itemsize = getattr(torch, transfer.dtype).itemsize
    return sum(piece.rows * piece.columns for pieces in sources.values() for piece in pieces) * itemsize


class _End:
    """One end of a channel."""

    def __init__(
        self, name: str, peer: int, pieces: Sequence[Piece], matrices: Mapping[str, Tensor], transfer: Transfer
    ):
        self._name, self._peer, self._pieces, self._transfer = name, peer, pieces, transfer
        self._dtype: torch.dtype = getattr(torch, transfer.dtype)
        self.buckets: list[Bucket] = cut_buckets(pieces, self._dtype.itemsize, transfer.slot_bytes)
        assert transfer.meeting is not None
        device = matrices[pieces[0].parameter].device if transfer.meeting.backend == "nccl" else torch.device("cpu")
        size = max(bucket.num_bytes for bucket in self.buckets)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)]
        self._works: dict[int, Any] = {}

    def places(self, number: int) -> Iterator[tuple[Piece, Tensor]]:
        """The pieces of a bucket, and where each lies in its buffer."""
        bucket, itemsize = self.buckets[number], self._dtype.itemsize
        buffer = self._buffers[number % _BUFFERS]
        for piece, offset in zip(self._pieces[bucket.first :], bucket.offsets, strict=False):
            num_bytes = piece.rows * piece.columns * itemsize
            yield piece, buffer[offset : offset + num_bytes].view(self._dtype).view(piece.rows, piece.columns)

    def start(self, number: int, operation: Callable[..., Any]) -> None:
        """Begin the bucket's message; `operation` is the group's send or recv."""
        data = self._buffers[number % _BUFFERS][: self.buckets[number].num_bytes]
        try:
            self._works[number] = operation([data], self._peer, 0)
        except RuntimeError as error:
            raise _BrokenError(f"{self._describe(number)}: {error}") from error

    def finish(self, number: int, phase: str, deadline: float) -> None:
        """Wait for the bucket's message, if it is under way."""
        work = self._works.pop(number, None)
        if work is None:
            return
        try:
            _wait(work, self._buffers[0].is_cuda, deadline)
        except RuntimeError as error:
            if time.monotonic() < deadline:
                raise _BrokenError(f"{phase}: {self._describe(number)}: {error}") from error
            limit = f"{self._transfer.deadline_seconds:g} s"
            raise WeightSyncError(f"{phase}: not done within {limit}: {self._describe(number)}") from error

    def _describe(self, number: int) -> str:
        return f"{self._name}: {self._pieces[self.buckets[number].first].parameter}"


def _wait(work: Any, on_gpu: bool, deadline: float) -> None:
    if not on_gpu:
        # A timeout of gloo's breaks the group, which is just what is to happen at the deadline.
        if not work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic()))):
            raise RuntimeError("the group has been left")
        return
    while not work.is_completed():  # NCCL's wait() would only order streams
        if time.monotonic() > deadline:
            raise RuntimeError("deadline")
        time.sleep(_POLL_SECONDS)
    work.wait()


def _enter(transfer: Transfer, rank: int, deadline: float) -> Any:
    """The store of the group, once all its ranks have come."""
    meeting = transfer.meeting
    assert meeting is not None
    left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
    try:
        server = _c10d.TCPStore(meeting.host, meeting.port, timeout=left)
        store = _c10d.PrefixStore(f"{transfer.plan}/{meeting.generation}", server)
        store.set(f"here/{rank}", b"")
    except (RuntimeError, _c10d.DistError) as error:
        raise WeightSyncError(f"connecting: rank {rank} does not reach {meeting.host}: {error}") from error
    keys = [f"here/{other}" for other in range(meeting.trainer_ranks + meeting.engine_ranks)]
    try:
        store.wait(keys, left)
    except (RuntimeError, _c10d.DistError) as error:
        missing = [_who(other, transfer) for other, key in enumerate(keys) if not store.check([key])]
        raise WeightSyncError(
            f"connecting: not done within {transfer.deadline_seconds:g} s: {', '.join(missing)}"
        ) from error
    return store


def _join(store: Any, transfer: Transfer, rank: int, deadline: float) -> Any:
    meeting = transfer.meeting
    assert meeting is not None
    left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
    size = meeting.trainer_ranks + meeting.engine_ranks
    if meeting.backend == "nccl":
        return _c10d.ProcessGroupNCCL(store, rank, size, left)
    options = _c10d.ProcessGroupGloo._Options()
    options._timeout = left
    # All connections at once: a group that goes while one is being made on demand can hang.
    options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=_own_address(meeting.host), lazy_init=False)]
    return _c10d.ProcessGroupGloo(store, rank, size, options)


def _who(rank: int, transfer: Transfer) -> str:
    meeting = transfer.meeting
    assert meeting is not None
    if rank < meeting.trainer_ranks:
        return f"trainer rank {rank}"
    engine, engine_rank = divmod(rank - meeting.trainer_ranks, meeting.ranks_per_engine)
    return f"engine {engine}, rank {engine_rank}"


def _own_address(host: str) -> str:
    """The address of this machine on its way to `host`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]
