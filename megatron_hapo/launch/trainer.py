"""The trainer as Ray actors, one a rank."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from megatron_hapo.checkpoint.folder import copy_companions, finish_folder, whole_or_nothing
from megatron_hapo.config import Config
from megatron_hapo.errors import TrainingError
from megatron_hapo.launch import rank as rank_process
from megatron_hapo.launch.remote import gather
from megatron_hapo.resharding.plan import Parameter, SendingTask
from megatron_hapo.resharding.transfer import Transfer
from megatron_hapo.types import TokenScores, TrainBatch, WeightBucket, merge_scores


class TrainerActor:
    """Holds a TrainerRank and forwards."""

    def start(self, config: Config, device: str, rank: int, world_size: int, init_method: str) -> None:
        self._rank = rank_process.start_rank(
            config, device=device, rank=rank, world_size=world_size, init_method=init_method
        )

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._rank, method)(*args, **kwargs)

    def sees(self, path: Path) -> bool:
        return path.exists()

    def weight_buckets(self, *, verify: bool) -> Iterator[WeightBucket]:
        yield from self._rank.weight_buckets(verify=verify)


class RayTrainer:
    """protocols.Trainer over Ray actors; all on this node for now."""

    def __init__(self, config: Config, *, device: str):
        self._config = config
        self._scratch = tempfile.TemporaryDirectory(prefix="megatron-hapo-")
        world_size = config.parallel.world_size
        actor: Any = ray.remote(TrainerActor).options(
            num_cpus=0,
            num_gpus=1 if device == "cuda" else 0,
            runtime_env={"env_vars": rank_process.environment(device, loopback=True)},
        )
        self._actors: list[Any] = [actor.remote() for _ in range(world_size)]
        init_method = rank_process.rendezvous_file(Path(self._scratch.name))
        self._gather(
            [a.start.remote(config, device, rank, world_size, init_method) for rank, a in enumerate(self._actors)],
            "starting the trainer",
        )

    def log_probs(self, batch: TrainBatch) -> TokenScores:
        return merge_scores(self._all("log_probs", ray.put(batch)), batch)

    def update(self, batch: TrainBatch, *, step: int) -> dict[str, float]:
        return next(metrics for metrics in self._all("update", ray.put(batch), step=step) if metrics is not None)

    def weight_buckets(self, *, verify: bool) -> Iterator[ray.ObjectRef]:
        # Generators start together and stop after two buckets each until those are taken.
        streaming = {"num_returns": "streaming", "_generator_backpressure_num_objects": 2}
        streams = [actor.weight_buckets.options(**streaming).remote(verify=verify) for actor in self._actors]
        for stream in streams:
            yield from stream

    def own_parameters(self) -> list[tuple[Parameter, ...]]:
        return self._all("own_parameters")

    def sees(self, path: Path) -> bool:
        return all(self._gather([actor.sees.remote(path) for actor in self._actors], "looking for a shared folder"))

    def prepare_sending(self, tasks: Sequence[SendingTask]) -> None:
        calls = [actor.call.remote("prepare_sending", task) for actor, task in zip(self._actors, tasks, strict=True)]
        self._gather(calls, "preparing to send weights")

    def send_weights(self, transfer: Transfer, *, verify: bool) -> list[dict[str, list[int]] | None]:
        return self._all("send_weights", transfer, verify=verify)

    def save_checkpoint(self, folder: Path) -> None:
        self._all("save_checkpoint", folder)
        # With these the checkpoint is a model folder too: another run may start from it, and `convert` takes it.
        copy_companions(self._config.model.path, folder, self._config.trainer.dtype)

    def load_checkpoint(self, folder: Path) -> None:
        self._all("load_checkpoint", folder)

    def export_hf(self, folder: Path) -> None:
        with whole_or_nothing(folder) as partial:
            parts = self._all("export_hf", partial)
            weight_map = {name: file for part in parts if part for name, file in part.items()}
            finish_folder(partial, self._config.model.path, weight_map, self._config.trainer.dtype)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._scratch.cleanup()

    def _all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return self._gather([actor.call.remote(method, *args, **kwargs) for actor in self._actors], method)

    def _gather(self, references: list[ray.ObjectRef], what: str) -> list[Any]:
        calls = {f"trainer rank {rank}": reference for rank, reference in enumerate(references)}
        return gather(calls, timeout_seconds=self._config.trainer.timeout_seconds, what=what, error=TrainingError)
