"""What the driver sees: the trainer, the rollout engines and the path of the weights between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_hapo.types import Prompt, Rollout, Sampling, Score, TokenScores, TrainBatch

if TYPE_CHECKING:
    from megatron_hapo.observe.spans import Timeline
    from megatron_hapo.resharding.plan import Parameter, SendingTask
    from megatron_hapo.resharding.receiving import ReceiveRequest
    from megatron_hapo.resharding.transfer import Transfer


class Trainer(Protocol):
    """The policy being trained, over all its ranks."""

    def log_probs(self, batch: TrainBatch) -> TokenScores:
        """Scores of every response token with the current weights, in batch order."""
        ...

    def update(self, batch: TrainBatch, *, step: int) -> dict[str, float]:
        """One optimizer step on a mini-batch; its metrics."""
        ...

    def weight_buckets(self, *, verify: bool) -> Iterator[Any]:
        """Every tensor of the policy once, as WeightBuckets or references to them, few at a time in memory."""
        ...

    def own_parameters(self) -> list[tuple[Parameter, ...]]:
        """What each rank holds, for a plan."""
        ...

    def sees(self, path: Path) -> bool:
        """Whether every rank has this file before it: whether they share a host with the driver."""
        ...

    def prepare_sending(self, tasks: Sequence[SendingTask]) -> None:
        """Give every rank its part of the plan."""
        ...

    def send_weights(self, transfer: Transfer, *, verify: bool) -> list[dict[str, list[int]] | None]:
        """Every rank sends its pieces; returns what each adds to the checksums of a verified sync."""
        ...

    def save_checkpoint(self, folder: Path) -> None:
        """Model and optimizer state, for `load_checkpoint` at any layout."""
        ...

    def load_checkpoint(self, folder: Path) -> None: ...

    def export_hf(self, folder: Path) -> None:
        """The policy as a Hugging Face folder."""
        ...

    def release_memory(self, parts: Sequence[str]) -> None:
        """Every rank gives these parts of its GPU's memory back; see memory_turns."""
        ...

    def take_memory(self, parts: Sequence[str]) -> None:
        """Every rank takes these parts again, as they were."""
        ...

    def start_profile(self) -> None:
        """Every rank begins to trace its operators and to record what it is asked to do."""
        ...

    def finish_profile(self, folder: Path) -> list[Timeline]:
        """Every rank ends that, and writes its operators into the folder; what each did."""
        ...


class RolloutPool(Protocol):
    """All rollout engines."""

    def wait_until_ready(self) -> None:
        """Returns when every engine has started."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        """A group of `sampling.samples` rollouts for each prompt, in the prompts' order."""
        ...

    def update_weights(self, buckets: Iterator[Any], *, policy_version: int) -> None:
        """Load these weights into every engine; afterwards all tokens are sampled from this version, and carry it."""
        ...

    def sees(self, path: Path) -> bool:
        """Whether every engine has this file before it."""
        ...

    def prepare_receiving(self, plans: Sequence[Sequence[str]]) -> None:
        """Give every engine its ranks' parts of the plan (`resharding.receiving.receiver_plan`)."""
        ...

    def receive_weights(self, requests: Sequence[ReceiveRequest], *, timeout_seconds: float) -> None:
        """Every engine opens an update and fills its parameters from the trainer's ranks, as its request says."""
        ...

    def replace_dead_engines(self, *, patience_seconds: float) -> list[int]:
        """Start new engines for those that died or do not answer in time; their indices."""
        ...

    def finish_update(self, checksums: dict[str, list[int]] | None, *, policy_version: int) -> None:
        """Compare with the checksums, if there are any, and then, on all engines alike, take the new version."""
        ...

    def release_memory(self, parts: Sequence[str]) -> None:
        """Every engine gives these parts of its GPUs' memory back; see memory_turns."""
        ...

    def take_memory(self, parts: Sequence[str]) -> None:
        """Every engine takes these parts again; what they held is lost."""
        ...

    def start_profile(self) -> None:
        """Every engine begins to record what it is asked to do."""
        ...

    def finish_profile(self) -> list[Timeline]:
        """What each engine did."""
        ...


class RewardPool(Protocol):
    """Whatever scores responses."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """A score for each rollout, in their order."""
        ...

    def start_profile(self) -> None:
        """Start recording what each worker does."""
        ...

    def finish_profile(self) -> list[Timeline]:
        """What each worker did since `start_profile`."""
        ...


class WeightSync(Protocol):
    """Brings the trainer's weights into the engines."""

    def sync(self, *, policy_version: int) -> None:
        """After this every engine holds the trainer's weights under this version, or the call has raised."""
        ...
