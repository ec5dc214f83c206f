"""Set-up of a process before it holds a shard of a Megatron model: environment, fast quiet imports, rendezvous."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron_hapo.model.determinism import rank_variables
from megatron_hapo.model.nccl_environment import nccl_environment


def environment(device: str, *, loopback: bool, deterministic: bool = False) -> dict[str, str]:
    """Environment variables that a rank's process needs before it starts; `loopback`: all ranks are on this host."""
    variables = {
        # Megatron's tensor-parallel overlap relies on the launch order of kernels.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        # Large tensors on huge pages: touching memory for the first time is much of the cost of a conversion.
        variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "THP_MEM_ALLOC_ENABLE": "1"}
    if loopback:
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    if deterministic:
        variables |= rank_variables(device)
    return variables | nccl_environment(loopback=loopback, deterministic=deterministic)


def quieten() -> None:
    """Silence warnings of Megatron and torch about packages that are not installed, which no user can act on."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\b")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for name in ("megatron.core", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Disables the garbage collector around a process's imports, and exempts what they created from it afterwards.

    All of it stays until the process ends; scanning it again and again takes a quarter of the import time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def rendezvous_file(folder: Path) -> str:
    """An init_method with which the ranks of one node rendezvous without opening a port."""
    return f"file://{folder / 'rendezvous'}"
