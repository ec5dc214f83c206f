"""The trainer as Ray actors, one a rank."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_hapo.config import Config
from megatron_hapo.errors import RankDiedError, TrainingError
from megatron_hapo.launch.places import GpuPlacement
from megatron_hapo.launch.ray.remote import gather, items, shared
from megatron_hapo.model import rank_environment
from megatron_hapo.observe.running_stages import WorkCount
from megatron_hapo.trainer import rank_process
from megatron_hapo.trainer.over_ranks import RankObject, TrainerOverRanks


class TrainerActor:
    """Holds a trainer rank and passes verbs on by name."""

    def placement(self) -> GpuPlacement:
        """This node, and the one GPU that Ray has given to this process."""
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return GpuPlacement(ray.get_runtime_context().get_node_id(), (gpus,) if gpus else ())

    def start(
        self, config: Config, device: str, rank: int, world_size: int, init_method: str, count_file: Path | None
    ) -> None:
        """Builds the rank; all ranks are started together.

        Args:
            count_file: where this rank says how far it is; None: nowhere.
        """
        shard = rank_process.start_rank(
            config, device=device, rank=rank, world_size=world_size, init_method=init_method
        )
        shard.count = WorkCount(count_file)
        self._rank = RankObject(shard, rank)

    def call(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """What this verb of protocols.TrainerWorker returns."""
        return next(self._rank.results(verb, args, kwargs))

    def stream(self, verb: str, **kwargs: Any) -> Iterator[Any]:
        """What this verb yields, one after another."""
        yield from self._rank.results(verb, (), kwargs)


class RankProcesses:
    """A Ray actor a rank, with its GPU, before it builds anything; all on this node, with a file as rendezvous."""

    def __init__(self, config: Config, *, device: str):
        actor: Any = ray.remote(TrainerActor).options(
            num_cpus=0,
            num_gpus=1 if device == "cuda" else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
            runtime_env={
                "env_vars": rank_environment.environment(
                    device, loopback="RAY_ADDRESS" not in os.environ, deterministic=config.deterministic
                )
            },
        )
        self.device = device
        self.actors: list[Any] = [actor.remote() for _ in range(config.parallel.world_size)]
        self._timeout_seconds = config.trainer.timeout_seconds

    def gather(self, references: list[ray.ObjectRef], what: str) -> list[Any]:
        """The result of each rank's call; RankDiedError if a rank died, TrainingError if one is late."""
        calls = {f"trainer rank {rank}": reference for rank, reference in enumerate(references)}
        return gather(calls, timeout_seconds=self._timeout_seconds, what=what, error=TrainingError, died=RankDiedError)

    def items(self, streams: list[ray.ObjectRefGenerator], what: str) -> Iterator[ray.ObjectRef]:
        """What the ranks' streams yield, rank after rank; errors as those of `gather`."""
        calls = {f"trainer rank {rank}": stream for rank, stream in enumerate(streams)}
        return items(calls, timeout_seconds=self._timeout_seconds, what=what, error=TrainingError, died=RankDiedError)

    def placements(self) -> list[GpuPlacement]:
        """The placement of each rank."""
        return self.gather([actor.placement.remote() for actor in self.actors], "starting the trainer's processes")


class RayTrainer(TrainerOverRanks):
    """protocols.Trainer over Ray actors, whose ranks have been built when the constructor returns."""

    def __init__(self, config: Config, processes: RankProcesses):
        super().__init__(config)
        self._scratch = tempfile.TemporaryDirectory(prefix="megatron-hapo-")
        self._processes, self._actors, self._gather = processes, processes.actors, processes.gather
        count_file = Path(self._scratch.name) / "count"
        self._count = WorkCount(count_file)  # all ranks are on this host
        init_method, world_size = rank_environment.rendezvous_file(Path(self._scratch.name)), len(self._actors)
        self._gather(
            [
                actor.start.remote(
                    config, processes.device, rank, world_size, init_method, count_file if rank == 0 else None
                )
                for rank, actor in enumerate(self._actors)
            ],
            "starting the trainer",
        )

    def position(self) -> tuple[int, int]:
        """See TrainerOverRanks."""
        return self._count.read()

    def weight_buckets(self, *, verify: bool) -> Iterator[ray.ObjectRef]:
        # Generators start together, and each waits after two buckets until those have been taken.
        streaming = {"num_returns": "streaming", "_generator_backpressure_num_objects": 2}
        streams = [actor.stream.options(**streaming).remote("weight_buckets", verify=verify) for actor in self._actors]
        yield from self._processes.items(streams, "weight_buckets")

    def close(self) -> None:
        """Ends the ranks' processes."""
        for actor in self._actors:
            ray.kill(actor)
        self._scratch.cleanup()

    def _all(self, verb: str, *arguments: Any, **options: Any) -> list[Any]:
        arguments = tuple(shared(value) for value in arguments)
        return self._gather([actor.call.remote(verb, *arguments, **options) for actor in self._actors], verb)

    def _each(self, verb: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        calls = [actor.call.remote(verb, *own) for actor, own in zip(self._actors, arguments, strict=True)]
        return self._gather(calls, verb)
