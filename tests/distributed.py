"""Real gloo ranks for tests; every rank is a process that can use Megatron.

Ranks are forked from a server that has imported torch and Megatron (`rank_imports`), one per worker of pytest: a rank
starts in a fraction of a second, and is as fresh as a process that imports them itself, except that all ranks hash
strings alike. Those of whole runs, in `test_loop.py`, do not.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from tests.time_limits import patient

_AT_IMPORT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""Variables that torch reads once, so that they are the server's. Ranks use the CPU also on a machine with GPUs:
`megatron_on_cpu` refuses processes that see one."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout_seconds: float = 120) -> list[Any]:
    """Run `fn(rank, *args)` on every rank of a gloo world; returns their results in rank order, raises their errors.

    `fn` is defined at module level and may build a ParallelLayout. The rendezvous is a file, so no port can clash.
    The time limit is that of an idle machine.
    """
    timeout_seconds = patient(timeout_seconds)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        executor = ProcessPoolExecutor(world_size, mp_context=_context())
        environment = dict(os.environ) | _AT_IMPORT
        ended = False
        try:
            futures = [
                executor.submit(_rank_main, environment, rank, world_size, rendezvous, timeout_seconds, fn, args)
                for rank in range(world_size)
            ]
            done, pending = wait(futures, timeout_seconds, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            assert not pending, f"ranks {sorted(map(futures.index, pending))} did not finish within {timeout_seconds} s"
            ended = True
            return [future.result() for future in futures]
        finally:
            # Ranks that hang in a collective would never react to a regular shutdown.
            for process in [] if ended else list((executor._processes or {}).values()):
                process.kill()
            executor.shutdown(wait=True, cancel_futures=True)


def _context() -> Any:
    """Starts processes by a fork of this process's server, which is started if it is not running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rank_imports"])
    root = str(Path(__file__).parents[1])  # where it finds `tests`, whatever the working directory
    with mock.patch.dict(os.environ, _AT_IMPORT | {"PYTHONPATH": root}):
        forkserver.ensure_running()
    return context


def _rank_main(
    environment: dict[str, str],
    rank: int,
    world_size: int,
    rendezvous: str,
    timeout_seconds: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    # multiprocessing ignores a preloaded module that cannot be imported.
    assert "tests.rank_imports" in sys.modules, "the server could not import tests.rank_imports"
    os.environ.clear()
    os.environ.update(environment)
    import torch

    from megatron_hapo.model import parallel_layout

    device = torch.device("cpu")
    parallel_layout.init_distributed(
        rank=rank, world_size=world_size, init_method=rendezvous, device=device, timeout_seconds=timeout_seconds
    )
    try:
        return fn(rank, *args)
    finally:
        parallel_layout.shutdown()
