"""Transfers between two processes on one GPU, through slots in its memory: values, and GB/s next to a plain copy."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace

import torch
import torch.multiprocessing as multiprocessing

from megatron_hapo.config import ParallelSizes
from megatron_hapo.resharding.layouts import engine_parameters, matrix_sizes
from megatron_hapo.resharding.plan import make_plan
from megatron_hapo.resharding.transfer import Transfer
from megatron_hapo.resharding.transports import Receiver, Sender
from tests.resharding.planned_grid import trainer_shards
from tests.resharding.test_plan import SHAPE

SHAPE_1GB = replace(
    SHAPE, num_layers=16, hidden_size=2048, ffn_size=6144, num_heads=16, num_kv_heads=8, head_dim=128,
    vocab_size=32768, qkv_bias=False,
)  # fmt: skip
SLOT_BYTES = 64 << 20
SYNCS = 4


def make() -> tuple:
    shards, engine = trainer_shards(SHAPE_1GB, ParallelSizes(tp=1, pp=1, dp=1)), engine_parameters(SHAPE_1GB, 1)
    plan = make_plan(shards, engine, matrix_sizes(SHAPE_1GB), engines=1, itemsize=2, max_copy_bytes=SLOT_BYTES)
    return shards[0].parameters, engine[0], next(plan.channels())


def transfer_in(folder: str, number: int) -> Transfer:
    return Transfer(
        folder=folder, number=number, plan="p", dtype="bfloat16", slot_bytes=SLOT_BYTES, deadline_seconds=60
    )


def value_of(index: int, sync: int) -> float:
    """The value of all elements of a parameter in a sync, exact in bfloat16."""
    return float(1 + (7 * index + sync) % 100)


def send_all(folder: str) -> None:
    """The trainer rank's process."""
    held, _, channel = make()
    matrices = {p.name: torch.empty(p.rows, p.columns, dtype=torch.bfloat16, device="cuda") for p in held}
    sender = Sender(0)
    for sync in range(SYNCS):
        for index, matrix in enumerate(matrices.values()):
            matrix.fill_(value_of(index, sync))
        sender.send([channel], matrices, transfer_in(folder, sync))


def test_two_processes_on_one_gpu_transfer_through_its_memory() -> None:
    held, wanted, channel = make()
    matrices = {p.name: torch.zeros(p.rows, p.columns, dtype=torch.bfloat16, device="cuda") for p in wanted}
    names = {parameter.name: index for index, parameter in enumerate(held)}
    receiver, seconds = Receiver(), []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        process = multiprocessing.get_context("spawn").Process(target=send_all, args=(folder,))
        process.start()
        for sync in range(SYNCS):
            start = time.perf_counter()
            moved = receiver.receive({0: channel.targets}, matrices, transfer_in(folder, sync), engine=0, engine_rank=0)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            for source, target in zip(channel.sources, channel.targets, strict=True):
                rows = matrices[target.parameter][target.row : target.row + target.rows]
                place = rows[:, target.column : target.column + target.columns]
                assert bool((place == value_of(names[source.parameter], sync)).all()), (sync, target.parameter)
        process.join(60)
    assert process.exitcode == 0
    assert len(receiver._opened) == 1  # the handle was opened only once
    source = torch.empty(moved, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    copy.copy_(source)
    torch.cuda.synchronize()
    plain = time.perf_counter() - start
    print(
        f"{moved / 1e9:.2f} GB: {moved / min(seconds[1:]) / 1e9:.0f} GB/s, device to device {moved / plain / 1e9:.0f}"
    )
