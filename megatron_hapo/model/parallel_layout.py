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

from megatron_hapo.config import ParallelSizes


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the trainer's process grid, with this rank's coordinates and groups."""

    device: torch.device
    sizes: ParallelSizes
    tp_rank: int
    tp_group: dist.ProcessGroup
    pp_rank: int
    pp_group: dist.ProcessGroup
    """The stages of this rank's pipeline."""
    cp_rank: int
    cp_group: dist.ProcessGroup
    dp_rank: int
    dp_cp_group: dist.ProcessGroup
    """All ranks that hold the same parameters and different tokens of a mini-batch."""
    ep_rank: int
    etp_rank: int
    etp_group: dist.ProcessGroup
    expert_dp_rank: int
    """Rank among those that hold the same shards of the same experts."""

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's last chunk contains the model's last layer and the output head."""
        return self.pp_rank == self.sizes.pp - 1

    @property
    def reports(self) -> bool:
        """Whether this rank reports for its data-parallel slice: last stage, first tp rank, first cp rank."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank is in the first of the grids that hold the same parameters."""
        return self.dp_rank == 0 and self.cp_rank == 0


def initialize(sizes: ParallelSizes, *, device: torch.device, seed: int, timeout_seconds: float) -> ParallelLayout:
    """Create Megatron's process groups over an initialised torch.distributed world. Every rank calls this once.

    Experts have their own grid over the ranks of a pipeline stage: etp, then ep, then replicas.

    Raises:
        ValueError: the sizes contradict each other or do not match the world size.
    """
    sizes.check_world(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        sizes.tp,
        sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
        context_parallel_size=sizes.cp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
        create_gloo_process_groups=False,
    )
    megatron_tp.model_parallel_cuda_manual_seed(seed)
    return ParallelLayout(
        device=device,
        sizes=sizes,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_group=_one(parallel_state.get_tensor_model_parallel_group()),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_group=_one(parallel_state.get_pipeline_model_parallel_group()),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_group=_one(parallel_state.get_context_parallel_group()),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_cp_group=_one(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_rank=_one(parallel_state.get_expert_tensor_parallel_group()).rank(),
        etp_group=_one(parallel_state.get_expert_tensor_parallel_group()),
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
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
