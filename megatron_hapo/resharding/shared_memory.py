"""The transport within one host: `send` runs in each trainer rank, `receive` in each engine rank.

Each channel of the plan uses a Unix socket in a private folder and a block of memory with two slots, which the sender
owns and passes through the socket. Both disappear with their processes. If the receiver sees the sender's GPU, most
often because it is its own, the block is memory of that GPU, whose handle the receiver opens once; otherwise it is
shared memory of the host, which a process with a GPU makes known to CUDA. The sender packs pieces, in the engine's
dtype, into one slot while the receiver copies the other into its parameters. States of a slot:

    free -> packed (the sender announces the bucket's number) -> copied (the receiver returns the number: free again)

The socket also orders memory between the processes and reports at once that the other end has died. Where it has a name
without a file, which any user could take, both ends refuse a peer of another user. Every wait has a
deadline. A rank that fails marks the transfer (`Transfer.abort`), so that ranks whose own peers are well stop too.
Only the senders' memory (`SlotMemory`) outlives a transfer, so after a failure the next one starts from scratch.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
import struct
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_hapo.errors import WeightSyncError
from megatron_hapo.resharding.channel_ends import BucketHook, ChannelEnd, ChannelId, received_bytes
from megatron_hapo.resharding.gpu_slots import (
    export_handle,
    gpu_of,
    open_handle,
    register,
    shareable,
    unregister,
    visible_gpu,
)
from megatron_hapo.resharding.plan import Channel, Piece
from megatron_hapo.resharding.staging import StagedMatrices
from megatron_hapo.resharding.transfer import Transfer, TransferStoppedError

_SLOTS = 2
_POLL_SECONDS = 0.2
"""How often a waiting rank checks whether the transfer has failed elsewhere."""
_NUMBER = struct.Struct("<q")
_MAX_MESSAGE_BYTES = 4096
"""Longest message of the handshake."""


class SlotMemory:
    """The slots of a trainer rank's channels, kept between transfers: touching fresh pages takes longer than copying.

    A slot is always written before it is read, so values of an earlier transfer do no harm.
    """

    def __init__(self) -> None:
        self._host: dict[tuple[int, int], tuple[BinaryIO, Tensor]] = {}
        self._gpu: dict[tuple[int, int], tuple[str, Tensor]] = {}

    def on_host(self, channel: ChannelId, num_bytes: int, device: torch.device) -> tuple[int, Tensor]:
        """The channel's slots in shared memory of the host: file descriptor, and [num_bytes] uint8.

        Args:
            device: of the parameters that will be copied there.

        Raises:
            OSError: the system has no shared memory left.
        """
        key = (channel.engine, channel.engine_rank)
        block = self._host.pop(key, None)
        if block is None or len(block[1]) != num_bytes:
            if block is not None and device.type == "cuda":
                unregister(block[1])
            file = os.fdopen(os.memfd_create("megatron-hapo-weights", os.MFD_CLOEXEC), "r+b")
            os.ftruncate(file.fileno(), num_bytes)
            block = (file, _map(file.fileno(), num_bytes))
            if device.type == "cuda":
                register(block[1])
        self._host[key] = block
        return block[0].fileno(), block[1]

    def on_gpu(self, channel: ChannelId, num_bytes: int, device: torch.device) -> tuple[str, Tensor]:
        """The channel's slots in GPU memory: a name unique to this block, and [num_bytes] uint8 on `device`."""
        key = (channel.engine, channel.engine_rank)
        block = self._gpu.pop(key, None)
        if block is None or len(block[1]) != num_bytes:
            block = (uuid.uuid4().hex, shareable(num_bytes, device))
        self._gpu[key] = block
        return block


def send(
    channels: Sequence[Channel],
    matrices: Mapping[str, Tensor],
    transfer: Transfer,
    memory: SlotMemory,
    *,
    on_bucket: BucketHook | None = None,
) -> int:
    """Send everything of these channels; returns the bytes sent, including padding.

    Args:
        channels: the channels that start at this trainer rank.
        matrices: the rank's local parameters, each [rows, columns], of any float dtype and device.
        memory: this rank's slots, used by one transfer at a time.
        on_bucket: for tests, see `BucketHook`.
    Raises:
        WeightSyncError: a receiver is late, or closed its connection.
    """
    deadline = time.monotonic() + transfer.deadline_seconds
    with _abort_on_failure(transfer), ExitStack() as stack:
        senders = [SharedMemorySender(channel, matrices, transfer, on_bucket) for channel in channels]
        for sender in senders:
            stack.callback(sender.socket.close)
        for sender in senders:
            sender.connect(deadline, memory)
        by_socket = {sender.socket.fileno(): sender for sender in senders}
        poll = select.poll()
        for number in by_socket:
            poll.register(number, select.POLLIN)
        while by_socket:
            packed = [sender.pack_next() for sender in by_socket.values()]
            if any(packed):
                ready = poll.poll(0)
            else:
                ready = _wait(poll, transfer, deadline, "sending weights", by_socket.values())
            for number, _ in ready:
                if by_socket[number].confirm_next():
                    poll.unregister(number)
                    del by_socket[number]
        return sum(bucket.num_bytes for sender in senders for bucket in sender.buckets)


def receive(
    sources: Mapping[int, Sequence[Piece]],
    matrices: Mapping[str, Tensor],
    transfer: Transfer,
    opened: dict[str, Tensor],
    *,
    engine: int,
    engine_rank: int,
    on_bucket: BucketHook | None = None,
) -> int:
    """Fill an engine rank's parameters with what all trainer ranks send; returns the bytes received.

    Args:
        sources: for each trainer rank, the pieces of this rank's parameters that it sends, in the plan's order.
        matrices: the engine rank's parameters, each [rows, columns], in the transfer's dtype.
        opened: blocks of memory that this rank has opened, by name; kept between transfers.
        engine: index of the engine.
        engine_rank: rank within the engine.
        on_bucket: for tests, see `BucketHook`.
    Raises:
        WeightSyncError: a sender is late, closed its connection, or has another plan.
    """
    deadline = time.monotonic() + transfer.deadline_seconds
    pending = {
        rank: SharedMemoryReceiver(ChannelId(rank, engine, engine_rank), pieces, matrices, transfer, on_bucket)
        for rank, pieces in sources.items()
    }
    with _abort_on_failure(transfer), ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        address = transfer.address(engine, engine_rank)
        listener.bind(address)
        if not address.startswith("\0"):
            stack.callback(os.unlink, address)
        listener.listen(len(sources) + 1)
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        by_socket: dict[int, SharedMemoryReceiver] = {}
        waiting: set[int] = set()
        while pending:
            for number, _ in _wait(poll, transfer, deadline, "receiving weights", pending.values()):
                if number == listener.fileno():
                    connection = stack.enter_context(listener.accept()[0])
                    receiver = _accept(connection, pending, f"engine {engine}, rank {engine_rank}", deadline, opened)
                    by_socket[connection.fileno()] = receiver
                    poll.register(connection, select.POLLIN)
                    continue
                if _runs_ahead(by_socket[number], pending.values(), matrices):
                    waiting.add(number)
                    poll.unregister(number)
                    continue
                if by_socket[number].unpack_next():
                    poll.unregister(number)
                    del pending[by_socket.pop(number).channel.source_rank]
                while waiting:
                    poll.register(waiting.pop(), select.POLLIN)
    return received_bytes(sources, transfer)


class SharedMemorySender(ChannelEnd):
    """The trainer rank's end of a channel."""

    def __init__(
        self, channel: Channel, matrices: Mapping[str, Tensor], transfer: Transfer, on_bucket: BucketHook | None
    ):
        super().__init__(
            ChannelId.of(channel), channel.sources, matrices, transfer, engine_pieces=channel.targets,
            on_bucket=on_bucket,
        )  # fmt: skip
        self._packed = self._confirmed = 0
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def __str__(self) -> str:
        return self.describe(self._confirmed)

    def connect(self, deadline: float, memory: SlotMemory) -> None:
        """Connect to the engine rank, waiting until it listens, and agree with it on the slots' memory."""
        address = self.transfer.address(self.channel.engine, self.channel.engine_rank)
        while True:
            try:
                self.socket.connect(address)
                break
            except (FileNotFoundError, ConnectionRefusedError):  # not listening yet
                if time.monotonic() > deadline:
                    raise _timed_out("connecting", self.transfer, [self]) from None
                self.transfer.raise_if_aborted("connecting", str(self))
                time.sleep(0.002)
        try:
            _check_user(self.socket)
            self._offer_slots(deadline, memory)
        except (OSError, ValueError) as error:
            raise WeightSyncError(f"connecting: {self}: {error or 'no answer'}") from error

    def _offer_slots(self, deadline: float, memory: SlotMemory) -> None:
        """The sender's part of the handshake; `SharedMemoryReceiver.open_slots` is the other.

        The first message says who sends, and which GPU holds the slots, if one does. The receiver's answer to an offer
        of GPU memory is `handle` (it sees that GPU and needs a handle), `opened` (it has one from an earlier transfer),
        or `host` (it does not see that GPU, so host memory serves).
        """
        num_bytes = _SLOTS * self.buffer_bytes
        hello = {"rank": self.channel.source_rank, "plan": self.transfer.plan, "slot_bytes": self.buffer_bytes}
        if self.device.type == "cpu":
            file, self._slots = memory.on_host(self.channel, num_bytes, self.device)
            socket.send_fds(self.socket, [json.dumps(hello).encode()], [file])
            return
        name, slots = memory.on_gpu(self.channel, num_bytes, self.device)
        self.socket.send(json.dumps({**hello, "gpu": gpu_of(self.device), "block": name}).encode())
        self.socket.settimeout(max(0.001, deadline - time.monotonic()))
        answer = json.loads(self.socket.recv(_MAX_MESSAGE_BYTES))
        self.socket.settimeout(None)
        if answer == "host":
            file, self._slots = memory.on_host(self.channel, num_bytes, self.device)
            socket.send_fds(self.socket, [b"host"], [file])
            return
        self._slots = slots
        if answer == "handle":
            self.socket.send(export_handle(slots).encode())

    def pack_next(self) -> bool:
        """Pack and announce the next bucket; returns False if there is none, or no free slot."""
        if self._packed == len(self.buckets) or self._packed - self._confirmed == _SLOTS:
            return False
        self.pack(self._packed, self._slots[(self._packed % _SLOTS) * self.buffer_bytes :])
        if self._slots.is_cuda:
            torch.cuda.current_stream(self._slots.device).synchronize()
        try:
            self.socket.send(_NUMBER.pack(self._packed))
        except OSError as error:
            raise WeightSyncError(f"sending weights: {self}: {error}") from error
        self._packed += 1
        return True

    def confirm_next(self) -> bool:
        """Read the receiver's confirmation of a bucket; returns whether it was the last bucket."""
        message = _read_number(self.socket)
        if not message:
            raise WeightSyncError(f"sending weights: {self}: the engine rank closed the connection")
        assert _NUMBER.unpack(message)[0] == self._confirmed, "buckets are confirmed in order"
        self._confirmed += 1
        return self._confirmed == len(self.buckets)


class SharedMemoryReceiver(ChannelEnd):
    """The engine rank's end of a channel."""

    def __init__(
        self,
        channel: ChannelId,
        pieces: Sequence[Piece],
        matrices: Mapping[str, Tensor],
        transfer: Transfer,
        on_bucket: BucketHook | None,
    ):
        super().__init__(channel, pieces, matrices, transfer, engine_pieces=pieces, on_bucket=on_bucket)
        self.connection: socket.socket | None = None
        self._unpacked = 0

    @property
    def next_pieces(self) -> Sequence[Piece]:
        """The pieces of the bucket that comes next."""
        return self.pieces_of(self._unpacked)

    def __str__(self) -> str:
        return self.describe(self._unpacked)

    def open_slots(
        self, connection: socket.socket, hello: dict[str, Any], files: list[int], opened: dict[str, Tensor]
    ) -> None:
        """The receiver's part of the handshake, after the sender's first message; see `SharedMemorySender`.

        Args:
            hello: the message.
            files: descriptors that came with it; one that comes later is added, and the caller closes all of them.
            opened: blocks of memory by name, to which this one is added.
        """
        self.connection, self._slot_bytes = connection, hello["slot_bytes"]
        if hello.get("gpu") is not None:
            name = hello["block"]
            gpu = visible_gpu(hello["gpu"]) if self.device.type == "cuda" else None
            answer = "host" if gpu is None else ("opened" if name in opened else "handle")
            connection.send(json.dumps(answer).encode())
            if answer == "host":
                files += socket.recv_fds(connection, _MAX_MESSAGE_BYTES, 1)[1]
            elif answer == "handle":
                assert gpu is not None
                opened[name] = open_handle(connection.recv(_MAX_MESSAGE_BYTES).decode(), gpu)
        self._slots = self._host_slots(files[0], opened) if files else opened[hello["block"]]

    def _host_slots(self, file: int, opened: dict[str, Tensor]) -> Tensor:
        """The mapped memory of this file; with a GPU it is kept, because CUDA takes long to get to know it."""
        num_bytes = _SLOTS * self._slot_bytes
        if self.device.type == "cpu":
            return _map(file, num_bytes)
        name = f"file {os.fstat(file).st_ino}"
        if name not in opened:
            opened[name] = _map(file, num_bytes)
            register(opened[name])
        return opened[name]

    def unpack_next(self) -> bool:
        """Copy the bucket that the sender has announced, and confirm it; returns whether it was the last bucket."""
        assert self.connection is not None
        message = _read_number(self.connection)
        if not message:
            raise WeightSyncError(f"receiving weights: {self}: the trainer rank closed the connection")
        assert _NUMBER.unpack(message)[0] == self._unpacked, "buckets are announced in order"
        self.unpack(self._unpacked, self._slots[(self._unpacked % _SLOTS) * self._slot_bytes :])
        if self.device.type == "cuda":  # the slot must have been read before the sender may fill it again
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self.connection.send(message)
        except OSError as error:
            raise WeightSyncError(f"receiving weights: {self}: {error}") from error
        self._unpacked += 1
        return self._unpacked == len(self.buckets)


def _runs_ahead(
    receiver: SharedMemoryReceiver, pending: Collection[SharedMemoryReceiver], matrices: Mapping[str, Tensor]
) -> bool:
    """Whether a channel's next bucket has to wait for those of others, so that little is staged.

    The channel that is furthest behind never waits. It has what the first of the staged parameters lacks, because every
    channel follows the plan's order, so that something is always quantized.
    """
    if not isinstance(matrices, StagedMatrices) or matrices.admits(receiver.next_pieces):
        return False
    return matrices.position(receiver.next_pieces) > min(matrices.position(other.next_pieces) for other in pending)


def _accept(
    connection: socket.socket,
    pending: Mapping[int, SharedMemoryReceiver],
    where: str,
    deadline: float,
    opened: dict[str, Tensor],
) -> SharedMemoryReceiver:
    """The receiver that a new connection belongs to, with its slots open."""
    files: list[int] = []
    connection.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        _check_user(connection)
        text, files, _, _ = socket.recv_fds(connection, _MAX_MESSAGE_BYTES, 1)
        hello = json.loads(text)
        receiver = pending.get(hello["rank"])
        if receiver is None or receiver.connection is not None:
            raise WeightSyncError(f"receiving weights: {where}: unexpected connection of trainer rank {hello['rank']}")
        if hello["plan"] != receiver.transfer.plan:
            raise WeightSyncError(f"receiving weights: {receiver}: trainer and engine have different resharding plans")
        receiver.open_slots(connection, hello, files, opened)
    except (OSError, ValueError) as error:  # closed, late, or not JSON
        raise WeightSyncError(f"receiving weights: {where}: a trainer rank failed while connecting") from error
    finally:
        connection.settimeout(None)
        for file in files:
            os.close(file)
    return receiver


def _check_user(connection: socket.socket) -> None:
    """Raises ConnectionRefusedError unless the process at the other end is of this process's user."""
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if user != os.getuid():
        raise ConnectionRefusedError(f"the other end belongs to user {user}")


def _map(file: int, num_bytes: int) -> Tensor:
    """[num_bytes] uint8 in shared memory, with all pages present; unmapped together with the tensor."""
    pages = mmap.mmap(file, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _read_number(connection: socket.socket) -> bytes:
    """The next message, or nothing if the other end has closed the connection or died."""
    try:
        return connection.recv(_NUMBER.size)
    except OSError:
        return b""


def _wait(
    poll: select.poll, transfer: Transfer, deadline: float, phase: str, waiting_for: Collection[ChannelEnd]
) -> list[tuple[int, int]]:
    """Sockets that can be read. Raises at the deadline, or if the transfer has failed elsewhere."""
    while True:
        left = deadline - time.monotonic()
        ready = poll.poll(max(0.0, min(left, _POLL_SECONDS)) * 1000)
        if ready:
            return ready
        if left <= _POLL_SECONDS:
            raise _timed_out(phase, transfer, waiting_for)
        transfer.raise_if_aborted(phase, str(next(iter(waiting_for))))


@contextmanager
def _abort_on_failure(transfer: Transfer) -> Iterator[None]:
    try:
        yield
    except TransferStoppedError:
        raise
    except BaseException:
        transfer.abort()
        raise


def _timed_out(phase: str, transfer: Transfer, waiting_for: Collection[ChannelEnd]) -> WeightSyncError:
    shown = "; ".join(str(end) for end in list(waiting_for)[:5])
    more = f"; and {len(waiting_for) - 5} more" if len(waiting_for) > 5 else ""
    return WeightSyncError(f"{phase}: timed out after {transfer.deadline_seconds:g} s: {shown}{more}")
