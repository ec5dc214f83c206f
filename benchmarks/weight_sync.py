"""Time, bytes and extra memory of direct and gathered weight syncs, compared with a plain copy of the same bytes.

    python benchmarks/weight_sync.py [--trainer tp2 pp2] [--engine-tp 1 2] [--layers 28] [--hidden 1024]
                                     [--vocab 65536] [--repeats 5]

Uses a random Qwen3 in bfloat16 (0.5B parameters by default), real trainer ranks (Ray, Megatron, gloo) and a real SGLang
engine, all on this machine's CPUs. The methods alternate, and the best of the repeats is reported; the first sync of
each is verified and not counted. Extra memory is the increase of the sampled proportional set size (PSS) of this
process and its descendants during a sync. Prints a table, and the same as JSON in the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak_memory import PeakMemory
from megatron_hapo.config import Config
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.launch.ray.rank_actors import RankProcesses, RayTrainer
from megatron_hapo.model.families import num_parameters, read_shape
from megatron_hapo.protocols import WeightSync
from megatron_hapo.weight_sync import DirectSync, GatherSync
from tests.resharding.planned_grid import traffic
from tests.tiny_model import write_tiny_qwen3


@dataclass
class Measured:
    """One row of the table: a method's best time, bytes and extra memory."""

    method: str
    seconds: float
    """The best of the repeats."""
    bytes_moved: int
    extra_bytes: int


@dataclass
class Case:
    """The measurements for one layout of trainer and engine."""

    trainer: str
    engine_tp: int
    plan_seconds: float
    copy_seconds: float
    methods: list[Measured]


def main() -> None:
    """Measure, and print the results; see the top of the file."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="megatron-hapo-benchmark-") as folder, ExitStack() as stack:
        model = write_tiny_qwen3(
            Path(folder) / "model", layers=arguments.layers, hidden=arguments.hidden, heads=arguments.hidden // 64,
            kv_heads=max(2, arguments.hidden // 128), head_dim=128, intermediate=3 * arguments.hidden,
            vocab_size=arguments.vocab, tied=True, dtype="bfloat16",
        )  # fmt: skip
        stack.enter_context(local_ray())
        cases = []
        for trainer in arguments.trainer:
            for engine_tp in arguments.engine_tp:
                cases.append(run_case(model, Path(folder), trainer, engine_tp, arguments.repeats))
                print(f"measured trainer {trainer}, engine tp{engine_tp}", file=sys.stderr)
    report(arguments, cases)


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description="measure time, bytes and memory of a weight sync")
    parser.add_argument("--trainer", nargs="+", default=["tp2", "pp2"], choices=["tp1", "tp2", "pp2"])
    parser.add_argument("--engine-tp", nargs="+", type=int, default=[1, 2])
    for name, default in (("layers", 28), ("hidden", 1024), ("vocab", 65536), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def run_case(model: Path, folder: Path, trainer_layout: str, engine_tp: int, repeats: int) -> Case:
    """Start a trainer and an engine in these layouts, and measure both methods."""
    config = make_config(model, folder, trainer_layout, engine_tp)
    with ExitStack() as stack:
        pool = RayRolloutPool(config, device="cpu")
        stack.callback(pool.close)
        trainer = RayTrainer(config, RankProcesses(config, device="cpu"))
        stack.callback(trainer.close)
        pool.wait_until_ready()
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron-hapo-", dir="/dev/shm")))
        start = time.perf_counter()
        direct = DirectSync(config, trainer, pool, folder=shared)
        plan_seconds = time.perf_counter() - start
        gather = GatherSync(trainer, pool, verify_every=config.weight_sync.verify_every)
        num_bytes = num_parameters(read_shape(model)) * 2
        moved = {"direct": int(traffic(direct.plan).sum()), "gather": num_bytes}
        methods: dict[str, WeightSync] = {"direct": direct, "gather": gather}
        measured = measure(methods, moved, repeats)
        return Case(trainer_layout, engine_tp, plan_seconds, plain_copy(num_bytes, repeats), measured)


def make_config(model: Path, folder: Path, trainer_layout: str, engine_tp: int) -> Config:
    """A run on CPUs whose syncs are verified only once."""
    return Config.model_validate(
        {
            "name": "benchmark",
            "output_dir": folder,
            "steps": 1,
            "device": "cpu",
            "model": {"path": model},
            "parallel": {trainer_layout[:2]: int(trainer_layout[2:])},
            "trainer": {"dtype": "bfloat16", "timeout_seconds": 500},
            "rollout": {
                "tp": engine_tp,
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


def measure(methods: dict[str, WeightSync], moved: dict[str, int], repeats: int) -> list[Measured]:
    """Time `repeats` syncs of each method; then measure the memory of one more.

    Args:
        methods: the syncs, by name of the method.
        moved: bytes that each method moves.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    extra: dict[str, int] = dict.fromkeys(methods, 0)
    version = 0
    for repeat in range(repeats + 1):
        for name, sync in methods.items():
            version += 1
            # Sampling memory takes time, so the last repeat is not timed.
            if repeat == repeats:
                with PeakMemory(every_seconds=0.02) as memory:
                    sync.sync(policy_version=version)
                extra[name] = memory.rise
                continue
            start = time.perf_counter()
            sync.sync(policy_version=version)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return [Measured(name, min(seconds[name]), moved[name], extra[name]) for name in methods]


def plain_copy(num_bytes: int, repeats: int) -> float:
    """Seconds in which one thread copies the bytes between two buffers whose pages are already mapped."""
    torch.set_num_threads(1)
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source).copy_(source)
    best = float("inf")
    for _ in range(max(3, repeats)):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return best


def report(arguments: argparse.Namespace, cases: list[Case]) -> None:
    """Print the table and the JSON line."""
    table = Table("trainer", "engine", "method", "seconds", "GB/s", "times the plain copy", "extra MB")
    for case in cases:
        copied = case.methods[0].bytes_moved
        for row in [Measured("plain copy", case.copy_seconds, copied, 0), *case.methods]:
            table.add_row(
                case.trainer, f"tp{case.engine_tp}", row.method, f"{row.seconds:.3f}",
                f"{row.bytes_moved / row.seconds / 1e9:.2f}", f"{row.seconds / case.copy_seconds:.1f}",
                f"{row.extra_bytes / 1e6:.0f}",
            )  # fmt: skip
    Console(width=100).print(table)
    plans = ", ".join(f"{case.plan_seconds:.2f}" for case in cases)
    print(f"planning took {plans} s, once per run; load average {os.getloadavg()[0]:.1f}")
    print(json.dumps({"benchmark": "weight_sync", **vars(arguments), "cases": [asdict(case) for case in cases]}))


if __name__ == "__main__":
    main()
