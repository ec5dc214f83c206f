"""The only module that reads Megatron's process groups; all others take them from a ParallelLayout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core import tensor_parallel as megatron_tp
from torch.distributed.distributed_c10d import Store

from megatron_hapo.config.pipeline import Pipeline


@dataclass(frozen=True)
class ParallelLayout:
    """The trainer's process grid as one rank sees it: sizes, its coordinates, its process groups."""

    device: torch.device
    tp_size: int
    tp_rank: int
    tp_group: dist.ProcessGroup
    pipeline: Pipeline
    pp_rank: int
    cp_size: int
    cp_rank: int
    cp_group: dist.ProcessGroup
    dp_size: int
    dp_rank: int
    dp_cp_group: dist.ProcessGroup
    """All ranks that hold different tokens of a mini-batch and the same parameters."""
    ep_size: int
    """Groups of a pipeline stage's ranks over which the experts are distributed."""
    ep_rank: int
    etp_size: int
    """Neighbouring ranks of a tp group over which each expert is cut."""
    etp_rank: int
    etp_group: dist.ProcessGroup
    expert_dp_rank: int
    """Rank among those that hold the same shards of the same experts."""

    @property
    def pp_size(self) -> int:
        """Number of pipeline stages."""
        return self.pipeline.pp

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's last chunk ends with the model's last layer and the output head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def reports(self) -> bool:
        """Whether this rank returns the results of its data-parallel slice: last stage, tp rank 0, cp rank 0."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank belongs to the first of the model replicas."""
        return self.dp_rank == 0 and self.cp_rank == 0


def initialize(
    *,
    tp: int,
    pp: int,
    vpp: int = 1,
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
    cp: int = 1,
    ep: int = 1,
    etp: int = 1,
    device: torch.device,
    seed: int,
    timeout_seconds: float,
) -> ParallelLayout:
    """Create Megatron's process groups over an initialised torch.distributed world. Every rank calls this once.

    Experts have their own grid over the ranks of a pipeline stage: etp, then ep, then replicas.

    Raises:
        ValueError: the sizes do not divide the world, or etp x ep does not divide the ranks of a pipeline stage.
    """
    check_sizes(dist.get_world_size(), tp=tp, pp=pp, cp=cp, ep=ep, etp=etp)
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
        create_gloo_process_groups=False,
    )
    megatron_tp.model_parallel_cuda_manual_seed(seed)
    return ParallelLayout(
        device=device,
        tp_size=tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_group=_one(parallel_state.get_tensor_model_parallel_group()),
        pipeline=Pipeline(pp=pp, vpp=vpp, first_stage_layers=first_stage_layers, last_stage_layers=last_stage_layers),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_size=cp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_group=_one(parallel_state.get_context_parallel_group()),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_cp_group=_one(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        ep_size=ep,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_size=etp,
        etp_rank=_one(parallel_state.get_expert_tensor_parallel_group()).rank(),
        etp_group=_one(parallel_state.get_expert_tensor_parallel_group()),
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
    )


def check_sizes(world_size: int, *, tp: int, pp: int, cp: int, ep: int, etp: int = 1) -> None:
    """Raise ValueError if these sizes do not divide the world; dp is what tp, pp and cp leave over."""
    for name, size in (("tp", tp), ("pp", pp), ("cp", cp), ("ep", ep), ("etp", etp)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if world_size % (tp * pp * cp):
        raise ValueError(f"{world_size} ranks must be a multiple of tp={tp} x pp={pp} x cp={cp} = {tp * pp * cp}")
    if tp % etp:
        raise ValueError(f"etp must divide tp={tp}, got {etp}")
    if world_size // pp % (etp * ep):
        raise ValueError(
            f"etp x ep must divide the {world_size // pp} ranks of a pipeline stage (tp x cp x dp), got {etp} x {ep}"
        )


def _one(group: object) -> dist.ProcessGroup:
    """The group, checked: Megatron's getters are typed for layouts with several groups per rank, not used here."""
    assert isinstance(group, dist.ProcessGroup), f"expected one process group, got {group!r}"
    return group


def init_distributed(
    *, rank: int, world_size: int, init_method: str | Store, device: torch.device, timeout_seconds: float
) -> None:
    """Join the trainer's world: NCCL on GPUs, gloo on CPUs. `init_method` is a URL as torch takes it, or a store."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=init_method if isinstance(init_method, str) else None,
        store=None if isinstance(init_method, str) else init_method,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def shutdown() -> None:
    """Leave the world; safe to call twice."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
