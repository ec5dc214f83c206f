"""A rollout engine as a Ray actor: it passes verbs on by name."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_hapo.config import Config
from megatron_hapo.errors import WeightSyncError
from megatron_hapo.launch.places import GpuPlacement
from megatron_hapo.model.nccl_environment import nccl_environment, without_expandable_segments
from megatron_hapo.model.rank_environment import importing
from megatron_hapo.private_folder import current_folder, run_time_folder
from megatron_hapo.protocols import RolloutEngine, declared_verbs

GENERATION = "generation"
"""Ray's concurrency group of `advance`; all other verbs share one thread."""
_VERBS = declared_verbs(RolloutEngine)
_GENERATIONS = 2
"""Concurrent generation calls: training's stream and evaluation's. Another one would wait."""


class EngineActor:
    """Holds an sglang_ext Engine."""

    def __init__(self, config: Config, device: str, index: int, *, read_weights: bool):
        with importing():
            from sglang_ext.engine import Engine
            from sglang_ext.engine_config import EngineConfig

        rollout = config.rollout
        self._index, self._stack = index, contextlib.ExitStack()
        if current_folder() is None:  # on a node that the run has not started
            self._stack.enter_context(run_time_folder())
        self._started = Engine(
            EngineConfig(
                model_path=config.model.path.absolute(),
                device=device,  # type: ignore[arg-type]  # "cpu" or "cuda"
                dtype=rollout.dtype,
                quantization=rollout.quantization,
                float32_logits=config.trainer.float32_logits,
                tp=rollout.tp,
                ep=rollout.ep,
                max_running_requests=rollout.max_running_requests,
                memory_fraction=rollout.memory_fraction,
                kv_cache_tokens=rollout.kv_cache_tokens,
                context_tokens=rollout.max_prompt_tokens + rollout.max_response_tokens,
                seed=(config.seed + index) % 2**32,  # the range that numpy accepts
                read_weights=read_weights,
                releases_memory=config.placement == "colocated",
                in_flight=config.weight_sync.in_flight,
                returns_routes=rollout.replay_routes and not read_weights,  # an evaluation has nothing to replay
                deterministic=config.deterministic,
                name=f"engine {index}",
            )
        )
        self._engine: RolloutEngine = self._started

    def ready(self) -> None:
        """Answers once the constructor has returned: the engine has started and proved its sampling."""

    def call(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """What this verb of protocols.RolloutEngine returns.

        Raises:
            ValueError: the protocol declares no such verb.
            WeightSyncError: with the engine's number. Other errors are raised unchanged.
        """
        if verb not in _VERBS:
            raise ValueError(f"a rollout engine has no verb {verb!r}; its verbs are {', '.join(sorted(_VERBS))}")
        try:
            return getattr(self._engine, verb)(*args, **kwargs)
        except WeightSyncError as error:
            raise WeightSyncError(f"engine {self._index}: {error}") from error

    def shutdown(self) -> None:
        """Ends SGLang's processes."""
        self._started.shutdown()
        self._stack.close()


def engine_actor() -> Any:
    """The Ray actor class."""
    remote: Any = ray.remote
    return remote(concurrency_groups={GENERATION: _GENERATIONS})(EngineActor)


def actor_options(
    tp: int, device: str, placement: GpuPlacement | None, *, loopback: bool, deterministic: bool = False
) -> dict[str, Any]:
    """Ray's options for the actor of one engine.

    Args:
        loopback: whether all processes of the run are on this host.
        placement: None leaves the choice to Ray.
    """
    environment = {"GLOO_SOCKET_IFNAME": "lo"}  # the ranks of an engine share a node
    if device == "cpu":
        from sglang_ext import cpu

        environment |= cpu.environment(tp)
    else:
        environment |= nccl_environment(loopback=loopback, deterministic=deterministic) | without_expandable_segments()
    num_gpus = tp if device == "cuda" else 0
    if placement is not None and placement.gpus:
        # For Ray these GPUs belong to the trainer ranks: it must neither count them twice nor hide them.
        num_gpus = 0
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(placement.gpus), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return {
        "num_cpus": 0,
        "num_gpus": num_gpus,
        "runtime_env": {"env_vars": environment},
        "scheduling_strategy": (
            "DEFAULT" if placement is None else NodeAffinitySchedulingStrategy(placement.node, soft=False)
        ),
    }
