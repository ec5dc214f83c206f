"""Megatron-Core on a CPU in the GPU set-up, on a node without NVIDIA's driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
