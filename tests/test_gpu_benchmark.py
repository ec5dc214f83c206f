"""The suites for GPUs run on a CPU at toy sizes, the one for one GPU with the few packages that it is meant to need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.time_limits import patient

ROOT = Path(__file__).parents[1]
BLOCKED = (
    "ray sglang sgl_kernel datasets pyarrow math_verify reasoning_gym tensorboard matplotlib modelopt pytest requests"
)


def test_every_part_runs_without_the_packages_of_the_other_parts(tmp_path: Path) -> None:
    for name in BLOCKED.split():
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not needed')\n")
    answer = run_toy(tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr[-3000:]
    report = json.loads(answer.stdout.splitlines()[-1])
    assert list(report) == ["machine", "kernels", "head", "slots", "rank", "layers", "hook", "bits"]
    assert all(report[part]["seconds"] > 0 for part in list(report)[1:])
    assert report["rank"]["update s"] > 0
    assert report["layers"]["varlen ms"] > 0
    assert report["head"]["float32 logits ms"] > 0
    assert report["hook"]["sort ms"] > 0


def test_a_part_that_fails_is_reported_and_the_next_one_still_runs(tmp_path: Path) -> None:
    (tmp_path / "safetensors").mkdir()
    (tmp_path / "safetensors/__init__.py").write_text("raise ImportError('broken')\n")
    answer = run_toy(tmp_path, "rank", "bits")
    assert answer.returncode == 1
    report = json.loads(answer.stdout.splitlines()[-1])
    assert "broken" in report["rank"]["error"]
    assert report["bits"]["float8 values"] > 0


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    answer = run_toy(tmp_path, "bits", toy=False)
    assert answer.returncode == 2
    assert "no CUDA device; --toy runs the same code on a CPU" in answer.stderr


def test_weight_transports_are_measured_on_either_device() -> None:
    """On a CPU the same code as with `--device cuda`, which a machine without a GPU refuses."""
    answer = run("benchmarks/weight_transport.py", "--model", "toy", "--repeats", "1", "--engine-tp", "2")
    assert answer.returncode == 0, answer.stdout + answer.stderr[-3000:]
    report = json.loads(answer.stdout.splitlines()[-1])
    assert [row["transport"] for row in report["transports"]] == ["plain copy", "shared memory", "messages (gloo)"]
    assert all(row["seconds"] > 0 for row in report["transports"])
    answer = run("benchmarks/weight_transport.py", "--device", "cuda")
    assert answer.returncode == 2
    assert "no CUDA device; without --device the same code runs on a CPU" in answer.stderr


def run_toy(packages: Path, *parts: str, toy: bool = True) -> subprocess.CompletedProcess[str]:
    """The benchmark, with these modules in front of the installed ones."""
    options = [*(["--toy"] if toy else []), *(["--parts", *parts] if parts else [])]
    return run("benchmarks/gpu.py", *options, PYTHONPATH=str(packages))


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A benchmark in a process that sees no GPU."""
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patient(300), check=False,
    )  # fmt: skip
