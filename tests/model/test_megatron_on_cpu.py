"""Megatron-Core on a CPU in the GPU set-up, on a node without NVIDIA's driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.time_limits import patient

_IMPORT = """
from megatron_hapo.model import megatron_on_cpu
megatron_on_cpu.install()
import megatron.core.transformer.attention
"""


def test_a_package_that_cannot_load_the_driver_counts_as_missing(tmp_path: Path) -> None:
    """What flash_mla does at its import where libcuda is missing: not an ImportError, which Megatron expects."""
    (tmp_path / "flash_mla.py").write_text('raise OSError("Could not load this library")\n')
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _IMPORT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patient(120))
    assert done.returncode == 0, done.stderr[-2000:]


def use_many_groups(rank: int) -> None:
    pairs: list[Any] = [dist.new_group([0, 1]) for _ in range(6)]
    alone: list[Any] = [dist.new_group([0]), dist.new_group([1])]
    for number, group in enumerate([*pairs, alone[rank]]):
        values = torch.full((3,), float(number + rank))
        dist.all_reduce(values, group=group)
        assert values.tolist() == [2 * number + 1 if group in pairs else number + rank] * 3
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    assert threads.count("gloo_tcp_loop") == 1


def test_process_groups_share_one_connection_thread() -> None:
    run_ranks(2, use_many_groups)
