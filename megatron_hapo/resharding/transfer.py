"""One transfer of the weights, as all its ranks know it. `transports` carries it out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_hapo.errors import WeightSyncError


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where all trainer and engine ranks form one process group, if they are on several hosts.

    Pairs of ranks on one host use its shared memory, or that of their GPU; only the others exchange messages.
    """

    host: str
    """Address of a torch TCPStore."""
    port: int
    """Port of that store."""
    generation: int
    """Incremented after a failed sync, whose process group is not used again."""
    trainer_ranks: int
    """Number of trainer ranks."""
    engine_ranks: int
    """Number of ranks of all engines together."""
    ranks_per_engine: int
    """Number of ranks of one engine."""
    backend: str
    """gloo or nccl."""
    hosts: tuple[int, ...]
    """Number of the host of each rank of the group."""

    def engine_rank(self, engine: int, rank: int) -> int:
        """The rank in the process group of rank `rank` of engine `engine`; engine ranks follow the trainer's ranks."""
        return self.trainer_ranks + engine * self.ranks_per_engine + rank

    def on_one_host(self, source_rank: int, engine: int, engine_rank: int) -> bool:
        """Whether a trainer rank and an engine rank share a host."""
        return self.hosts[source_rank] == self.hosts[self.engine_rank(engine, engine_rank)]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One transfer of the weights; all its ranks get the same description."""

    folder: str
    """Folder of the sockets: private to the user, with a short path."""
    number: int
    """Unique among the transfers that use this folder."""
    plan: str
    """Fingerprint of the resharding plan."""
    dtype: str
    """The engines' dtype, by its name in torch."""
    slot_bytes: int
    """Size of each of a channel's two slots; they are larger if a single piece needs it."""
    deadline_seconds: float
    """Time after which the transfer fails if it has not finished."""
    rendezvous: Rendezvous | None = None
    """Set if the ranks are on several hosts; None if all are on one, where the weights go through shared memory."""

    def address(self, engine: int, engine_rank: int) -> str:
        """The Unix socket at which this engine rank accepts connections.

        A path in the folder. With ranks on several hosts a name without a file, since the folder is on one of them: the
        two ends then compare the user of the other one (`shared_memory`).
        """
        name = f"{self.number}.{engine}.{engine_rank}"
        return str(Path(self.folder) / name) if self.rendezvous is None else f"\0{self.folder}/{name}"

    def abort(self) -> None:
        """Mark the transfer as failed for all its ranks on this host."""
        with contextlib.suppress(FileNotFoundError):  # the folder does not exist on the hosts of remote engines
            self._failure_mark.touch()

    def raise_if_aborted(self, phase: str, waiting_for: str) -> None:
        """Return unless the transfer was aborted by another rank.

        Raises:
            TransferStoppedError: it was; says in which phase, and what this rank was waiting for.
        """
        if self._failure_mark.exists():
            raise TransferStoppedError(f"{phase}: stopped because another rank failed; was waiting for {waiting_for}")

    @property
    def _failure_mark(self) -> Path:
        return Path(self.folder) / f"{self.number}.failed"


class TransferStoppedError(WeightSyncError):
    """This rank stopped because another one failed, whose own error gives the cause."""


def as_matrix(tensor: Tensor) -> Tensor:
    """The parameter as a [rows, columns] view of the same storage, in which a plan addresses it.

    Raises:
        WeightSyncError: it is not contiguous, so that the view would be a copy.
    """
    if not tensor.is_contiguous():
        raise WeightSyncError(f"a parameter of shape {tuple(tensor.shape)} is not contiguous")
    return tensor.detach().view(-1, 1) if tensor.ndim == 1 else tensor.detach().view(-1, tensor.shape[-1])
