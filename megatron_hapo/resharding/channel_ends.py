"""The two ends of a channel, apart from how bytes get from one to the other: buckets, and packing and unpacking them.

A channel carries the pieces between one trainer rank and one engine rank, in buckets that fit a buffer of bounded size.
`shared_memory` and `process_group` each derive a sender and a receiver from `ChannelEnd`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_hapo.resharding.plan import Channel, Piece
from megatron_hapo.resharding.staging import StagedMatrices
from megatron_hapo.resharding.transfer import Transfer

_ALIGNMENT = 64  # bytes


class ChannelId(NamedTuple):
    """The trainer rank and the engine rank that a channel connects."""

    source_rank: int
    engine: int
    engine_rank: int

    @classmethod
    def of(cls, channel: Channel) -> ChannelId:
        """The id of a planned channel."""
        return cls(channel.source_rank, channel.engine, channel.engine_rank)

    def __str__(self) -> str:
        return f"trainer rank {self.source_rank} to engine {self.engine}, rank {self.engine_rank}"


class BucketHook(Protocol):
    """The seam through which tests inject faults, given to `transports.Sender` or `Receiver`; None in a run.

    A sender calls it with each bucket that it has packed, before handing it over; a receiver with each bucket that has
    arrived, before unpacking it. It may raise, wait, or change the data.
    """

    def __call__(self, channel: ChannelId, number: int, data: Tensor) -> None:
        """`number` counts the channel's buckets from 0; `data` is [bytes of the bucket] uint8, in the buffer itself."""
        ...


class Bucket(NamedTuple):
    """Consecutive pieces of a channel that are sent together."""

    first: int
    """Index of the first piece in the channel."""
    offsets: tuple[int, ...]
    """Where each piece starts in the buffer, bytes."""
    num_bytes: int
    """Size of the bucket, including padding between pieces."""


class ChannelEnd:
    """One end of a channel: copies buckets between a buffer and the rank's parameters.

    Args:
        channel: which ranks the channel connects.
        pieces: rectangles of this rank's parameters, in the plan's order.
        matrices: this rank's parameters, each [rows, columns]; any float dtype on a trainer rank. `StagedMatrices` on
            an engine rank that quantizes what it receives.
        engine_pieces: the same pieces of the engine rank's parameters, whose names appear in errors.
    """

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
        self.channel, self.transfer = channel, transfer
        self._pieces, self._matrices, self._engine_pieces = pieces, matrices, engine_pieces
        self._dtype: torch.dtype = getattr(torch, transfer.dtype)
        self._on_bucket = on_bucket
        self.buckets = cut_buckets(pieces, self._dtype.itemsize, transfer.slot_bytes)
        self.buffer_bytes = max(bucket.num_bytes for bucket in self.buckets)
        """Size of a buffer that holds any of the buckets."""

    @property
    def device(self) -> torch.device:
        """The device of this rank's parameters."""
        name = self._pieces[0].parameter
        if isinstance(self._matrices, StagedMatrices):
            return self._matrices.device_of(name)
        return self._matrices[name].device

    def describe(self, number: int) -> str:
        """The channel's ranks and the first parameter of a bucket, for errors."""
        bucket = self.buckets[min(number, len(self.buckets) - 1)]
        return f"{self.channel}: {self._engine_pieces[bucket.first].parameter}"

    def pack(self, number: int, buffer: Tensor) -> None:
        """Copy a bucket's pieces from the parameters into the buffer, converted to the transfer's dtype.

        Args:
            buffer: [at least `buffer_bytes`] uint8.
        """
        for _, parameter, packed in self._places(number, buffer):
            packed.copy_(parameter)
        if self._on_bucket is not None:
            self._on_bucket(self.channel, number, buffer[: self.buckets[number].num_bytes])

    def unpack(self, number: int, buffer: Tensor) -> None:
        """Copy a bucket's pieces from the buffer into the parameters; the inverse of `pack`.

        A parameter that is served in float8 is quantized after its last piece.
        """
        if self._on_bucket is not None:
            self._on_bucket(self.channel, number, buffer[: self.buckets[number].num_bytes])
        for piece, parameter, packed in self._places(number, buffer):
            parameter.copy_(packed)
            if isinstance(self._matrices, StagedMatrices):
                self._matrices.written(piece)

    def pieces_of(self, number: int) -> Sequence[Piece]:
        """The pieces of a bucket."""
        bucket = self.buckets[number]
        return self._pieces[bucket.first : bucket.first + len(bucket.offsets)]

    def _places(self, number: int, buffer: Tensor) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        """Each piece of the bucket, with two [rows, columns] views: of the parameter, and of the buffer."""
        itemsize = self._dtype.itemsize
        for piece, offset in zip(self.pieces_of(number), self.buckets[number].offsets, strict=True):
            num_bytes = piece.rows * piece.columns * itemsize
            packed = buffer[offset : offset + num_bytes].view(self._dtype).view(piece.rows, piece.columns)
            rows = slice(piece.row, piece.row + piece.rows)
            yield piece, self._matrices[piece.parameter][rows, piece.column : piece.column + piece.columns], packed


def cut_buckets(pieces: Sequence[Piece], itemsize: int, slot_bytes: int) -> list[Bucket]:
    """The channel's buckets, the same on both ends: pieces in order, as many as fit into a slot, but at least one."""
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


def received_bytes(sources: Mapping[int, Sequence[Piece]], transfer: Transfer) -> int:
    """Bytes of these pieces of an engine rank's parameters, in the transfer's dtype."""
    itemsize = getattr(torch, transfer.dtype).itemsize
    return sum(piece.rows * piece.columns for pieces in sources.values() for piece in pieces) * itemsize
