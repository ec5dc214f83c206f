"""Time that the transports of a direct weight sync need, compared with a plain copy of the same bytes.

    python benchmarks/weight_transport.py [--model 0.5b] [--layers N] [--trainer-tp 2] [--engine-tp 1] [--repeats 10]
    python benchmarks/weight_transport.py --device cuda --model qwen3-8b

Trainer and engine ranks are plain processes with the tensors of a Qwen3 in bfloat16. There is no Ray, Megatron or
SGLang, so this is the cost of packing, passing and copying alone; `weight_sync.py` measures the whole sync. The first
transfer, which allocates the slots, is not counted, and what it brought is compared. Reported is the best of the
repeats, from the first rank's start to the last rank's end, and the processor seconds of all ranks in that repeat.
Prints a table, and the same as JSON in the last line.

`--device cuda`: each rank has a GPU of its own, engine ranks after the trainer's, as far as there are so many; on one
GPU trainer and engine share it. Pairs of ranks use memory of a GPU (CUDA IPC), and NCCL where each rank has its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_hapo.config import ParallelSizes
from megatron_hapo.model.families import ModelConfig, Shape, shape_of
from megatron_hapo.model.nccl_environment import nccl_environment
from megatron_hapo.resharding.layouts import engine_parameters, matrix_sizes
from megatron_hapo.resharding.plan import Channel, Parameter, make_plan
from megatron_hapo.resharding.process_group import open_store
from megatron_hapo.resharding.transfer import Rendezvous, Transfer
from megatron_hapo.resharding.transports import Receiver, Sender
from megatron_hapo.sizing.command import shape_at
from megatron_hapo.weight_sync import GPU_SLOT_BYTES, SLOT_BYTES
from tests.resharding.planned_grid import traffic, trainer_shards

_CONFIGS = Path(__file__).resolve().parents[1] / "tests/fixtures/hf_configs"
_SMALL = {
    "0.5b": {"num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 65536},
    "toy": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 640},
}
_LARGE = {"qwen3-8b": "Qwen--Qwen3-8B.json", "qwen3-30b-a3b": "Qwen--Qwen3-30B-A3B.json"}


@dataclass
class Measured:
    """One row of the table: the best of the repeats."""

    transport: str
    seconds: float
    cpu_seconds: float


def main() -> int:
    """Measure, and print the results; see the top of the file."""
    arguments = parse_arguments()
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("no CUDA device; without --device the same code runs on a CPU", file=sys.stderr)
        return 2
    shape, slot_bytes = shape_named(arguments.model, arguments.layers), GPU_SLOT_BYTES if on_gpu else SLOT_BYTES
    shards, engine = (
        trainer_shards(shape, ParallelSizes(tp=arguments.trainer_tp, pp=1, dp=1)),
        engine_parameters(shape, arguments.engine_tp),
    )
    plan = make_plan(shards, engine, matrix_sizes(shape), engines=1, itemsize=2, max_copy_bytes=slot_bytes)
    channels, num_bytes = list(plan.channels()), int(traffic(plan).sum())
    ranks = [(rank, shard.parameters, True) for shard in shards for rank in shard.ranks]
    ranks += [(rank, parameters, False) for rank, parameters in enumerate(engine)]
    devices = devices_of(len(ranks), on_gpu=on_gpu)
    store, port = open_store("127.0.0.1")
    rendezvous = Rendezvous(
        host="127.0.0.1", port=port, generation=0, trainer_ranks=arguments.trainer_tp, engine_ranks=arguments.engine_tp,
        ranks_per_engine=arguments.engine_tp, backend="nccl" if on_gpu else "gloo", hosts=tuple(range(len(ranks))),
    )  # fmt: skip
    transports: dict[str, Rendezvous | None] = {"memory of a GPU" if on_gpu else "shared memory": None}
    if len(set(devices)) == len(ranks) or not on_gpu:  # NCCL refuses two ranks on one GPU
        transports[f"messages ({rendezvous.backend})"] = rendezvous
    rows = [plain_copy(num_bytes, arguments.repeats, devices[0])]
    os.environ.update(nccl_environment(loopback=True) if on_gpu else {})
    with tempfile.TemporaryDirectory(prefix="megatron-hapo-", dir="/dev/shm") as folder:
        transfer = Transfer(
            folder=folder, number=0, plan="benchmark", dtype="bfloat16", slot_bytes=slot_bytes, deadline_seconds=600
        )
        for name, where in transports.items():
            described = replace(transfer, rendezvous=where)
            rows.append(measure(name, ranks, devices, channels, described, arguments.repeats))
    del store
    report(arguments, num_bytes, rows)
    return 0


def shape_named(name: str, layers: int | None) -> Shape:
    """The shape of a model of this name, or of its first layers."""
    if name in _LARGE:
        shape = shape_at(_CONFIGS / _LARGE[name])
    else:
        shape = shape_of(ModelConfig({
            "model_type": "qwen3", "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 1e6,
            **_SMALL[name],
        }, Path("config.json")))  # fmt: skip
    return replace(shape, num_layers=layers or shape.num_layers)


def devices_of(ranks: int, *, on_gpu: bool) -> list[str]:
    """Where each rank's tensors are."""
    return [f"cuda:{rank % torch.cuda.device_count()}" if on_gpu else "cpu" for rank in range(ranks)]


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description="measure the transports alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=(*_SMALL, *_LARGE), default="0.5b")
    parser.add_argument("--layers", type=int, help="only so many of the model's")
    for name, default in (("trainer-tp", 2), ("engine-tp", 1), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def measure(
    name: str, ranks: list[tuple[int, tuple[Parameter, ...], bool]], devices: list[str], channels: list[Channel],
    transfer: Transfer, repeats: int,
) -> Measured:  # fmt: skip
    """Run `repeats` + 1 transfers, with one process for each of the (rank, parameters, is a trainer rank)."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    barrier, answers = context.Barrier(len(ranks)), context.Queue()
    processes = [
        context.Process(target=run_rank, args=(*rank, device, channels, transfer, repeats, barrier, answers))
        for rank, device in zip(ranks, devices, strict=True)
    ]
    for process in processes:
        process.start()
    spans: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    for _ in range(len(ranks) * (repeats + 1)):
        number, *span = answers.get(timeout=1200)
        spans[number].append(tuple(span))
    for process in processes:
        process.join()
        assert process.exitcode == 0, f"a rank's process ended with code {process.exitcode}"
    rounds = [
        (max(end for _, end, _ in span) - min(start for start, _, _ in span), sum(cpu for _, _, cpu in span))
        for number, span in spans.items()
        if number
    ]
    return Measured(name, *min(rounds))


def run_rank(
    rank: int, parameters: tuple[Parameter, ...], sends: bool, device: str, channels: list[Channel],
    transfer: Transfer, repeats: int, barrier: Any, answers: Any,
) -> None:  # fmt: skip
    """One rank's process: puts (transfer, start, end, processor seconds) of each transfer into `answers`."""
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(device)
    # Trainer ranks have ones, engine ranks zeros.
    matrices = {
        p.name: torch.full((p.rows, p.columns), float(sends), dtype=torch.bfloat16, device=device) for p in parameters
    }
    sender, receiver = Sender(rank), Receiver()
    mine = [c for c in channels if (c.source_rank if sends else c.engine_rank) == rank]
    for number in range(repeats + 1):
        numbered = replace(transfer, number=number)
        wait_for_kernels(device)
        barrier.wait()
        start, cpu = time.monotonic(), time.process_time()
        if sends:
            sender.send(mine, matrices, numbered)
        else:
            sources = {channel.source_rank: channel.targets for channel in mine}
            receiver.receive(sources, matrices, numbered, engine=0, engine_rank=rank)
        wait_for_kernels(device)
        answers.put((number, start, time.monotonic(), time.process_time() - cpu))
        wrong = [] if sends or number else [name for name, matrix in matrices.items() if not bool((matrix == 1).all())]
        assert not wrong, f"not received: {wrong}"


def wait_for_kernels(device: str) -> None:
    """Return when the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def plain_copy(num_bytes: int, repeats: int, device: str) -> Measured:
    """A copy between two buffers of the device; on a CPU by one thread, of pages that are already mapped."""
    torch.set_num_threads(1)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    best = (float("inf"), 0.0)
    for _ in range(repeats):
        wait_for_kernels(device)
        start, cpu = time.monotonic(), time.process_time()
        target.copy_(source)
        wait_for_kernels(device)
        best = min(best, (time.monotonic() - start, time.process_time() - cpu))
    return Measured("plain copy", *best)


def report(arguments: argparse.Namespace, num_bytes: int, rows: list[Measured]) -> None:
    """Print the table and the JSON line."""
    table = Table("transport", "seconds", "GB/s", "times the plain copy", "processor seconds")
    for row in rows:
        table.add_row(
            row.transport, f"{row.seconds:.3f}", f"{num_bytes / row.seconds / 1e9:.1f}",
            f"{row.seconds / rows[0].seconds:.1f}", f"{row.cpu_seconds:.3f}",
        )  # fmt: skip
    Console(width=100).print(table)
    sizes = f"trainer tp{arguments.trainer_tp}, engine tp{arguments.engine_tp}"
    print(f"{arguments.model}, {num_bytes / 1e6:.0f} MB, {sizes}, "
          f"load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    figures = {"bytes": num_bytes, "load": os.getloadavg()[0], "transports": [asdict(row) for row in rows]}
    print(json.dumps({"benchmark": "weight_transport", **vars(arguments), **figures}))


if __name__ == "__main__":
    sys.exit(main())
