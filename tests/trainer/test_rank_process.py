"""What a process sets up before it becomes a trainer rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_hapo.trainer.rank_process import host_threads


def test_the_ranks_of_a_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(112)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert host_threads(8) == 14  # of Ray, all on one host
    assert host_threads(200) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # torchrun's, of two hosts
    assert host_threads(8) == 28


def test_torch_takes_more_threads_than_its_environment_says() -> None:
    """OMP_NUM_THREADS, which Ray and torchrun set to 1, is only where torch starts."""
    code = "import torch; torch.set_num_threads(3); torch.ones(9).sum(); print(torch.get_num_threads())"
    answer = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert answer.stdout.strip() == "3", answer.stderr
