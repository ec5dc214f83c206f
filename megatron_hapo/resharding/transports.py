"""The two transports that carry out a plan, behind one interface, and which of them carries which channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from megatron_hapo.resharding import process_group, shared_memory
from megatron_hapo.resharding.channel_ends import BucketHook, ChannelId
from megatron_hapo.resharding.plan import Channel, Piece
from megatron_hapo.resharding.transfer import Transfer


class Sender:
    """Sends a trainer rank's weights; keeps memory and connections from one transfer to the next.

    Args:
        rank: the trainer rank.
        on_bucket: for tests, see `BucketHook`.
    """

    def __init__(self, rank: int, *, on_bucket: BucketHook | None = None) -> None:
        self._rank, self._on_bucket = rank, on_bucket
        self._memory, self._membership = shared_memory.SlotMemory(), process_group.Membership()

    def send(self, channels: Sequence[Channel], matrices: Mapping[str, Tensor], transfer: Transfer) -> int:
        """Send everything of these channels; returns the bytes sent, including padding.

        Args:
            channels: the channels that start at this rank.
            matrices: the rank's local parameters, each [rows, columns], of any float dtype.
        Raises:
            WeightSyncError: a receiver is late, or failed.
        """
        near, far = _by_host(channels, transfer)
        within_host = partial(shared_memory.send, near, matrices, transfer, self._memory, on_bucket=self._on_bucket)
        if transfer.rendezvous is None:
            return within_host()
        return process_group.send(
            far, matrices, transfer, self._membership,
            rank=self._rank, within_host=within_host, on_bucket=self._on_bucket,
        )  # fmt: skip


class Receiver:
    """Receives an engine rank's weights; keeps memory and connections from one transfer to the next.

    Args:
        on_bucket: for tests, see `BucketHook`.
    """

    def __init__(self, *, on_bucket: BucketHook | None = None) -> None:
        self._on_bucket = on_bucket
        self._opened: dict[str, Tensor] = {}
        self._membership = process_group.Membership()

    def receive(
        self,
        sources: Mapping[int, Sequence[Piece]],
        matrices: Mapping[str, Tensor],
        transfer: Transfer,
        *,
        engine: int,
        engine_rank: int,
    ) -> int:
        """Fill an engine rank's parameters with what all trainer ranks send; returns the bytes received.

        Args:
            sources: for each trainer rank, the pieces of this rank's parameters that it sends, in the plan's order.
            matrices: the engine rank's parameters, each [rows, columns], in the transfer's dtype.
            engine: index of the engine.
            engine_rank: rank within the engine.
        Raises:
            WeightSyncError: a sender is late, failed, or has another plan.
        """
        near = {
            rank: pieces
            for rank, pieces in sources.items()
            if is_within_host(ChannelId(rank, engine, engine_rank), transfer)
        }
        within_host = partial(
            shared_memory.receive, near, matrices, transfer, self._opened,
            engine=engine, engine_rank=engine_rank, on_bucket=self._on_bucket,
        )  # fmt: skip
        if transfer.rendezvous is None:
            return within_host()
        far = {rank: pieces for rank, pieces in sources.items() if rank not in near}
        return process_group.receive(
            far, matrices, transfer, self._membership,
            engine=engine, engine_rank=engine_rank, within_host=within_host, on_bucket=self._on_bucket,
        )  # fmt: skip


def is_within_host(channel: ChannelId, transfer: Transfer) -> bool:
    """Whether a channel's ends share a host, and use its memory or that of their GPU; the others exchange messages."""
    return transfer.rendezvous is None or transfer.rendezvous.on_one_host(*channel)


def _by_host(channels: Sequence[Channel], transfer: Transfer) -> tuple[list[Channel], list[Channel]]:
    """The channels within a host, and those between hosts."""
    parts: tuple[list[Channel], list[Channel]] = ([], [])
    for channel in channels:
        parts[not is_within_host(ChannelId.of(channel), transfer)].append(channel)
    return parts
