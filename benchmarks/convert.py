"""Time and peak memory of converting a model in both directions, compared with a plain copy of its safetensors files.

    python benchmarks/convert.py [--layers 26] [--hidden 1536] [--vocab 65536] [--repeats 3] [--folder DIR]

Converts a random Qwen3 of about 1B parameters in bfloat16 with the command line and one rank, on this machine's CPUs
and disk. Each repeat copies and converts; the measured time includes synchronising the files to the disk. `start`
converts a tiny model, which measures the start-up of the processes and their imports, once per conversion. Peak memory
is the increase of the sampled proportional set size (PSS) of this process and its descendants. Prints a table, and the
same as JSON in the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak_memory import PeakMemory
from tests.tiny_model import write_tiny_qwen3

_SETTLE_SECONDS = 10.0
"""Pause before each job. A virtual machine returns freed memory to its host within seconds, and using it again takes
seconds per GB. Without the pause a copy, which starts at once, would reuse pages of the files just removed, and a
conversion, which starts up more slowly, would not."""


def main() -> None:
    """Measure, and print the results; see the top of the file."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="megatron-hapo-benchmark-", dir=arguments.folder) as name:
        folder = Path(name)
        model = write_tiny_qwen3(
            folder / "model", layers=arguments.layers, hidden=arguments.hidden, heads=arguments.hidden // 128,
            kv_heads=max(1, arguments.hidden // 512), head_dim=128, intermediate=4 * arguments.hidden,
            vocab_size=arguments.vocab, tied=True, dtype="bfloat16",
        )  # fmt: skip
        num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        megatron, copy, back = folder / "megatron", folder / "copy", folder / "back"
        small, started = write_tiny_qwen3(folder / "small", dtype="bfloat16"), folder / "started"
        jobs: dict[str, tuple[Path, Callable[[], object]]] = {
            "plain copy": (copy, lambda: copy_weights(model, copy)),
            "start": (started, lambda: convert("hf-to-megatron", small, started)),
            "hf-to-megatron": (megatron, lambda: convert("hf-to-megatron", model, megatron)),
            "megatron-to-hf": (back, lambda: convert("megatron-to-hf", megatron, back)),
        }
        measured: dict[str, list[tuple[float, int]]] = {name: [] for name in jobs}
        for _ in range(arguments.repeats):
            for name, (target, job) in jobs.items():
                shutil.rmtree(target, ignore_errors=True)
                os.sync()
                time.sleep(_SETTLE_SECONDS)
                with PeakMemory(every_seconds=0.2) as memory:
                    start = time.perf_counter()
                    job()
                    synchronise(target)
                    seconds = time.perf_counter() - start
                measured[name].append((seconds, memory.rise))
    report(arguments, num_bytes, {name: min(values) for name, values in measured.items()})


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description="measure time and peak memory of converting a model")
    for name, default in (("layers", 26), ("hidden", 1536), ("vocab", 65536), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--folder", type=Path, help="folder on the disk to measure; default: the system's temporary folder"
    )
    return parser.parse_args()


def copy_weights(source: Path, target: Path) -> None:
    """Copy the safetensors files into a new folder."""
    target.mkdir()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)


def convert(direction: str, source: Path, target: Path) -> None:
    """Run `megatron-hapo convert` in a process of its own; `direction` is hf-to-megatron or megatron-to-hf."""
    command = [sys.executable, "-m", "megatron_hapo", "convert", direction, str(source), str(target)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def synchronise(folder: Path) -> None:
    """Wait until the folder's files are on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def report(arguments: argparse.Namespace, num_bytes: int, measured: dict[str, tuple[float, int]]) -> None:
    """Print the table and the JSON line; `measured` has (seconds, peak bytes) by job."""
    table = Table("", "seconds", "x copy", "x copy, without start", "peak memory GB", "x file size")
    copy_seconds, start_seconds = measured["plain copy"][0], measured["start"][0]
    for name, (seconds, peak) in measured.items():
        rest = max(0.0, seconds - start_seconds) / copy_seconds if name.startswith(("hf", "megatron")) else None
        table.add_row(
            name, f"{seconds:.1f}", f"{seconds / copy_seconds:.2f}", "" if rest is None else f"{rest:.2f}",
            f"{peak / 1e9:.2f}", f"{peak / num_bytes:.2f}",
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    console.print(f"{num_bytes / 1e9:.2f} GB of safetensors; load average {os.getloadavg()[0]:.1f}")
    figures = {name: {"seconds": seconds, "peak_bytes": peak} for name, (seconds, peak) in measured.items()}
    settings = {name: value for name, value in vars(arguments).items() if name != "folder"}
    print(json.dumps({"benchmark": "convert", **settings, "bytes": num_bytes, "jobs": figures}))


if __name__ == "__main__":
    main()
