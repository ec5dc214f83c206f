"""What the driver sees: the trainer, the rollout engines, the rewards and the weight sync.

A verb of the trainer's ranks or of the engines is declared once, as a method of `TrainerShard`, `TrainerWorker` or
`RolloutEngine`, and implemented once, in `trainer.trainer_rank`, `trainer.over_ranks` or `sglang_ext.engine`. Callers
pass the declaration: `pool.broadcast(RolloutEngine.release_memory, parts)`. Everything between (Ray, torchrun) passes
the verb's name on and refuses names that are not declared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Protocol

from megatron_hapo.errors import HapoError, RolloutError, WeightSyncError
from megatron_hapo.types import (
    GroupRequest,
    InFlight,
    Prompt,
    Rollout,
    Sampling,
    Score,
    TokenScores,
    TrainBatch,
    WeightBucket,
)

if TYPE_CHECKING:
    import numpy as np

    from megatron_hapo.observe.spans import Timeline
    from megatron_hapo.resharding.plan import Parameter, SendingTask
    from megatron_hapo.resharding.receiving import ReceiveRequest
    from megatron_hapo.resharding.transfer import Transfer

Finished = tuple[int, int, Rollout]
"""A response: the number of its prompt, its index among the prompt's samples, and the rollout itself."""


def declared_verbs(protocol: type) -> frozenset[str]:
    """Names of all verbs that a protocol of this module declares or inherits."""
    return frozenset(
        name
        for declaring in protocol.__mro__
        for name, member in vars(declaring).items()
        if callable(member) and not name.startswith("_")
    )


def _of_weight_sync[F: Callable[..., Any]](verb: F) -> F:
    """Marks a verb of the weight sync: an engine that dies in it, or is late, is a WeightSyncError."""
    verb.failure = WeightSyncError  # type: ignore[attr-defined]
    return verb


def engine_failure(verb: Callable[..., Any]) -> type[HapoError]:
    """The error to raise when an engine dies in this verb, or does not answer in time."""
    return getattr(verb, "failure", RolloutError)


# ----- trainer


class TrainerShard(Protocol):
    """The verbs of one rank's shard of the policy. All ranks are called alike, and in the same order."""

    def log_probs(self, batch: TrainBatch) -> tuple[list[int], TokenScores] | None:
        """Rows of the batch and their scores with the current weights, on ranks that report; else None."""
        ...

    def reference_log_probs(self, batch: TrainBatch) -> tuple[list[int], np.ndarray] | None:
        """Rows of the batch and the reference model's log-probs of their response tokens, on ranks that report."""
        ...

    def replace_reference(self) -> None:
        """Make the current policy the reference model."""
        ...

    def route_agreement(self) -> tuple[int, int]:
        """Of the experts that `log_probs` has replayed on this rank, how many its routers chose as well, and all."""
        ...

    def update(self, batch: TrainBatch, *, step: int, keep_tokens: bool = False) -> dict[str, float] | None:
        """One optimizer step on a mini-batch; its metrics on ranks of the last stage, else None."""
        ...

    def updated_tokens(self, rows: Sequence[int]) -> tuple[list[int], dict[str, np.ndarray]] | None:
        """What the last update, called with `keep_tokens`, used of the tokens of these rows of its mini-batch; the rows
        and [N] arrays by name, on ranks that report, else None."""
        ...

    def weight_buckets(self, *, verify: bool) -> Iterator[WeightBucket]:
        """Whole HF tensors in buckets, each from one rank; with checksums if this sync is verified. A stream."""
        ...

    def own_parameters(self) -> tuple[Parameter, ...]:
        """The parameters of this rank, in Hugging Face coordinates, from which the plan is made."""
        ...

    def prepare_sending(self, task: SendingTask) -> None:
        """Store this rank's part of the plan, for all `send_weights` to come."""
        ...

    def send_weights(self, transfer: Transfer, *, verify: bool) -> dict[str, list[int]] | None:
        """Send this rank's pieces; returns what it adds to the checksums of a verified sync."""
        ...

    def save_checkpoint(self, folder: Path) -> dict[str, str]:
        """Write this rank's part of model, optimizer state and a replaced reference; the files, with their hashes."""
        ...

    def load_checkpoint(self, folder: Path) -> None:
        """Load model and optimizer state, whatever layout wrote them."""
        ...

    def export_hf(self, folder: Path) -> dict[str, str] | None:
        """Write this rank's part of a Hugging Face folder; tensor name to file name, where it wrote any."""
        ...

    def release_memory(self, parts: Sequence[str]) -> None:
        """Release `gradients` or `optimizer` from the GPU until `take_memory`; see memory_turns."""
        ...

    def take_memory(self, parts: Sequence[str]) -> None:
        """Allocate released parts again, with the content that they had."""
        ...


class TrainerWorker(TrainerShard, Protocol):
    """The verbs of the process that holds a shard."""

    def host(self) -> str:
        """The host of the process (`resharding.hosts.this_host`)."""
        ...

    def damaged_files(self, share: tuple[Path, int, int]) -> list[str]:
        """What a folder's manifest says is wrong with a share of its files: the folder, which share, of how many."""
        ...

    def start_profile(self) -> None:
        """Begin to trace operators and to record the verbs that are called."""
        ...

    def finish_profile(self, folder: Path) -> Timeline:
        """Write the operators since `start_profile` into the folder; returns the recorded verbs."""
        ...


class Trainer(Protocol):
    """The policy being trained, over all its ranks."""

    def log_probs(self, batch: TrainBatch) -> TokenScores:
        """Scores of every response token with the current weights, in batch order."""
        ...

    def reference_log_probs(self, batch: TrainBatch) -> np.ndarray:
        """The reference model's log-probs of every response token at the base temperature, in batch order. [N]"""
        ...

    def replace_reference(self) -> None:
        """Make the current policy the reference model."""
        ...

    def route_agreement(self) -> float:
        """Share of the experts replayed by `log_probs`, since the last call, that the routers would have chosen."""
        ...

    def update(self, batch: TrainBatch, *, step: int, keep_tokens: bool = False) -> dict[str, float]:
        """One optimizer step on a mini-batch; its metrics. Its ranks keep the tokens' values for `updated_tokens`."""
        ...

    def updated_tokens(self, rows: Sequence[int]) -> list[tuple[list[int], dict[str, np.ndarray]]]:
        """What the last update used of the tokens of these rows, in parts: rows of each, and [N] arrays by name."""
        ...

    def weight_buckets(self, *, verify: bool) -> Iterator[Any]:
        """Every tensor of the policy once, as WeightBuckets or references to them, few at a time in memory."""
        ...

    def save_checkpoint(self, folder: Path) -> dict[str, str]:
        """Write model and optimizer state, for `load_checkpoint` at any layout; large files, with their hashes."""
        ...

    def load_checkpoint(self, folder: Path) -> None:
        """Load what `save_checkpoint` has written."""
        ...

    def damaged_files(self, folder: Path) -> list[str]:
        """What a folder's manifest says is wrong with its files, which the ranks share among themselves to read."""
        ...

    def export_hf(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        ...

    def broadcast[**P, R](
        self, verb: Callable[Concatenate[TrainerWorker, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> list[R]:
        """Call this verb with the same arguments on every rank; the results, in the order of ranks."""
        ...

    def scatter[A, R](self, verb: Callable[[TrainerWorker, A], R], arguments: Sequence[A]) -> list[R]:
        """Call this verb on every rank, each with an argument of its own; the results, in the order of ranks."""
        ...


# ----- rollouts


class RolloutEngine(Protocol):
    """The verbs of one rollout engine."""

    def advance(self, call: int, requests: Mapping[int, GroupRequest]) -> list[Finished]:
        """Start the responses of these groups, and wait until one of the call's has finished.

        Args:
            call: the generation call to which the responses belong. It advances until it has all of them, in one
                thread at a time.
            requests: by number; responses come back under the same number.
        Returns:
            The call's responses that have finished since it last advanced, at least one.
        """
        ...

    @_of_weight_sync
    def begin_weight_update(self, in_flight: InFlight | None = None) -> None:
        """Open an update: no token is sampled until its end. Does nothing if a failed update is still open.

        Args:
            in_flight: what becomes of unfinished responses; None: as the engine was configured. See
                config.WeightSyncConfig.in_flight.
        """
        ...

    @_of_weight_sync
    def load_bucket(self, bucket: WeightBucket) -> None:
        """Load whole tensors under their Hugging Face names; the bucket's checksums are compared at the end."""
        ...

    @_of_weight_sync
    def host(self) -> str:
        """The host of all ranks of the engine (`resharding.hosts.this_host`)."""
        ...

    @_of_weight_sync
    def prepare_receiving(self, plans: Sequence[str]) -> None:
        """Store each rank's part of the plan (`resharding.receiving.receiver_plan`), for all `receive_weights`."""
        ...

    @_of_weight_sync
    def receive_weights(self, request: ReceiveRequest) -> None:
        """Open an update, unless one is open, and fill every rank's parameters from the trainer ranks."""
        ...

    @_of_weight_sync
    def verify(self, checksums: dict[str, list[int]]) -> None:
        """Compare what every rank's parameters hold with these checksums, in an open update.

        Args:
            checksums: for each Hugging Face name, `tensor_checksum` of each rank's slice (`checksum.engine_slices`).
        """
        ...

    @_of_weight_sync
    def end_weight_update(self, policy_version: int) -> None:
        """Close the update: the engine now holds this version, and nothing cached from another."""
        ...

    @_of_weight_sync
    def resume(self) -> None:
        """Let responses continue that an update has paused, once all engines hold the new weights."""
        ...

    def release_memory(self, parts: Sequence[str]) -> None:
        """Release `kv_cache` or `weights` from the GPUs until `take_memory`; the content is lost. See memory_turns."""
        ...

    def take_memory(self, parts: Sequence[str]) -> None:
        """Allocate released parts again, without their content."""
        ...

    def start_profile(self) -> None:
        """Begin to record the verbs that are called."""
        ...

    def finish_profile(self) -> Timeline:
        """The verbs recorded since `start_profile`."""
        ...


class RolloutPool(Protocol):
    """All rollout engines."""

    def wait_until_ready(self) -> None:
        """Returns when every engine has started."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        """A group of `sampling.samples` rollouts for each prompt, in the prompts' order. Survives an engine's death."""
        ...

    def stream(self, requests: Callable[[], GroupRequest | None]) -> Iterator[tuple[GroupRequest, list[Rollout]]]:
        """Groups as they finish, in no particular order; survives an engine's death.

        Args:
            requests: asked whenever an engine has room for another group; None: there is none now. The stream ends
                when every group has finished and there is none.
        """
        ...

    def broadcast[**P, R](
        self, verb: Callable[Concatenate[RolloutEngine, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> list[R]:
        """Call this verb with the same arguments on every engine; the results, in the order of engines."""
        ...

    def scatter[A, R](
        self,
        verb: Callable[[RolloutEngine, A], R],
        arguments: Sequence[A],
        *,
        timeout_seconds: float | None = None,
    ) -> list[R]:
        """Call this verb on every engine, each with an argument of its own; the results, in the order of engines.

        Args:
            timeout_seconds: None: that of all other verbs.
        """
        ...

    def weight_update(self, *, policy_version: int) -> AbstractContextManager[None]:
        """Encloses what brings new weights into the engines. At its end all engines take this version and resume.

        If the body raises, the update stays open and no engine takes the version; another may follow.
        """
        ...

    def replace_dead_engines(self, *, patience_seconds: float) -> list[int]:
        """Start new engines for those that died or do not answer in time; their indices."""
        ...

    @property
    def new_engines(self) -> list[int]:
        """Indices of the engines started since the last complete `weight_update`.

        They know no plan and hold no weights, so `generate` does not use them before the next.
        """
        ...

    @property
    def waits_for_sync(self) -> bool:
        """Whether a `generate` call in another thread cannot go on before the next sync, since no engine is left."""
        ...

    def restore_with(self, restore: Callable[[], bool]) -> None:
        """Set what `generate` calls when no engine is left: it brings the current weights into new engines, or returns
        False where another thread will."""
        ...


class RewardPool(Protocol):
    """Whatever scores responses."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """A score for each rollout, in their order."""
        ...

    def start_profile(self) -> None:
        """Begin to record what each worker does."""
        ...

    def finish_profile(self) -> list[Timeline]:
        """What each worker did since `start_profile`."""
        ...


class WeightSync(Protocol):
    """Brings the trainer's weights into the engines."""

    def sync(self, *, policy_version: int) -> None:
        """After this every engine holds the trainer's weights under this version, or the call has raised."""
        ...
