"""A process becomes a trainer rank, whoever started it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hapo.config import Config
from megatron_hapo.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from megatron_hapo.trainer import TrainerRank


def environment(device: str, *, loopback: bool) -> dict[str, str]:
    """Variables that a rank's process needs before it starts."""
    variables = {
        # Megatron's tensor-parallel overlap relies on the order of kernels.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        # Large tensors on huge pages: to touch memory for the first time is much of what a conversion costs.
        variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "THP_MEM_ALLOC_ENABLE": "1"}
    if loopback:
        variables |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return variables


def quieten() -> None:
    """What Megatron and torch say about packages that are not installed is of no use to the user; Ray hides it too."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\b")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for name in ("megatron.core", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While a process imports what it will run: all of that stays, and the garbage collector would go through it again
    and again, a quarter of the time, and once more when the process ends."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def start_rank(config: Config, *, device: str, rank: int, world_size: int, init_method: str | Store) -> TrainerRank:
    """Join the trainer's world and build this rank's shard. All ranks call it together.

    Args:
        init_method: where the ranks meet: torch's URL, or a store that only they use.
    Raises:
        ConfigError: the config needs GPUs, and `device: auto` found none.
    """
    with importing():
        import torch

        if device == "cpu":
            if config.optimizer.cpu_offload:
                raise ConfigError(["optimizer.cpu_offload: needs GPUs, and this machine shows none; set it to false"])
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
            from megatron_hapo.model import cpu

            cpu.install()
            torch_device = torch.device("cpu")
        else:
            # Ray shows an actor its own GPU only; under torchrun every rank sees all of its node.
            torch_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(torch_device)

        from megatron_hapo import parallel
        from megatron_hapo.trainer import TrainerRank

    parallel.init_distributed(
        rank=rank,
        world_size=world_size,
        init_method=init_method,
        device=torch_device,
        timeout_seconds=config.trainer.timeout_seconds,
    )
    layout = parallel.initialize(
        tp=config.parallel.tp,
        pp=config.parallel.pp,
        vpp=config.parallel.vpp,
        first_stage_layers=config.parallel.first_stage_layers,
        last_stage_layers=config.parallel.last_stage_layers,
        cp=config.parallel.cp,
        ep=config.parallel.ep,
        etp=config.parallel.etp,
        device=torch_device,
        seed=config.seed,
        timeout_seconds=config.trainer.timeout_seconds,
    )
    return TrainerRank(config, layout)


def rendezvous_file(folder: Path) -> str:
    """Where ranks of one node meet without opening a port."""
    return f"file://{folder / 'rendezvous'}"
