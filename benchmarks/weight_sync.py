"""Seconds, bytes and extra memory of a weight sync, direct and gathered, beside a plain copy of the same bytes.

    python benchmarks/weight_sync.py [--layers 24] [--hidden 1024] [--vocab 32768] [--tp 2] [--pp 1] [--repeats 3]

A random Qwen3 in bfloat16, real trainer ranks (Ray, Megatron, gloo), a real SGLang engine, all on this machine's CPUs.
The first sync of each method is verified and not counted. Extra memory is the rise of the proportional set size (PSS)
of this process and its descendants during a sync, sampled, over that before it. Prints a table, and as its last line
the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak_memory import PeakMemory
from megatron_hapo.config import Config
from megatron_hapo.launch.engines import RayRolloutPool
from megatron_hapo.launch.run import local_ray
from megatron_hapo.launch.trainer import RayTrainer
from megatron_hapo.protocols import WeightSync
from megatron_hapo.weight_sync import DirectSync, GatherSync
from tests.tiny_model import write_tiny_qwen3


@dataclass
class Measured:
    method: str
    seconds: float
    """Best of the repeats."""
    extra_bytes: int


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="megatron-hapo-benchmark-") as folder, ExitStack() as stack:
        model = write_tiny_qwen3(
            Path(folder) / "model", layers=arguments.layers, hidden=arguments.hidden, heads=arguments.hidden // 64,
            kv_heads=min(8, arguments.hidden // 64), head_dim=64, intermediate=3 * arguments.hidden,
            vocab_size=arguments.vocab, dtype="bfloat16",
        )  # fmt: skip
        num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        config = make_config(model, Path(folder), arguments)
        stack.enter_context(local_ray())
        pool = RayRolloutPool(config, device="cpu")
        stack.callback(pool.close)
        trainer = RayTrainer(config, device="cpu")
        stack.callback(trainer.close)
        pool.wait_until_ready()
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron-hapo-", dir="/dev/shm")))
        start = time.perf_counter()
        direct = DirectSync(config, trainer, pool, folder=shared)
        plan_seconds = time.perf_counter() - start
        assert direct.plan.traffic().sum() <= num_bytes
        methods = {"direct": direct, "gather": GatherSync(trainer, pool, verify_every=1 << 30)}
        measured = measure(methods, arguments.repeats)
        copy_seconds = plain_copy(num_bytes, arguments.repeats)
    report(arguments, num_bytes, plan_seconds, copy_seconds, measured)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="seconds, bytes and memory of a weight sync")
    for name, default in (("layers", 24), ("hidden", 1024), ("vocab", 32768), ("tp", 2), ("pp", 1), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def make_config(model: Path, folder: Path, arguments: argparse.Namespace) -> Config:
    return Config.model_validate(
        {
            "name": "benchmark",
            "output_dir": folder,
            "steps": 1,
            "device": "cpu",
            "model": {"path": model},
            "parallel": {"tp": arguments.tp, "pp": arguments.pp},
            "trainer": {"dtype": "bfloat16", "timeout_seconds": 500},
            "rollout": {
                "dtype": "bfloat16",
                "max_prompt_tokens": 32,
                "max_response_tokens": 32,
                "max_running_requests": 8,
                "kv_cache_tokens": 2048,
                "memory_fraction": 0.1,
                "timeout_seconds": 500,
            },
            "data": {"train": {"type": "arithmetic", "size": 8}},
            "weight_sync": {"verify_every": 1 << 30, "bucket_bytes": 256 << 20},
        }
    )


def measure(methods: dict[str, WeightSync], repeats: int) -> list[Measured]:
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    extra: dict[str, int] = dict.fromkeys(methods, 0)
    version = 0
    for repeat in range(repeats + 1):
        for name, sync in methods.items():
            version += 1
            # Sampling takes time of its own, so the last repeat is for memory alone.
            if repeat == repeats:
                with PeakMemory(every_seconds=0.02) as memory:
                    sync.sync(policy_version=version)
                extra[name] = memory.rise
                continue
            start = time.perf_counter()
            sync.sync(policy_version=version)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return [Measured(name, min(seconds[name]), extra[name]) for name in methods]


def plain_copy(num_bytes: int, repeats: int) -> float:
    """Seconds of one thread's copy between two buffers that have been touched before."""
    torch.set_num_threads(1)
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source).copy_(source)
    best = float("inf")
    for _ in range(max(3, repeats)):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return best


def report(
    arguments: argparse.Namespace, num_bytes: int, plan_seconds: float, copy_seconds: float, measured: list[Measured]
) -> None:
    table = Table("method", "seconds", "GB/s", "times the plain copy", "extra MB")
    rows = [Measured("plain copy", copy_seconds, 0), *measured]
    for row in rows:
        table.add_row(
            row.method, f"{row.seconds:.3f}", f"{num_bytes / row.seconds / 1e9:.2f}",
            f"{row.seconds / copy_seconds:.1f}", f"{row.extra_bytes / 1e6:.0f}",
        )  # fmt: skip
    console = Console(width=100)
    console.print(table)
    console.print(f"{num_bytes / 1e6:.0f} MB, trainer tp{arguments.tp} pp{arguments.pp}, engine tp1; planned once in "
                  f"{plan_seconds:.2f} s; load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    figures = {row.method.replace(" ", "_"): {"seconds": row.seconds, "extra_bytes": row.extra_bytes} for row in rows}
    print(json.dumps({"benchmark": "weight_sync", **vars(arguments), "bytes": num_bytes, "methods": figures}))


if __name__ == "__main__":
    main()
