"""The two transports that carry out a plan, behind one interface; the transfer determines which of them is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_hapo.resharding import process_group, shared_memory
from megatron_hapo.resharding.channel_ends import BucketHook
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
        if transfer.rendezvous is None:
            return shared_memory.send(channels, matrices, transfer, self._memory, on_bucket=self._on_bucket)
        return process_group.send(
            channels, matrices, transfer, self._membership, rank=self._rank, on_bucket=self._on_bucket
        )


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
        if transfer.rendezvous is None:
            return shared_memory.receive(
                sources, matrices, transfer, self._opened,
                engine=engine, engine_rank=engine_rank, on_bucket=self._on_bucket,
            )  # fmt: skip
        return process_group.receive(
            sources, matrices, transfer, self._membership,
            engine=engine, engine_rank=engine_rank, on_bucket=self._on_bucket,
        )  # fmt: skip
