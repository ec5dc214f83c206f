"""The transport between hosts, over messages of a process group: `send` in a trainer rank, `receive` in an engine rank.

The group contains all trainer ranks followed by all engine ranks. It is created by the first transfer and kept
(`Membership`) until one fails. Both ends go through the buckets of all their channels in rounds, with two buffers per
channel, so that packing a bucket overlaps with sending the one before. No round waits for a later one, so no order of
ranks can deadlock.

Every wait ends at the deadline. A rank that fails records that in the store of the rendezvous and leaves the group,
which closes its connections, so the other ranks fail at once. NCCL's own limit on an operation is longer than the
deadline, because its watchdog ends the whole process.
"""

from __future__ import annotations

import json
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
from megatron_hapo.model.nccl_environment import check_agreement, settings_in_effect
from megatron_hapo.resharding.channel_ends import BucketHook, ChannelEnd, ChannelId, received_bytes
from megatron_hapo.resharding.plan import Channel, Piece
from megatron_hapo.resharding.transfer import Transfer, TransferStoppedError

_c10d: Any = dist  # stores and process groups are missing from torch 2.14's annotations
_BUFFERS = 2
_POLL_SECONDS = 0.0005
NCCL_MARGIN_SECONDS = 120.0
"""By how much NCCL's limit on an operation exceeds a transfer's deadline."""


class Membership:
    """A rank's membership of the process group, kept from one transfer to the next."""

    def __init__(self) -> None:
        self._group: Any = None
        self._store: Any = None
        self._key: tuple[str, int] | None = None

    def group(self, transfer: Transfer, rank: int, deadline: float) -> Any:
        """The process group of this transfer, created if necessary. All ranks of the transfer must call this.

        Args:
            rank: this rank's number in the group.
            deadline: by `time.monotonic`, seconds.
        Raises:
            WeightSyncError: not all ranks came before the deadline; names those missing.
        """
        assert transfer.rendezvous is not None
        key = (transfer.plan, transfer.rendezvous.generation)
        if self._group is None or key != self._key:
            self._group, self._key = None, key
            self._store = _register(transfer, rank, deadline)
            self._group = _create_group(self._store, transfer, rank, deadline)
        return self._group

    @contextmanager
    def leave_on_failure(self, name: str) -> Iterator[None]:
        """Leaves the group if the block raises, and records this rank as failed, by its name.

        Raises:
            TransferStoppedError: instead of the error of a broken connection, if another rank had failed before.
        """
        try:
            yield
        except BaseException as error:
            first = name
            if self._group is not None:
                with suppress(RuntimeError, _c10d.DistError):  # the store may be what failed
                    first = self._store.compare_set("failed", "", name).decode()
            self._leave(error)
            if isinstance(error, _BrokenError) and first != name:
                raise TransferStoppedError(f"{error}: stopped because {first} failed") from None
            raise

    def _leave(self, error: BaseException | None) -> None:
        """Closes the group's connections: NCCL's by an abort, gloo's when the last reference is dropped."""
        if self._group is not None and hasattr(self._group, "abort"):  # operations under way would never end
            self._group.abort()
        self._group = None
        while error is not None:  # its frames hold pending messages, which refer to the group
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__


class _BrokenError(WeightSyncError):
    """A connection of the group broke, not necessarily the one to the rank that failed."""


def send(
    channels: Sequence[Channel],
    matrices: Mapping[str, Tensor],
    transfer: Transfer,
    membership: Membership,
    *,
    rank: int,
    within_host: Callable[[], int],
    on_bucket: BucketHook | None = None,
) -> int:
    """Send everything of these channels; returns the bytes sent, including padding and those within the host.

    Every trainer rank calls this, even one without channels, because it belongs to the group.

    Args:
        channels: the channels that start at this trainer rank.
        matrices: the rank's local parameters, each [rows, columns], of any float dtype.
        membership: this rank's membership of the group.
        rank: this trainer rank.
        within_host: sends to the engine ranks of this host, once the group exists, so that its failure ends the group.
            All ranks do this before they exchange messages, so none waits for another in a circle.
        on_bucket: for tests, see `BucketHook`.
    Raises:
        WeightSyncError: a receiver is late, or left the group.
    """
    with membership.leave_on_failure(f"trainer rank {rank}"):
        # A function of its own, so that its frame has finished, and can be cleared, when the group is left.
        return _send(channels, matrices, transfer, membership, rank, within_host, on_bucket)


def receive(
    sources: Mapping[int, Sequence[Piece]],
    matrices: Mapping[str, Tensor],
    transfer: Transfer,
    membership: Membership,
    *,
    engine: int,
    engine_rank: int,
    within_host: Callable[[], int],
    on_bucket: BucketHook | None = None,
) -> int:
    """Fill an engine rank's parameters with what trainer ranks send; returns the bytes received, those of its host too.

    Args:
        sources: for each trainer rank, the pieces of this rank's parameters that it sends, in the plan's order.
        matrices: the engine rank's parameters, each [rows, columns], in the transfer's dtype.
        membership: this rank's membership of the group.
        engine: index of the engine.
        engine_rank: rank within the engine.
        within_host: receives from the trainer ranks of this host, once the group exists.
        on_bucket: for tests, see `BucketHook`.
    Raises:
        WeightSyncError: a sender is late, or left the group.
    """
    with membership.leave_on_failure(f"engine {engine}, rank {engine_rank}"):
        return _receive(sources, matrices, transfer, membership, engine, engine_rank, within_host, on_bucket)


def open_store(address: str) -> tuple[Any, int]:
    """A TCPStore for the rendezvous of ranks on several hosts, which listens on this address only; and its port."""
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        listening = server.detach()
    return _c10d.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening), port


def _send(
    channels: Sequence[Channel],
    matrices: Mapping[str, Tensor],
    transfer: Transfer,
    membership: Membership,
    rank: int,
    within_host: Callable[[], int],
    on_bucket: BucketHook | None,
) -> int:
    deadline = time.monotonic() + transfer.deadline_seconds
    group = membership.group(transfer, rank, deadline)
    sent = within_host()
    senders = [MessageSender(channel, matrices, transfer, on_bucket) for channel in channels]
    for number in range(max((len(sender.buckets) for sender in senders), default=0) + _BUFFERS):
        for sender in senders:
            sender.finish(number - _BUFFERS, deadline)
            if number < len(sender.buckets):
                sender.start(number, group)
    return sent + sum(bucket.num_bytes for sender in senders for bucket in sender.buckets)


def _receive(
    sources: Mapping[int, Sequence[Piece]],
    matrices: Mapping[str, Tensor],
    transfer: Transfer,
    membership: Membership,
    engine: int,
    engine_rank: int,
    within_host: Callable[[], int],
    on_bucket: BucketHook | None,
) -> int:
    assert transfer.rendezvous is not None
    deadline = time.monotonic() + transfer.deadline_seconds
    group = membership.group(transfer, transfer.rendezvous.engine_rank(engine, engine_rank), deadline)
    received = within_host()
    receivers = [
        MessageReceiver(ChannelId(rank, engine, engine_rank), pieces, matrices, transfer, on_bucket)
        for rank, pieces in sources.items()
    ]
    for receiver in receivers:
        for number in range(min(_BUFFERS, len(receiver.buckets))):
            receiver.start(number, group)
    for number in range(max((len(receiver.buckets) for receiver in receivers), default=0)):
        for receiver in receivers:
            if number < len(receiver.buckets):
                receiver.finish(number, deadline)
            if number + _BUFFERS < len(receiver.buckets):
                receiver.start(number + _BUFFERS, group)
    return received + received_bytes(sources, transfer)


class _MessageEnd(ChannelEnd):
    """What both ends share: two buffers, and the messages that are under way."""

    _phase: str
    """What this end does, for errors."""

    def __init__(
        self,
        channel: ChannelId,
        pieces: Sequence[Piece],
        matrices: Mapping[str, Tensor],
        transfer: Transfer,
        *,
        engine_pieces: Sequence[Piece],
        on_bucket: BucketHook | None,
    ):
        super().__init__(channel, pieces, matrices, transfer, engine_pieces=engine_pieces, on_bucket=on_bucket)
        assert transfer.rendezvous is not None
        device = self.device if transfer.rendezvous.backend == "nccl" else torch.device("cpu")
        self._buffers = [torch.empty(self.buffer_bytes, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)]
        self._works: dict[int, Any] = {}

    def _buffer(self, number: int) -> Tensor:
        return self._buffers[number % _BUFFERS]

    def _begin(self, number: int, operation: Callable[..., Any], peer: int) -> None:
        """Begin a bucket's message; `operation` is the group's send or recv, `peer` a rank of the group."""
        try:
            self._works[number] = operation([self._buffer(number)[: self.buckets[number].num_bytes]], peer, 0)
        except RuntimeError as error:
            raise _BrokenError(f"{self.describe(number)}: {error}") from error

    def _wait_for(self, number: int, deadline: float) -> bool:
        """Wait for a bucket's message; returns False if there is none."""
        work = self._works.pop(number, None)
        if work is None:
            return False
        try:
            _wait(work, self._buffers[0].is_cuda, deadline)
        except RuntimeError as error:
            if time.monotonic() < deadline:
                raise _BrokenError(f"{self._phase}: {self.describe(number)}: {error}") from error
            limit = f"{self.transfer.deadline_seconds:g} s"
            raise WeightSyncError(f"{self._phase}: timed out after {limit}: {self.describe(number)}") from error
        return True


class MessageSender(_MessageEnd):
    """The trainer rank's end of a channel."""

    _phase = "sending weights"

    def __init__(
        self, channel: Channel, matrices: Mapping[str, Tensor], transfer: Transfer, on_bucket: BucketHook | None
    ):
        super().__init__(
            ChannelId.of(channel), channel.sources, matrices, transfer, engine_pieces=channel.targets,
            on_bucket=on_bucket,
        )  # fmt: skip

    def start(self, number: int, group: Any) -> None:
        """Pack a bucket and begin to send it."""
        assert self.transfer.rendezvous is not None
        self.pack(number, self._buffer(number))
        peer = self.transfer.rendezvous.engine_rank(self.channel.engine, self.channel.engine_rank)
        self._begin(number, group.send, peer)

    def finish(self, number: int, deadline: float) -> None:
        """Wait until a bucket has been sent; its buffer is free then. Nothing to do if there is no such bucket."""
        self._wait_for(number, deadline)


class MessageReceiver(_MessageEnd):
    """The engine rank's end of a channel."""

    _phase = "receiving weights"

    def __init__(
        self,
        channel: ChannelId,
        pieces: Sequence[Piece],
        matrices: Mapping[str, Tensor],
        transfer: Transfer,
        on_bucket: BucketHook | None,
    ):
        super().__init__(channel, pieces, matrices, transfer, engine_pieces=pieces, on_bucket=on_bucket)

    def start(self, number: int, group: Any) -> None:
        """Begin to receive a bucket."""
        self._begin(number, group.recv, self.channel.source_rank)

    def finish(self, number: int, deadline: float) -> None:
        """Wait for a bucket and unpack it."""
        if self._wait_for(number, deadline):
            self.unpack(number, self._buffer(number))


def _wait(work: Any, on_gpu: bool, deadline: float) -> None:
    """Waits for a message. Raises RuntimeError if a connection breaks, and at the deadline."""
    if not on_gpu:
        # A timeout breaks a gloo group, which is what should happen at the deadline.
        if not work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic()))):
            raise RuntimeError("this rank has left the group")
        return
    while not work.is_completed():  # NCCL's wait() only orders streams
        if time.monotonic() > deadline:
            raise RuntimeError("deadline")
        time.sleep(_POLL_SECONDS)
    work.wait()


def _register(transfer: Transfer, rank: int, deadline: float) -> Any:
    """The group's part of the store, once all ranks have registered there."""
    rendezvous = transfer.rendezvous
    assert rendezvous is not None
    left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
    try:
        server = _c10d.TCPStore(rendezvous.host, rendezvous.port, timeout=left)
        store = _c10d.PrefixStore(f"{transfer.plan}/{rendezvous.generation}", server)
        store.set(f"rank/{rank}", json.dumps(settings_in_effect()))
    except (RuntimeError, _c10d.DistError) as error:
        raise WeightSyncError(
            f"connecting: rank {rank} cannot reach the store at {rendezvous.host}: {error}"
        ) from error
    keys = [f"rank/{other}" for other in range(rendezvous.trainer_ranks + rendezvous.engine_ranks)]
    try:
        store.wait(keys, left)
    except (RuntimeError, _c10d.DistError) as error:
        missing = [_name(other, transfer) for other, key in enumerate(keys) if not store.check([key])]
        raise WeightSyncError(
            f"connecting: timed out after {transfer.deadline_seconds:g} s: {', '.join(missing)}"
        ) from error
    if rendezvous.backend == "nccl":
        check_agreement({_name(other, transfer): json.loads(store.get(key)) for other, key in enumerate(keys)})
    return store


def _create_group(store: Any, transfer: Transfer, rank: int, deadline: float) -> Any:
    """The process group of all ranks registered in the store."""
    rendezvous = transfer.rendezvous
    assert rendezvous is not None
    size = rendezvous.trainer_ranks + rendezvous.engine_ranks
    if rendezvous.backend == "nccl":
        return _c10d.ProcessGroupNCCL(store, rank, size, _nccl_limit(transfer))
    options = _c10d.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=max(0.1, deadline - time.monotonic()))  # of the connections made here
    # Connect eagerly: a group that is dropped while it connects on demand can hang.
    options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=_own_address(rendezvous.host), lazy_init=False)]
    return _c10d.ProcessGroupGloo(store, rank, size, options)


def _nccl_limit(transfer: Transfer) -> timedelta:
    """The time that NCCL allows each operation of a group that is kept for many transfers."""
    return timedelta(seconds=transfer.deadline_seconds + NCCL_MARGIN_SECONDS)


def _name(rank: int, transfer: Transfer) -> str:
    """What a rank of the group is called in errors."""
    rendezvous = transfer.rendezvous
    assert rendezvous is not None
    if rank < rendezvous.trainer_ranks:
        return f"trainer rank {rank}"
    engine, engine_rank = divmod(rank - rendezvous.trainer_ranks, rendezvous.ranks_per_engine)
    return f"engine {engine}, rank {engine_rank}"


def _own_address(host: str) -> str:
    """This machine's address on the route to `host`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]
