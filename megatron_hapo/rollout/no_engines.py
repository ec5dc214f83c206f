"""The parts of a run without engines: nothing is sampled, nothing is scored, and no weights are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron_hapo.errors import RewardError, RolloutError
from megatron_hapo.observe.spans import Timeline
from megatron_hapo.types import GroupRequest, Prompt, Rollout, Sampling, Score


class NoEngines:
    """protocols.RolloutPool of no engine."""

    @property
    def new_engines(self) -> list[int]:
        """None is new."""
        return []

    @property
    def waits_for_sync(self) -> bool:
        """Nothing waits."""
        return False

    def wait_until_ready(self) -> None:
        """Nothing to wait for."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        """Raises RolloutError."""
        raise RolloutError("this run has no engines")

    def stream(self, requests: Callable[[], GroupRequest | None]) -> Iterator[tuple[GroupRequest, list[Rollout]]]:
        """Raises RolloutError."""
        raise RolloutError("this run has no engines")

    def broadcast(self, verb: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """No results."""
        return []

    def scatter(
        self, verb: Callable[..., Any], arguments: Sequence[Any], *, timeout_seconds: float | None = None
    ) -> list[Any]:
        """No results."""
        return []

    def weight_update(self, *, policy_version: int) -> AbstractContextManager[None]:
        """Encloses nothing."""
        return nullcontext()

    def replace_dead_engines(self, *, patience_seconds: float) -> list[int]:
        """None has died."""
        return []

    def restore_with(self, restore: Callable[[], bool]) -> None:
        """Is never called for."""


class NoRewards:
    """protocols.RewardPool of no worker."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Raises RewardError."""
        raise RewardError("this run has no reward workers")

    def start_profile(self) -> None:
        """Nothing to record."""

    def finish_profile(self) -> list[Timeline]:
        """No worker."""
        return []


class NoWeightSync:
    """protocols.WeightSync to no engine."""

    def sync(self, *, policy_version: int) -> None:
        """Nothing to send."""
