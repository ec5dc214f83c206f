"""Real gloo ranks for tests; every rank is a process that can use Megatron."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any
from unittest import mock

from tests.time_limits import patient


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout_seconds: float = 120) -> list[Any]:
    """Run `fn(rank, *args)` on every rank of a gloo world; returns their results in rank order, raises their errors.

    `fn` is defined at module level and may build a ParallelLayout. The rendezvous is a file, so no port can clash.
    The time limit is that of an idle machine.
    """
    timeout_seconds = patient(timeout_seconds)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        executor = ProcessPoolExecutor(world_size, mp_context=multiprocessing.get_context("spawn"))
        ended = False
        try:
            # Ranks on the CPU, also on a machine with GPUs: `megatron_on_cpu` refuses processes that see one.
            with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
                futures = [
                    executor.submit(_rank_main, rank, world_size, rendezvous, timeout_seconds, fn, args)
                    for rank in range(world_size)
                ]
            done, pending = wait(futures, timeout_seconds, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            assert not pending, f"ranks {[futures.index(f) for f in pending]} did not finish within {timeout_seconds} s"
            ended = True
            return [future.result() for future in futures]
        finally:
            # Ranks that hang in a collective would never react to a regular shutdown.
            for process in [] if ended else list((executor._processes or {}).values()):
                process.kill()
            executor.shutdown(wait=True, cancel_futures=True)


def _rank_main(
    rank: int, world_size: int, rendezvous: str, timeout_seconds: float, fn: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    os.environ["OMP_NUM_THREADS"] = "1"
    from megatron_hapo.model.rank_environment import importing

    with importing():
        import torch

        from megatron_hapo.model import megatron_on_cpu

        megatron_on_cpu.install()
        from megatron_hapo.model import parallel_layout

    torch.set_num_threads(1)
    device = torch.device("cpu")
    parallel_layout.init_distributed(
        rank=rank, world_size=world_size, init_method=rendezvous, device=device, timeout_seconds=timeout_seconds
    )
    try:
        return fn(rank, *args)
    finally:
        parallel_layout.shutdown()
