"""The trainer as the driver sees it, over ranks that a launcher has started."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate

import numpy as np
import torch

from megatron_hapo.checkpoint.manifest import damaged_files
from megatron_hapo.checkpoint.model_folder import atomic_folder, copy_companions, finish_folder
from megatron_hapo.config import Config
from megatron_hapo.observe import running_stages
from megatron_hapo.observe.spans import SpanRecorder, Timeline
from megatron_hapo.protocols import TrainerShard, TrainerWorker, declared_verbs
from megatron_hapo.resharding.hosts import this_host
from megatron_hapo.types import TokenScores, TrainBatch, merge_scores, merge_tokens

_SHARD_VERBS = declared_verbs(TrainerShard)
_VERBS = declared_verbs(TrainerWorker)


class RankObject:
    """A rank's process from outside: the verbs of protocols.TrainerWorker, called by name.

    The rank implements those of protocols.TrainerShard, which are recorded in profiles; this class the others.
    """

    def __init__(self, rank: TrainerShard, number: int):
        self._rank, self._number, self._spans = rank, number, SpanRecorder(f"trainer rank {number}")
        self._trace: torch.profiler.profile | None = None

    def results(self, verb: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Iterator[Any]:
        """The one result of a verb, or everything that it yields if it is a stream.

        Raises:
            ValueError: the protocol declares no such verb.
        """
        if verb not in _VERBS:
            raise ValueError(f"a trainer rank has no verb {verb!r}; its verbs are {', '.join(sorted(_VERBS))}")
        if verb not in _SHARD_VERBS:
            yield getattr(self, verb)(*arguments, **options)
            return
        method = getattr(self._rank, verb)
        if inspect.isgeneratorfunction(method):
            with self._spans(verb):
                yield from method(*arguments, **options)
            return
        with self._spans(verb), torch.profiler.record_function(verb):
            result = method(*arguments, **options)
        yield result

    def host(self) -> str:
        """This process's host."""
        return this_host()

    def damaged_files(self, share: tuple[Path, int, int]) -> list[str]:
        """What a folder's manifest says is wrong with a share of its files."""
        folder, number, num_shares = share
        return damaged_files(folder, share=number, num_shares=num_shares)

    def start_profile(self) -> None:
        """Begin to trace operators and to record the verbs that are called."""
        self._trace = torch.profiler.profile()
        self._trace.start()
        self._spans.start()

    def finish_profile(self, folder: Path) -> Timeline:
        """Writes the operators since `start_profile` as a gzipped Chrome trace; returns the recorded verbs."""
        assert self._trace is not None, "finish_profile requires start_profile"
        timeline = self._spans.finish()
        self._trace.stop()
        self._trace.export_chrome_trace(str(folder / f"trainer_rank_{self._number:05d}.json.gz"))
        self._trace = None
        return timeline


class TrainerOverRanks(ABC):
    """protocols.Trainer; a launcher's subclass says how verbs reach its ranks."""

    def __init__(self, config: Config):
        self._config = config

    @abstractmethod
    def _all(self, verb: str, *arguments: Any, **options: Any) -> list[Any]:
        """The verb's result on every rank, called with the same arguments."""

    @abstractmethod
    def _each(self, verb: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The verb's result on every rank, called with arguments of its own."""

    @abstractmethod
    def position(self) -> tuple[int, int]:
        """How many micro-batches of the running verb are done on the first rank, and of how many; 0 if it has none."""

    @abstractmethod
    def weight_buckets(self, *, verify: bool) -> Iterator[Any]:
        """Every tensor of the policy once, in buckets, or references to them, rank after rank."""

    def broadcast[**P, R](
        self, verb: Callable[Concatenate[TrainerWorker, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> list[R]:
        """The verb's results, in the order of ranks."""
        return self._all(verb.__name__, *args, **kwargs)

    def scatter[A, R](self, verb: Callable[[TrainerWorker, A], R], arguments: Sequence[A]) -> list[R]:
        """The verb's results, in the order of ranks, each called with an argument of its own."""
        return self._each(verb.__name__, [(argument,) for argument in arguments])

    def log_probs(self, batch: TrainBatch) -> TokenScores:
        """Scores of every response token with the current weights, in batch order."""
        running_stages.follow(self.position)
        return merge_scores(self.broadcast(TrainerWorker.log_probs, batch), batch)

    def reference_log_probs(self, batch: TrainBatch) -> np.ndarray:
        """The reference model's log-probs of every response token, in batch order. [N] float32"""
        running_stages.follow(self.position)
        parts = self.broadcast(TrainerWorker.reference_log_probs, batch)
        named = [(part[0], {"log_probs": part[1]}) for part in parts if part is not None]
        return merge_tokens(named, batch.response_lengths)["log_probs"]

    def replace_reference(self) -> None:
        """Makes the current policy the reference model."""
        self.broadcast(TrainerWorker.replace_reference)

    def route_agreement(self) -> float:
        """Share of the experts replayed by `log_probs`, since the last call, that the routers would have chosen."""
        counts = self.broadcast(TrainerWorker.route_agreement)
        return sum(agreeing for agreeing, _ in counts) / sum(known for _, known in counts)

    def update(self, batch: TrainBatch, *, step: int, keep_tokens: bool = False) -> dict[str, float]:
        """One optimizer step on a mini-batch; its metrics."""
        running_stages.follow(self.position)
        results = self.broadcast(TrainerWorker.update, batch, step=step, keep_tokens=keep_tokens)
        return next(metrics for metrics in results if metrics is not None)

    def updated_tokens(self, rows: Sequence[int]) -> list[tuple[list[int], dict[str, np.ndarray]]]:
        """What the last update kept of these rows, in parts."""
        parts = self.broadcast(TrainerWorker.updated_tokens, list(rows))
        return [part for part in parts if part is not None]

    def save_checkpoint(self, folder: Path) -> dict[str, str]:
        """Writes model, optimizer state and a replaced reference; the hashes of the files that the ranks have
        written."""
        parts = self.broadcast(TrainerWorker.save_checkpoint, folder)
        # With these the checkpoint is a model folder too: another run may start from it, and `convert` reads it.
        copy_companions(self._config.model.path, folder, self._config.trainer.dtype)
        return {name: value for part in parts for name, value in part.items()}

    def load_checkpoint(self, folder: Path) -> None:
        """Loads what `save_checkpoint` has written, at any layout."""
        self.broadcast(TrainerWorker.load_checkpoint, folder)

    def damaged_files(self, folder: Path) -> list[str]:
        """What a folder's manifest says is wrong with its files, each rank reading a share of them."""
        world_size = self._config.parallel.world_size
        found = self.scatter(TrainerWorker.damaged_files, [(folder, rank, world_size) for rank in range(world_size)])
        return sorted({fault for part in found for fault in part})

    def export_hf(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face folder, which appears when it is complete."""
        with atomic_folder(folder) as partial:
            parts = self.broadcast(TrainerWorker.export_hf, partial)
            weight_map = {name: file for part in parts if part for name, file in part.items()}
            finish_folder(partial, self._config.model.path, weight_map, self._config.trainer.dtype)
