"""Carries out a plan between processes of one host: `send` in a trainer rank, `receive` in an engine rank.

Each channel of the plan is a Unix socket in a private folder and a block of memory with two slots, which the sender
owns and hands over through the socket; both vanish with their processes. Where both ends are on the same GPU the block
is memory of that GPU, whose handle the receiver opens once; else it is shared memory of the host. The sender packs
pieces, in the engine's dtype, into one slot while the receiver copies the other into its parameters. States of a slot:

    free -> packed (the bucket's number goes to the receiver) -> copied (the number comes back: free again)

The socket also orders memory between the processes, tells at once when the other end has died, and is waited for with
a deadline. Whoever fails leaves a mark (`Transfer.give_up`), so that those whose own peers are well do not wait either.
Nothing survives a sync but the senders' memory (`SlotMemory`): after a failed one the next starts from nothing.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from megatron_hapo.errors import WeightSyncError
from megatron_hapo.resharding.gpu_slots import export_handle, gpu_of, open_handle
from megatron_hapo.resharding.plan import Channel, Piece

_ALIGNMENT = 64
_SLOTS = 2
_CHECK_SECONDS = 0.2
"""How often a waiting rank looks whether the sync has failed elsewhere."""
_NUMBER = struct.Struct("<q")
_LINE = 4096
"""Longest message of the handshake, bytes."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where all trainer and engine ranks meet as one process group, for the transport between hosts."""

    host: str
    port: int
    """Of a torch TCPStore."""
    generation: int
    """Rises after a sync that failed, whose group nobody uses again."""
    trainer_ranks: int
    engine_ranks: int
    """Of all engines."""
    ranks_per_engine: int
    backend: str
    """gloo or nccl."""

    def engine_rank(self, engine: int, rank: int) -> int:
        """An engine rank's place in the group, behind the trainer's."""
        return self.trainer_ranks + engine * self.ranks_per_engine + rank


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One sync, as both ends must know it."""

    folder: str
    """Of the sockets; private to the user, its path short."""
    number: int
    """Of the sync; no two syncs of a folder share one."""
    plan: str
    """Fingerprint of the plan."""
    dtype: str
    """torch name of the engines' dtype."""
    slot_bytes: int
    """Two slots a channel; a single row that is larger makes its channel's slots larger."""
    deadline_seconds: float
    """For everything to arrive."""
    meeting: Meeting | None = None
    """None: all are on one host, and shared memory carries the weights."""

    def address(self, engine: int, engine_rank: int) -> str:
        return str(Path(self.folder) / f"{self.number}.{engine}.{engine_rank}")

    def give_up(self) -> None:
        """Tell every rank of this sync on this host that it has failed."""
        with contextlib.suppress(FileNotFoundError):  # on an engine's own host the folder is not there
            self._mark.touch()

    def check(self, phase: str, waiting: str) -> None:
        """Raises if the sync has failed elsewhere."""
        if self._mark.exists():
            raise TransferStoppedError(f"{phase}: stopped, because another rank failed, while waiting for {waiting}")

    @property
    def _mark(self) -> Path:
        return Path(self.folder) / f"{self.number}.failed"


class TransferStoppedError(WeightSyncError):
    """Another rank failed; its error tells more."""


class Bucket(NamedTuple):
    first: int
    """Index of its first piece."""
    offsets: tuple[int, ...]
    """Of its pieces, bytes."""
    num_bytes: int


class SlotMemory:
    """The slots of a rank's channels, kept between syncs: fresh pages take longer than the copies through them.

    What a slot holds is never read before the sync at hand has written it.
    """

    def __init__(self) -> None:
        self._host: dict[tuple[int, int], tuple[BinaryIO, Tensor]] = {}
        self._gpu: dict[tuple[int, int], tuple[str, Tensor]] = {}

    def on_host(self, channel: Channel, num_bytes: int) -> tuple[int, Tensor]:
        """File descriptor and [num_bytes] uint8 of the channel's slots.

        Raises:
            OSError: the system has no such memory left.
        """
        key = (channel.engine, channel.engine_rank)
        block = self._host.pop(key, None)
        if block is None or len(block[1]) != num_bytes:
            file = os.fdopen(os.memfd_create("megatron-hapo-weights", os.MFD_CLOEXEC), "r+b")
            os.ftruncate(file.fileno(), num_bytes)
            block = (file, _map(file.fileno(), num_bytes))
        self._host[key] = block
        return block[0].fileno(), block[1]

    def on_gpu(self, channel: Channel, num_bytes: int, device: torch.device) -> tuple[str, Tensor]:
        """A name that no other block has, and [num_bytes] uint8 on the GPU."""
        key = (channel.engine, channel.engine_rank)
        block = self._gpu.pop(key, None)
        if block is None or len(block[1]) != num_bytes:
            block = (uuid.uuid4().hex, torch.empty(num_bytes, dtype=torch.uint8, device=device))
        self._gpu[key] = block
        return block


def send(channels: Sequence[Channel], matrices: Mapping[str, Tensor], transfer: Transfer, memory: SlotMemory) -> int:
    """Send everything of these channels; the bytes that went.

    Args:
        channels: of this rank.
        matrices: the rank's parameters, two-dimensional, of any float dtype and device.
        memory: of this rank; one sync at a time may use it.
    Raises:
        WeightSyncError: a receiver is late, or went away.
    """
    deadline = time.monotonic() + transfer.deadline_seconds
    with _marking_failure(transfer), ExitStack() as stack:
        outlets = [_Outlet(channel, matrices, transfer) for channel in channels]
        for outlet in outlets:
            outlet.connect(transfer, deadline, memory)
            stack.callback(outlet.socket.close)
        by_socket = {outlet.socket.fileno(): outlet for outlet in outlets}
        poll = select.poll()
        for number in by_socket:
            poll.register(number, select.POLLIN)
        while by_socket:
            packed = [outlet.pack_one() for outlet in by_socket.values()]
            if any(packed):
                ready = poll.poll(0)
            else:
                ready = _wait(poll, transfer, deadline, "sending weights", by_socket.values())
            for number, _ in ready:
                if by_socket[number].take_answer():
                    poll.unregister(number)
                    del by_socket[number]
        return sum(bucket.num_bytes for outlet in outlets for bucket in outlet.buckets)


def receive(
    sources: Mapping[int, Sequence[Piece]],
    matrices: Mapping[str, Tensor],
    transfer: Transfer,
    opened: dict[str, Tensor],
    *,
    engine: int,
    engine_rank: int,
) -> int:
    """Fill an engine rank's parameters with what all trainer ranks send; the bytes that came.

    Args:
        sources: for each trainer rank, the pieces that it sends, in the plan's order.
        matrices: the engine rank's parameters, two-dimensional, in the transfer's dtype.
        opened: blocks of GPU memory that this rank has opened, by name; kept from sync to sync.
    Raises:
        WeightSyncError: a sender is late, went away, or follows another plan.
    """
    who = f"engine {engine}, rank {engine_rank}"
    deadline = time.monotonic() + transfer.deadline_seconds
    missing = {rank: _Inlet(rank, pieces, matrices, transfer, who) for rank, pieces in sources.items()}
    with _marking_failure(transfer), ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        address = transfer.address(engine, engine_rank)
        listener.bind(address)
        stack.callback(os.unlink, address)
        listener.listen(len(sources) + 1)
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        inlets: dict[int, _Inlet] = {}
        while missing:
            for number, _ in _wait(poll, transfer, deadline, "receiving weights", missing.values()):
                if number == listener.fileno():
                    connection = stack.enter_context(listener.accept()[0])
                    inlets[connection.fileno()] = _greet(connection, missing, transfer, who, deadline, opened)
                    poll.register(connection, select.POLLIN)
                elif inlets[number].take_one():
                    poll.unregister(number)
                    del missing[inlets.pop(number).rank]
    itemsize = getattr(torch, transfer.dtype).itemsize
    return sum(piece.rows * piece.columns for pieces in sources.values() for piece in pieces) * itemsize


def as_matrix(tensor: Tensor) -> Tensor:
    """The tensor's storage as rows and columns, as a plan counts them.

    Raises:
        WeightSyncError: it is not contiguous, so a copy would go elsewhere.
    """
    if not tensor.is_contiguous():
        raise WeightSyncError(f"a parameter of shape {tuple(tensor.shape)} is not contiguous")
    return tensor.detach().view(-1, 1) if tensor.ndim == 1 else tensor.detach().view(-1, tensor.shape[-1])


class _Outlet:
    """The sending end of a channel."""

    def __init__(self, channel: Channel, matrices: Mapping[str, Tensor], transfer: Transfer):
        self._channel, self._matrices = channel, matrices
        self._dtype: torch.dtype = getattr(torch, transfer.dtype)
        self.buckets = cut_buckets(channel.sources, self._dtype.itemsize, transfer.slot_bytes)
        self._packed = self._copied = 0
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def __str__(self) -> str:
        channel = self._channel
        parameter = channel.targets[self.buckets[min(self._copied, len(self.buckets) - 1)].first].parameter
        return f"trainer rank {channel.source_rank} to engine {channel.engine}, rank {channel.engine_rank}: {parameter}"

    def connect(self, transfer: Transfer, deadline: float, memory: SlotMemory) -> None:
        address = transfer.address(self._channel.engine, self._channel.engine_rank)
        while True:
            try:
                self.socket.connect(address)
                break
            except (FileNotFoundError, ConnectionRefusedError):  # not there yet
                if time.monotonic() > deadline:
                    raise _late("connecting", transfer, [self]) from None
                transfer.check("connecting", str(self))
                time.sleep(0.002)
        self._slot_bytes = max(bucket.num_bytes for bucket in self.buckets)
        try:
            self._offer_slots(transfer, deadline, memory)
        except (OSError, ValueError) as error:
            raise WeightSyncError(f"connecting: {self}: {error or 'no answer'}") from error

    def _offer_slots(self, transfer: Transfer, deadline: float, memory: SlotMemory) -> None:
        """Says who sends, and from which GPU; the receiver answers whether it is on the same one."""
        device = self._matrices[self._channel.sources[0].parameter].device
        num_bytes = _SLOTS * self._slot_bytes
        hello = {"rank": self._channel.source_rank, "plan": transfer.plan, "slot_bytes": self._slot_bytes}
        if device.type == "cpu":
            file, self._slots = memory.on_host(self._channel, num_bytes)
            socket.send_fds(self.socket, [json.dumps(hello).encode()], [file])
            return
        name, slots = memory.on_gpu(self._channel, num_bytes, device)
        self.socket.send(json.dumps({**hello, "gpu": gpu_of(slots), "block": name}).encode())
        self.socket.settimeout(max(0.001, deadline - time.monotonic()))
        wanted = json.loads(self.socket.recv(_LINE))
        self.socket.settimeout(None)
        if wanted == "host":
            file, self._slots = memory.on_host(self._channel, num_bytes)
            socket.send_fds(self.socket, [b"host"], [file])
            return
        self._slots = slots
        if wanted == "handle":
            self.socket.send(export_handle(slots).encode())

    def pack_one(self) -> bool:
        """Pack the next bucket if there is one and a slot is free."""
        if self._packed == len(self.buckets) or self._packed - self._copied == _SLOTS:
            return False
        bucket, itemsize = self.buckets[self._packed], self._dtype.itemsize
        slot = self._slots[(self._packed % _SLOTS) * self._slot_bytes :]
        pieces = self._channel.sources[bucket.first : bucket.first + len(bucket.offsets)]
        for piece, offset in zip(pieces, bucket.offsets, strict=True):
            num_bytes = piece.rows * piece.columns * itemsize
            place = slot[offset : offset + num_bytes].view(self._dtype).view(piece.rows, piece.columns)
            place.copy_(rectangle(self._matrices[piece.parameter], piece))
        if self._slots.is_cuda:
            torch.cuda.current_stream(self._slots.device).synchronize()
        self._tell(self._packed)
        self._packed += 1
        return True

    def take_answer(self) -> bool:
        """Take the receiver's answer; whether it was the last."""
        try:
            answer = self.socket.recv(_NUMBER.size)
        except OSError:
            answer = b""
        if not answer:
            raise WeightSyncError(f"sending weights: {self}: the engine rank has closed the connection")
        assert _NUMBER.unpack(answer)[0] == self._copied, "answers come in order"
        self._copied += 1
        return self._copied == len(self.buckets)

    def _tell(self, number: int) -> None:
        try:
            self.socket.send(_NUMBER.pack(number))
        except OSError as error:
            raise WeightSyncError(f"sending weights: {self}: {error}") from error


@dataclass
class _Inlet:
    """The receiving end of a channel."""

    rank: int
    pieces: Sequence[Piece]
    matrices: Mapping[str, Tensor]
    transfer: Transfer
    who: str
    connection: socket.socket | None = None
    slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    slot_bytes: int = 0
    copied: int = 0

    def __post_init__(self) -> None:
        self.dtype: torch.dtype = getattr(torch, self.transfer.dtype)
        self.buckets = cut_buckets(self.pieces, self.dtype.itemsize, self.transfer.slot_bytes)

    def __str__(self) -> str:
        parameter = self.pieces[self.buckets[min(self.copied, len(self.buckets) - 1)].first].parameter
        return f"trainer rank {self.rank} to {self.who}: {parameter}"

    def take_one(self) -> bool:
        """Copy the bucket that the sender has announced; whether it was the last."""
        assert self.connection is not None
        try:
            message = self.connection.recv(_NUMBER.size)
        except OSError:
            message = b""
        if not message:
            raise WeightSyncError(f"receiving weights: {self}: the trainer rank has closed the connection")
        assert _NUMBER.unpack(message)[0] == self.copied, "buckets come in order"
        bucket, itemsize = self.buckets[self.copied], self.dtype.itemsize
        slot = self.slots[(self.copied % _SLOTS) * self.slot_bytes :]
        for piece, offset in zip(self.pieces[bucket.first :], bucket.offsets, strict=False):
            num_bytes = piece.rows * piece.columns * itemsize
            values = slot[offset : offset + num_bytes].view(self.dtype).view(piece.rows, piece.columns)
            rectangle(self.matrices[piece.parameter], piece).copy_(values)
        target = self.matrices[self.pieces[0].parameter]
        if target.is_cuda:  # the slot must have been read before the sender may fill it again
            torch.cuda.current_stream(target.device).synchronize()
        try:
            self.connection.send(message)
        except OSError as error:
            raise WeightSyncError(f"receiving weights: {self}: {error}") from error
        self.copied += 1
        return self.copied == len(self.buckets)


def _greet(
    connection: socket.socket,
    missing: Mapping[int, _Inlet],
    transfer: Transfer,
    who: str,
    deadline: float,
    opened: dict[str, Tensor],
) -> _Inlet:
    files: list[int] = []
    connection.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        hello, files, _, _ = socket.recv_fds(connection, _LINE, 1)
        said = json.loads(hello)
        inlet = missing.get(said["rank"])
        if inlet is None or inlet.connection is not None:
            raise WeightSyncError(f"receiving weights: {who}: trainer rank {said['rank']} is not expected")
        if said["plan"] != transfer.plan:
            raise WeightSyncError(f"receiving weights: {inlet}: trainer and engine follow different plans")
        inlet.connection, inlet.slot_bytes = connection, said["slot_bytes"]
        target = inlet.matrices[inlet.pieces[0].parameter]
        if said.get("gpu") is not None:
            same_gpu, name = said["gpu"] == gpu_of(target), said["block"]
            wanted = "host" if not same_gpu else ("nothing" if name in opened else "handle")
            connection.send(json.dumps(wanted).encode())
            if wanted == "host":
                _, files, _, _ = socket.recv_fds(connection, _LINE, 1)
            elif wanted == "handle":
                opened[name] = open_handle(connection.recv(_LINE).decode(), target.device)
        inlet.slots = opened[said["block"]] if not files else _map(files[0], _SLOTS * inlet.slot_bytes)
    except (OSError, ValueError) as error:  # closed, late, or nothing was said
        raise WeightSyncError(f"receiving weights: {who}: a trainer rank went away while connecting") from error
    finally:
        connection.settimeout(None)
        for file in files:
            os.close(file)
    return inlet


def cut_buckets(pieces: Sequence[Piece], itemsize: int, slot_bytes: int) -> list[Bucket]:
    """The same cut on both sides: pieces in order, as many as fit a slot, at least one."""
    buckets, first, offsets, end = [], 0, [], 0
    for index, piece in enumerate(pieces):
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        size = piece.rows * piece.columns * itemsize
        if offsets and start + size > slot_bytes:
            buckets.append(Bucket(first, tuple(offsets), end))
            first, offsets, start = index, [], 0
        offsets.append(start)
        end = start + size
    buckets.append(Bucket(first, tuple(offsets), end))
    return buckets


def rectangle(matrix: Tensor, piece: Piece) -> Tensor:
    return matrix[piece.row : piece.row + piece.rows, piece.column : piece.column + piece.columns]


def _map(memory: int, num_bytes: int) -> Tensor:
    """[num_bytes] uint8 on shared memory, which is unmapped when the tensor goes; its pages are there at once."""
    pages = mmap.mmap(memory, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _wait(
    poll: select.poll, transfer: Transfer, deadline: float, phase: str, waiting: Collection[_Outlet | _Inlet]
) -> list[tuple[int, int]]:
    """Sockets that can be read; raises at the deadline, or when the sync has failed elsewhere."""
    while True:
        left = deadline - time.monotonic()
        ready = poll.poll(max(0.0, min(left, _CHECK_SECONDS)) * 1000)
        if ready:
            return ready
        if left <= _CHECK_SECONDS:
            raise _late(phase, transfer, waiting)
        transfer.check(phase, str(next(iter(waiting))))


@contextmanager
def _marking_failure(transfer: Transfer) -> Iterator[None]:
    try:
        yield
    except TransferStoppedError:
        raise
    except BaseException:
        transfer.give_up()
        raise


def _late(phase: str, transfer: Transfer, waiting: Collection[_Outlet | _Inlet]) -> WeightSyncError:
    shown = "; ".join(str(end) for end in list(waiting)[:5]) + (
        f"; and {len(waiting) - 5} more" if len(waiting) > 5 else ""
    )
    return WeightSyncError(f"{phase}: not done within {transfer.deadline_seconds:g} s: {shown}")
