"""Transfers by messages of a gloo group between threads that play the ranks: values, deadlines, failures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore

from megatron_hapo.errors import WeightSyncError
from megatron_hapo.resharding import process_group
from megatron_hapo.resharding.channel_ends import ChannelId
from megatron_hapo.resharding.process_group import open_store
from megatron_hapo.resharding.transports import is_within_host
from tests.resharding.test_plan import MOE_SHAPE, SHAPE
from tests.resharding.test_transfer import CASES, Sides, make_transfer


@pytest.fixture
def port() -> Iterator[int]:
    store, port = open_store("127.0.0.1")
    yield port
    del store


@pytest.mark.parametrize("case", CASES)
def test_engines_hold_the_reference_slices_after_each_of_two_transfers(
    tmp_path: Path, port: int, case: dict[str, int]
) -> None:
    shape = MOE_SHAPE if "ep" in case else SHAPE
    sides = Sides(shape, **case, dtype=torch.float32)
    for _ in range(2):  # the second transfer uses the group of the first
        for targets in sides.targets.values():
            for tensor in targets.values():
                tensor.fill_(7.0)
        sides.run(make_transfer(tmp_path, rendezvous=sides.rendezvous(port)))
        assert not sides.errors
        for (_, rank), held in sides.targets.items():
            for name, want in sides.expected[rank].items():
                assert torch.equal(held[name], want), name


def small() -> Sides:
    return Sides(SHAPE, tp=2, pp=1, dp=1, engine_tp=1, engines=1, dtype=torch.float32)


def test_ranks_that_miss_the_rendezvous_are_named(tmp_path: Path, port: int) -> None:
    sides = small()
    sides.run(make_transfer(tmp_path, deadline_seconds=0.5, rendezvous=sides.rendezvous(port)), without=(1,))
    assert sides.errors == ["connecting: timed out after 0.5 s: trainer rank 1"] * 2


def test_a_rank_that_fails_is_noticed_at_once_and_the_next_transfer_works(tmp_path: Path, port: int) -> None:
    sides = small()
    rendezvous = sides.rendezvous(port)

    def fail(channel: ChannelId, number: int, data: Tensor) -> None:
        if channel.source_rank == 1 and number == 5:
            raise WeightSyncError("died")

    sides.on_send = fail
    start = time.monotonic()
    sides.run(make_transfer(tmp_path, deadline_seconds=60, rendezvous=rendezvous))
    assert time.monotonic() - start < 30
    assert len(sides.errors) == 3
    assert "died" in sides.errors, sides.errors
    assert sum(error.endswith("stopped because trainer rank 1 failed") for error in sides.errors) == 2, sides.errors
    sides.on_send = None
    sides.run(make_transfer(tmp_path, rendezvous=replace(rendezvous, generation=1)))
    assert not sides.errors


def test_a_rank_slower_than_the_deadline_is_named(tmp_path: Path, port: int) -> None:
    sides = small()

    def delay(channel: ChannelId, number: int, data: Tensor) -> None:
        if channel.source_rank == 1 and number == 2:
            time.sleep(3)

    sides.on_send = delay
    sides.run(make_transfer(tmp_path, deadline_seconds=1.5, rendezvous=sides.rendezvous(port)))
    named = "receiving weights: timed out after 1.5 s: trainer rank 1 to engine 0, rank 0: model."
    assert any(error.startswith(named) for error in sides.errors)


def test_ranks_whose_nccl_settings_differ_are_named_before_the_group_is_made(tmp_path: Path, port: int) -> None:
    sides = small()
    transfer = make_transfer(tmp_path, rendezvous=replace(sides.rendezvous(port), backend="nccl"))
    assert transfer.rendezvous is not None
    server = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=10))
    store = PrefixStore(f"{transfer.plan}/{transfer.rendezvous.generation}", server)
    store.set("rank/1", '{"NCCL_CUMEM_ENABLE": "1"}')
    sides.run(transfer, without=(1,))
    assert len(sides.errors) == 2
    named = "connecting: trainer rank 0 has NCCL_CUMEM_ENABLE=, but trainer rank 1 has NCCL_CUMEM_ENABLE=1; "
    assert all(error.startswith(named) for error in sides.errors), sides.errors


def test_nccl_gives_up_after_the_deadline_of_any_transfer(tmp_path: Path, port: int) -> None:
    """Its watchdog would end the process; a group lives for many transfers, so what remained of one is no limit."""
    transfer = make_transfer(tmp_path, deadline_seconds=300, rendezvous=small().rendezvous(port))
    assert process_group._nccl_limit(transfer) == timedelta(seconds=300 + process_group.NCCL_MARGIN_SECONDS)


@pytest.mark.parametrize("engine_hosts", [(0, 0, 1, 1), (1, 1, 0, 0), (0, 0, 2, 2)])
def test_each_pair_of_ranks_has_the_transport_of_its_hosts(
    tmp_path: Path, port: int, engine_hosts: tuple[int, ...]
) -> None:
    """Two hosts, each with half of the trainer's ranks and one engine; and an engine on a third."""
    sides = Sides(SHAPE, tp=2, pp=2, dp=1, engine_tp=2, engines=2, dtype=torch.float32)
    hosts = (0, 0, 1, 1, *engine_hosts)
    transfer = make_transfer(tmp_path, rendezvous=sides.rendezvous(port, hosts))
    near, far = set(), set()
    for channel in sides.plan.channels():
        key = ChannelId.of(channel)
        same = hosts[key.source_rank] == engine_hosts[2 * key.engine + key.engine_rank]
        (near if same else far).add(key)
        assert is_within_host(key, transfer) is same
    assert near
    assert far
    for _ in range(2):
        sides.run(transfer)
        assert not sides.errors
        for (_, rank), held in sides.targets.items():
            for name, want in sides.expected[rank].items():
                assert torch.equal(held[name], want), name
                held[name].fill_(7.0)
        transfer = replace(transfer, number=transfer.number + 1000)
    assert not list(tmp_path.iterdir()), "sockets between several hosts have no files"
    used = {ChannelId(rank, *key) for rank, sender in sides.senders.items() for key in sender._memory._host}
    assert used == near


def test_a_rank_that_fails_within_its_host_ends_the_transfer_between_hosts(tmp_path: Path, port: int) -> None:
    sides = Sides(SHAPE, tp=2, pp=1, dp=1, engine_tp=1, engines=2, dtype=torch.float32)

    def fail(channel: ChannelId, number: int, data: Tensor) -> None:
        if channel == (0, 0, 0) and number == 2:
            raise WeightSyncError("died")

    sides.on_send = fail
    start = time.monotonic()
    sides.run(make_transfer(tmp_path, deadline_seconds=60, rendezvous=sides.rendezvous(port, (0, 1, 0, 1))))
    assert time.monotonic() - start < 30
    assert "died" in sides.errors
    assert len(sides.errors) == 4
