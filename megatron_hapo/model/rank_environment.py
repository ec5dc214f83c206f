"""What a process needs before it can hold a part of a Megatron model: variables, quiet imports, a meeting place."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path


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


def rendezvous_file(folder: Path) -> str:
    """Where ranks of one node meet without opening a port."""
    return f"file://{folder / 'rendezvous'}"
