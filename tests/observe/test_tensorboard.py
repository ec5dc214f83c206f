"""A disk that is full costs TensorBoard's curves, and one line; not the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging, resource, sys
from pathlib import Path
from megatron_hapo.observe.metrics import MetricsLogger

logging.basicConfig(format="%(levelname)s %(message)s")
folder, limit_after = Path(sys.argv[1]), int(sys.argv[2])

def fill_the_disk(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

if limit_after == 0:
    fill_the_disk(80)  # less than an event file needs, enough for three short rows
with MetricsLogger(folder, total_steps=3) as logger:
    for step in range(1, 4):
        if step == limit_after:
            fill_the_disk(200)
        logger.log(step, {"m": step})
"""


@pytest.mark.parametrize("limit_after", [0, 3])
def test_a_full_disk_is_one_line_and_the_runs_own_rows_are_written(tmp_path: Path, limit_after: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(limit_after)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"WARNING TensorBoard's curves are not written any more: {tmp_path}/tensorboard: ")
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [f'{{"step": {n}, "m": {n}.0}}' for n in (1, 2, 3)]
