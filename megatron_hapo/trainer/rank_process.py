"""Turns a process, whatever started it, into a trainer rank."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from megatron_hapo.config import Config
from megatron_hapo.errors import ConfigError
from megatron_hapo.model import determinism
from megatron_hapo.model.rank_environment import importing

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from megatron_hapo.trainer.trainer_rank import TrainerRank


def resolve_device(config: Config) -> str:
    """The device of the run, cpu or cuda, as `device` says or this machine has it."""
    if config.device != "auto":
        return config.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def host_threads(world_size: int) -> int:
    """Threads for the optimizer of a rank of this host whose state is in host memory: the host's cores, shared out.

    Ray and torchrun set OMP_NUM_THREADS to 1, which would leave Adam to one core. Ray's trainer ranks share one host.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


def start_rank(config: Config, *, device: str, rank: int, world_size: int, init_method: str | Store) -> TrainerRank:
    """Join the trainer's world and build this rank's shard. All ranks call it together.

    Args:
        init_method: for the rendezvous of the ranks: a URL as torch takes it, or a store that only they use.
    Raises:
        ConfigError: the config needs GPUs, and `device: auto` found none.
    """
    with importing():
        import torch

        if device == "cpu":
            if config.optimizer.cpu_offload:
                raise ConfigError(["optimizer.cpu_offload: needs GPUs, but this machine has none; set it to false"])
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
            from megatron_hapo.model import megatron_on_cpu

            megatron_on_cpu.install()
            torch_device = torch.device("cpu")
        else:
            # Ray makes only its own GPU visible to an actor; under torchrun a rank sees all GPUs of its node.
            torch_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(torch_device)
            if config.optimizer.cpu_offload:
                torch.set_num_threads(host_threads(world_size))

        if config.deterministic:
            determinism.enable()
        from megatron_hapo.model import parallel_layout
        from megatron_hapo.trainer.trainer_rank import TrainerRank

    parallel_layout.init_distributed(
        rank=rank,
        world_size=world_size,
        init_method=init_method,
        device=torch_device,
        timeout_seconds=config.trainer.timeout_seconds,
    )
    layout = parallel_layout.initialize(
        config.parallel,
        device=torch_device,
        seed=config.seed,
        timeout_seconds=config.trainer.timeout_seconds,
    )
    return TrainerRank(config, layout)
