"""The trainer as the driver sees it, over ranks that some launcher started."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_hapo.checkpoint.model_folder import atomic_folder, copy_companions, finish_folder
from megatron_hapo.config import Config
from megatron_hapo.observe.spans import SpanRecorder, Timeline
from megatron_hapo.types import TokenScores, TrainBatch, merge_scores

if TYPE_CHECKING:
    from megatron_hapo.resharding.plan import Parameter, SendingTask
    from megatron_hapo.resharding.transfer import Transfer
    from megatron_hapo.trainer.trainer_rank import TrainerRank

_STREAMS = ("weight_buckets",)
_METHODS = (
    *("log_probs", "update", "own_parameters", "prepare_sending", "send_weights"),
    *("save_checkpoint", "load_checkpoint", "export_hf"),
    *("release_memory", "take_memory"),
)
_OF_THE_PROCESS = ("sees", "start_profile", "finish_profile")


class RankObject:
    """A rank's process from outside: the TrainerRank's methods by name, and what only the process knows."""

    def __init__(self, rank: TrainerRank, number: int):
        self._rank, self._spans = rank, SpanRecorder(f"trainer rank {number}")
        self._trace: torch.profiler.profile | None = None

    def results(self, method: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Iterator[Any]:
        """The one result of a method, or what a generator yields."""
        if method in _OF_THE_PROCESS:
            yield getattr(self, method)(*arguments)
        elif method in _STREAMS:
            with self._spans(method):
                yield from getattr(self._rank, method)(*arguments, **options)
        elif method in _METHODS:
            with self._spans(method), torch.profiler.record_function(method):
                result = getattr(self._rank, method)(*arguments, **options)
            yield result
        else:
            raise ValueError(f"a trainer rank has no command {method!r}")

    def sees(self, path: Path) -> bool:
        return path.exists()

    def start_profile(self) -> None:
        self._trace = torch.profiler.profile()
        self._trace.start()
        self._spans.start()

    def finish_profile(self, path: Path) -> Timeline:
        """Writes the operators since `start_profile` as a gzipped Chrome trace; what the rank was asked to do."""
        assert self._trace is not None, "start_profile comes first"
        timeline = self._spans.finish()
        self._trace.stop()
        self._trace.export_chrome_trace(str(path))
        self._trace = None
        return timeline


class TrainerOverRanks(ABC):
    """protocols.Trainer; a launcher says how its ranks are called."""

    def __init__(self, config: Config):
        self._config = config

    @abstractmethod
    def _all(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        """What every rank's method returns."""

    @abstractmethod
    def _each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The same, with arguments for each rank."""

    @abstractmethod
    def weight_buckets(self, *, verify: bool) -> Iterator[Any]: ...

    def log_probs(self, batch: TrainBatch) -> TokenScores:
        return merge_scores(self._all("log_probs", batch), batch)

    def update(self, batch: TrainBatch, *, step: int) -> dict[str, float]:
        return next(metrics for metrics in self._all("update", batch, step=step) if metrics is not None)

    def own_parameters(self) -> list[tuple[Parameter, ...]]:
        return self._all("own_parameters")

    def sees(self, path: Path) -> bool:
        return all(self._all("sees", path))

    def prepare_sending(self, tasks: Sequence[SendingTask]) -> None:
        self._each("prepare_sending", [(task,) for task in tasks])

    def send_weights(self, transfer: Transfer, *, verify: bool) -> list[dict[str, list[int]] | None]:
        return self._all("send_weights", transfer, verify=verify)

    def save_checkpoint(self, folder: Path) -> None:
        self._all("save_checkpoint", folder)
        # With these the checkpoint is a model folder too: another run may start from it, and `convert` takes it.
        copy_companions(self._config.model.path, folder, self._config.trainer.dtype)

    def load_checkpoint(self, folder: Path) -> None:
        self._all("load_checkpoint", folder)

    def release_memory(self, parts: Sequence[str]) -> None:
        self._all("release_memory", tuple(parts))

    def take_memory(self, parts: Sequence[str]) -> None:
        self._all("take_memory", tuple(parts))

    def export_hf(self, folder: Path) -> None:
        with atomic_folder(folder) as partial:
            parts = self._all("export_hf", partial)
            weight_map = {name: file for part in parts if part for name, file in part.items()}
            finish_folder(partial, self._config.model.path, weight_map, self._config.trainer.dtype)

    def start_profile(self) -> None:
        self._all("start_profile")

    def finish_profile(self, folder: Path) -> list[Timeline]:
        ranks = range(self._config.parallel.world_size)
        return self._each("finish_profile", [(folder / f"trainer_rank_{rank:05d}.json.gz",) for rank in ranks])
