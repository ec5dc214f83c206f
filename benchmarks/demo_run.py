"""One run of the demo's job, or another, as a process of its own, for benchmarks that compare runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def train(out: Path, name: str, overrides: list[str], *, job: str = "configs/demo_cpu.yaml") -> None:
    """Start a run or continue it; its output goes to `<name>.log` next to its folder."""
    if (out / name / "curves.png").exists():  # the last file that a run writes
        return
    command = [sys.executable, "-m", "megatron_hapo", "train", str(ROOT / job),
               f"name={name}", f"output_dir={out}", *overrides]  # fmt: skip
    with (out / f"{name}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
