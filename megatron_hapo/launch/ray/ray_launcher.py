"""The launcher of a run that torchrun did not start: trainer ranks and engines are Ray actors, placed by Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import ray

from megatron_hapo.checks.machine import check_gpus
from megatron_hapo.config import Config
from megatron_hapo.launch.places import GpuPlacement, beside_ranks
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.launch.ray.rank_actors import RankProcesses, RayTrainer


class RayLauncher:
    """run.Launcher with Ray alone.

    Args:
        device: cpu or cuda.
        advice: what the user can do if Ray dies; None: run the command again.
    """

    def __init__(self, config: Config, *, device: str, advice: str | None = None):
        self._config, self.device = config, device
        self._advice = {} if advice is None else {"advice": advice}
        self._processes: RankProcesses | None = None

    @contextlib.contextmanager
    def ray_cluster(self) -> Iterator[None]:
        """Ray, with the processes of the trainer's ranks, while the context is open."""
        with local_ray(self._config.launch.start_timeout_seconds, **self._advice):
            if self.device == "cuda":
                everywhere = int(ray.cluster_resources().get("GPU", 0))
                check_gpus(self._config, here=_gpus_of_this_node(), everywhere=everywhere)
            # Before the engines, which Ray might otherwise place on the GPUs that the ranks need.
            self._processes = RankProcesses(self._config, device=self.device)
            yield

    def engine_placements(self) -> list[GpuPlacement] | None:
        """The placement of each colocated engine; None leaves it to Ray."""
        if self._config.placement == "disaggregated":
            return None
        assert self._processes is not None, "Ray is not up"
        rollout = self._config.rollout
        return beside_ranks(self._processes.placements(), engines=rollout.engines, tp=rollout.tp)

    def start_trainer(self) -> RayTrainer:
        """The trainer, with its ranks built."""
        assert self._processes is not None, "Ray is not up"
        return RayTrainer(self._config, self._processes)

    def running(self) -> AbstractContextManager[object]:
        """Nothing more to do while the trainer is in use."""
        return contextlib.nullcontext()


def _gpus_of_this_node() -> int:
    own = ray.get_runtime_context().get_node_id()
    return next(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["NodeID"] == own)
