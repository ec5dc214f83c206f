"""The two ways in which a plan is carried out, behind one interface; the transfer says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_hapo.resharding import process_group, transfer
from megatron_hapo.resharding.plan import Channel, Piece


class Sender:
    """A trainer rank's end; keeps what is worth keeping from one sync to the next."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._memory, self._member = transfer.SlotMemory(), process_group.Membership()

    def send(self, channels: Sequence[Channel], matrices: Mapping[str, Tensor], sync: transfer.Transfer) -> int:
        """Send everything of this rank's channels; the bytes that went. See `transfer.send`."""
        if sync.meeting is None:
            return transfer.send(channels, matrices, sync, self._memory)
        return process_group.send(channels, matrices, sync, self._member, rank=self._rank)


class Receiver:
    """An engine rank's end."""

    def __init__(self) -> None:
        self._opened: dict[str, Tensor] = {}
        self._member = process_group.Membership()

    def receive(
        self,
        sources: Mapping[int, Sequence[Piece]],
        matrices: Mapping[str, Tensor],
        sync: transfer.Transfer,
        *,
        engine: int,
        engine_rank: int,
    ) -> int:
        """Fill the rank's parameters with what all trainer ranks send; the bytes that came. See `transfer.receive`."""
        if sync.meeting is None:
            return transfer.receive(sources, matrices, sync, self._opened, engine=engine, engine_rank=engine_rank)
        return process_group.receive(sources, matrices, sync, self._member, engine=engine, engine_rank=engine_rank)
