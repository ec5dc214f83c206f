"""The processes of a run, and the memory that each holds on its GPU or, at least, on its host. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_hapo.config import Config
from megatron_hapo.model.families import Shape
from megatron_hapo.sizing import from_config
from megatron_hapo.sizing.memory import (
    GIB,
    TrainerMemory,
    engine_memory,
    kv_bytes_per_token,
    saved_by_float8,
    trainer_memory,
)
from megatron_hapo.sizing.parameters import model_parameters

_MIB = 1 << 20
_PROGRAM_BYTES = {
    "driver": 400 * _MIB,
    "trainer rank": 450 * _MIB,
    "engine": 600 * _MIB,
    "engine rank": 650 * _MIB,
    "reward worker": 40 * _MIB,
}
"""Host memory without the model, pages that processes share not counted: mostly torch, Megatron and SGLang themselves.
An engine is its actor. Measured on CPUs (torch 2.14, SGLang 0.5.23) and rounded down, so that no run is refused that
would fit."""


@dataclass(frozen=True, kw_only=True)
class ProcessKind:
    """Processes of a run that are alike."""

    name: str
    count: int
    host_bytes: int
    """Least memory of each on its host."""
    gpu_bytes: Mapping[str, int]
    """Memory of each on its GPU by part, with their `total`; empty for a process without a GPU."""
    computes: bool = False
    """Whether it keeps a core of a CPU busy."""


def processes_of(config: Config, shape: Shape, *, device: str, trains: bool = True) -> list[ProcessKind]:
    """The processes of a run.

    Args:
        device: cpu or cuda.
        trains: whether it has a trainer; an evaluation has none.
    """
    rollout = config.rollout
    kinds = [_kind("driver")]
    if trains:
        kinds.append(_trainer_ranks(config, shape, device=device))
    if config.replay is not None:
        return kinds
    kinds += [_kind("engine", rollout.engines), _engine_ranks(config, shape, device=device)]
    return [*kinds, _kind("reward worker", config.reward.workers)]


def _kind(name: str, count: int = 1) -> ProcessKind:
    return ProcessKind(name=name, count=count, host_bytes=_PROGRAM_BYTES[name], gpu_bytes={})


def _trainer_ranks(config: Config, shape: Shape, *, device: str) -> ProcessKind:
    on_cpu = device == "cpu"
    gpu_bytes = 0 if on_cpu else from_config.gpu_memory(config) or 0
    memory = trainer_memory(
        shape,
        from_config.layout_of(config),
        gpu_bytes=gpu_bytes,
        spec="local_cpu" if on_cpu else from_config.spec_here(config),
        bucket_bytes=config.weight_sync.bucket_bytes,
    )
    held = memory.weights + memory.gradients + memory.optimizer  # for the whole run; the rest depends on the data
    return ProcessKind(
        name="trainer rank",
        count=config.parallel.world_size,
        host_bytes=_PROGRAM_BYTES["trainer rank"] + (held if on_cpu else 0),
        gpu_bytes={} if on_cpu else _trainer_parts(memory),
        computes=on_cpu,
    )


def _trainer_parts(memory: TrainerMemory) -> dict[str, int]:
    parts = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "reserve")}
    peak = max(memory.phases, key=memory.phases.__getitem__)
    return {**parts, peak: memory.phases[peak], "total": memory.total}


def _engine_ranks(config: Config, shape: Shape, *, device: str) -> ProcessKind:
    rollout = config.rollout
    element = 2 if rollout.dtype == "bfloat16" else 4
    on_cpu, gpu_bytes = device == "cpu", from_config.gpu_memory(config)
    weights = element * model_parameters(shape) // rollout.tp
    if rollout.quantization == "fp8":
        weights -= saved_by_float8(shape, tp=rollout.tp, bytes_per_element=element)
    parts = {"weights": weights}
    if rollout.kv_cache_tokens is not None:
        per_token = kv_bytes_per_token(shape, tp=rollout.tp, bytes_per_element=element)
        parts["kv_cache"] = rollout.kv_cache_tokens * per_token
    if not on_cpu and gpu_bytes is not None:
        memory = engine_memory(
            shape, tp=rollout.tp, gpu_bytes=gpu_bytes, memory_fraction=rollout.memory_fraction,
            num_parameters=model_parameters(shape), bytes_per_element=element, quantization=rollout.quantization,
        )  # fmt: skip
        parts = {"kv_cache": memory.kv_cache} | parts | {"runtime": memory.runtime}
    total = sum(parts.values())
    return ProcessKind(
        name="engine rank",
        count=rollout.engines * rollout.tp,
        host_bytes=_PROGRAM_BYTES["engine rank"] + (total if on_cpu else 0),
        gpu_bytes={} if on_cpu else {**parts, "total": total},
        computes=on_cpu,
    )


def readable_size(size: int) -> str:
    """A number of bytes, as messages show it."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / _MIB:.0f} MiB"
