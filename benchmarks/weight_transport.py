"""Time that the two transports of a direct weight sync need, compared with a plain copy of the same bytes.

    python benchmarks/weight_transport.py [--layers 28] [--trainer-tp 2] [--engine-tp 1] [--repeats 10]

Trainer and engine ranks are plain processes with the tensors of a Qwen3 in bfloat16 (0.5B parameters by default). There
is no Ray, Megatron or SGLang, so this is the cost of packing, passing and copying alone; `weight_sync.py` measures the
whole sync. The first transfer, which allocates the slots, is not counted. Reported is the best of the repeats, from the
first rank's start to the last rank's end, and the processor seconds of all ranks in that repeat. Prints a table, and
the same as JSON in the last line.
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

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_hapo.config import ParallelSizes
from megatron_hapo.model.families import ModelConfig, Shape, shape_of
from megatron_hapo.resharding.layouts import engine_parameters, matrix_sizes
from megatron_hapo.resharding.plan import Channel, Parameter, make_plan
from megatron_hapo.resharding.process_group import open_store
from megatron_hapo.resharding.transfer import Rendezvous, Transfer
from megatron_hapo.resharding.transports import Receiver, Sender
from megatron_hapo.weight_sync import SLOT_BYTES
from tests.resharding.planned_grid import traffic, trainer_shards


@dataclass
class Measured:
    """One row of the table: the best of the repeats."""

    transport: str
    seconds: float
    cpu_seconds: float


def main() -> None:
    """Measure, and print the results; see the top of the file."""
    arguments = parse_arguments()
    shape = shape_of(ModelConfig({
        "model_type": "qwen3", "num_hidden_layers": arguments.layers, "hidden_size": 1024, "intermediate_size": 3072,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 65536,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 1e6,
    }, Path("config.json")))  # fmt: skip
    shards, engine = (
        trainer_shards(shape, ParallelSizes(tp=arguments.trainer_tp, pp=1, dp=1)),
        engine_parameters(shape, arguments.engine_tp),
    )
    plan = make_plan(shards, engine, matrix_sizes(shape), engines=1, itemsize=2, max_copy_bytes=SLOT_BYTES)
    channels, num_bytes = list(plan.channels()), int(traffic(plan).sum())
    store, port = open_store("127.0.0.1")
    rendezvous = Rendezvous(
        host="127.0.0.1", port=port, generation=0, trainer_ranks=arguments.trainer_tp, engine_ranks=arguments.engine_tp,
        ranks_per_engine=arguments.engine_tp, backend="gloo",
        hosts=tuple(range(arguments.trainer_tp + arguments.engine_tp)),
    )  # fmt: skip
    rows = [plain_copy(num_bytes, arguments.repeats)]
    with tempfile.TemporaryDirectory(prefix="megatron-hapo-", dir="/dev/shm") as folder:
        transfer = Transfer(
            folder=folder, number=0, plan="benchmark", dtype="bfloat16", slot_bytes=SLOT_BYTES, deadline_seconds=600
        )
        for name, where in (("shared memory", None), ("messages (gloo)", rendezvous)):
            ranks = [(rank, shard.parameters, True) for shard in shards for rank in shard.ranks]
            ranks += [(rank, parameters, False) for rank, parameters in enumerate(engine)]
            rows.append(measure(name, ranks, channels, replace(transfer, rendezvous=where), arguments.repeats))
    del store
    report(arguments, shape, num_bytes, rows)


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description="measure the transports alone")
    for name, default in (("layers", 28), ("trainer-tp", 2), ("engine-tp", 1), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def measure(
    name: str, ranks: list[tuple[int, tuple[Parameter, ...], bool]], channels: list[Channel], transfer: Transfer,
    repeats: int,
) -> Measured:  # fmt: skip
    """Run `repeats` + 1 transfers, with one process for each of the (rank, parameters, is a trainer rank)."""
    context = multiprocessing.get_context("fork")  # the processes need not import anything again
    barrier, answers = context.Barrier(len(ranks)), context.Queue()
    processes = [
        context.Process(target=run_rank, args=(*rank, channels, transfer, repeats, barrier, answers)) for rank in ranks
    ]
    for process in processes:
        process.start()
    spans: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    for _ in range(len(ranks) * (repeats + 1)):
        number, *span = answers.get(timeout=1200)
        spans[number].append(tuple(span))
    for process in processes:
        process.join()
    rounds = [
        (max(end for _, end, _ in span) - min(start for start, _, _ in span), sum(cpu for _, _, cpu in span))
        for number, span in spans.items()
        if number
    ]
    return Measured(name, *min(rounds))


def run_rank(
    rank: int, parameters: tuple[Parameter, ...], sends: bool, channels: list[Channel], transfer: Transfer,
    repeats: int, barrier, answers,
) -> None:  # fmt: skip
    """One rank's process: puts (transfer, start, end, processor seconds) of each transfer into `answers`."""
    torch.set_num_threads(1)
    matrices = {p.name: torch.ones(p.rows, p.columns, dtype=torch.bfloat16) for p in parameters}
    sender, receiver = Sender(rank), Receiver()
    mine = [c for c in channels if (c.source_rank if sends else c.engine_rank) == rank]
    for number in range(repeats + 1):
        numbered = replace(transfer, number=number)
        barrier.wait()
        start, cpu = time.monotonic(), time.process_time()
        if sends:
            sender.send(mine, matrices, numbered)
        else:
            sources = {channel.source_rank: channel.targets for channel in mine}
            receiver.receive(sources, matrices, numbered, engine=0, engine_rank=rank)
        answers.put((number, start, time.monotonic(), time.process_time() - cpu))


def plain_copy(num_bytes: int, repeats: int) -> Measured:
    """One thread's copy between two buffers whose pages are already mapped."""
    torch.set_num_threads(1)
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source).copy_(source)
    best = (float("inf"), 0.0)
    for _ in range(repeats):
        start, cpu = time.monotonic(), time.process_time()
        target.copy_(source)
        best = min(best, (time.monotonic() - start, time.process_time() - cpu))
    return Measured("plain copy", *best)


def report(arguments: argparse.Namespace, shape: Shape, num_bytes: int, rows: list[Measured]) -> None:
    """Print the table and the JSON line."""
    table = Table("transport", "seconds", "GB/s", "times the plain copy", "processor seconds")
    for row in rows:
        table.add_row(
            row.transport, f"{row.seconds:.3f}", f"{num_bytes / row.seconds / 1e9:.1f}",
            f"{row.seconds / rows[0].seconds:.1f}", f"{row.cpu_seconds:.3f}",
        )  # fmt: skip
    Console(width=100).print(table)
    print(f"{num_bytes / 1e6:.0f} MB, trainer tp{arguments.trainer_tp}, engine tp{arguments.engine_tp}, "
          f"load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    figures = {"bytes": num_bytes, "load": os.getloadavg()[0], "transports": [asdict(row) for row in rows]}
    print(json.dumps({"benchmark": "weight_transport", **vars(arguments), **figures}))


if __name__ == "__main__":
    main()
