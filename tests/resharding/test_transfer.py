"""Transfers through shared memory between threads that play the ranks: values, checksums, deadlines, failures."""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hapo.config import ParallelSizes
from megatron_hapo.errors import WeightSyncError
from megatron_hapo.model.families import Shape, hf_tensor_shapes
from megatron_hapo.resharding.channel_ends import BucketHook, ChannelId
from megatron_hapo.resharding.checksum import tensor_checksum
from megatron_hapo.resharding.expected import merge_checksums, partial_checksums
from megatron_hapo.resharding.layouts import engine_parameters, matrix_sizes
from megatron_hapo.resharding.plan import Channel, Parameter, Piece, ReshardingPlan, make_plan
from megatron_hapo.resharding.shared_memory import SlotMemory, _check_user, receive, send
from megatron_hapo.resharding.transfer import Rendezvous, Transfer, as_matrix
from megatron_hapo.resharding.transports import Receiver, Sender
from megatron_hapo.resharding.weight_buckets import engine_cut
from tests.resharding.planned_grid import trainer_shards
from tests.resharding.test_plan import MOE_SHAPE, SHAPE, cut, random_tensors
from tests.time_limits import patient

_numbers = itertools.count()


def make_transfer(folder: Path, **changes: object) -> Transfer:
    transfer = Transfer(
        folder=str(folder), number=next(_numbers), plan="p", dtype="bfloat16", slot_bytes=700, deadline_seconds=20
    )
    return replace(transfer, **changes)  # type: ignore[arg-type]


class Sides:
    """Trainer ranks and engine ranks with real tensors, and the plan between them.

    Tests may set `on_send` and `on_receive` to inject faults.
    """

    on_send: BucketHook | None = None
    on_receive: BucketHook | None = None

    def __init__(
        self, shape: Shape, *, tp: int, pp: int, dp: int, engine_tp: int, engines: int, dtype: torch.dtype,
        ep: int = 1, engine_ep: int = 1,
    ):  # fmt: skip
        self.shape, self.engine_tp = shape, engine_tp
        self.shards = trainer_shards(shape, ParallelSizes(tp=tp, pp=pp, dp=dp, ep=ep))
        self.engine = engine_parameters(shape, engine_tp, engine_ep)
        self.plan: ReshardingPlan = make_plan(
            self.shards, self.engine, matrix_sizes(shape), engines=engines, itemsize=2, max_copy_bytes=700
        )
        tensors = random_tensors(shape)
        self.sources: dict[int, dict[str, Tensor]] = defaultdict(dict)
        self.receivers: dict[tuple[int, int], Receiver] = defaultdict(lambda: Receiver(on_bucket=self._received))
        for shard in self.shards:
            for rank in shard.ranks:
                held = cut(tensors, shard.parameters)
                self.sources[rank] |= {name: torch.tensor(value).to(dtype) for name, value in held.items()}
        self.senders = {rank: Sender(rank, on_bucket=self._sent) for rank in self.sources}
        self.expected = [self._tensors(tensors, rank, dtype) for rank in self.engine]
        self.targets = {
            (engine, rank): {p.name: torch.full((p.rows, p.columns), 7.0).bfloat16() for p in parameters}
            for engine in range(engines)
            for rank, parameters in enumerate(self.engine)
        }
        self.outgoing: dict[int, list[Channel]] = defaultdict(list)
        self.incoming: dict[tuple[int, int], dict[int, tuple[Piece, ...]]] = defaultdict(dict)
        for channel in self.plan.channels():
            self.outgoing[channel.source_rank].append(channel)
            self.incoming[channel.engine, channel.engine_rank][channel.source_rank] = channel.targets

    def _sent(self, channel: ChannelId, number: int, data: Tensor) -> None:
        if self.on_send is not None:
            self.on_send(channel, number, data)

    def _received(self, channel: ChannelId, number: int, data: Tensor) -> None:
        if self.on_receive is not None:
            self.on_receive(channel, number, data)

    @staticmethod
    def _tensors(tensors, parameters: tuple[Parameter, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: torch.tensor(v).to(dtype).bfloat16().nan_to_num(7.0) for n, v in cut(tensors, parameters).items()}

    def rendezvous(self, port: int, hosts: tuple[int, ...] | None = None) -> Rendezvous:
        """The rendezvous of these ranks, over gloo on this machine; None: as if each had a host of its own."""
        return Rendezvous(
            host="127.0.0.1", port=port, generation=0, trainer_ranks=len(self.sources), engine_ranks=len(self.targets),
            ranks_per_engine=self.engine_tp, backend="gloo",
            hosts=hosts or tuple(range(len(self.sources) + len(self.targets))),
        )  # fmt: skip

    def run(self, transfer: Transfer, *, without: tuple[int, ...] = ()) -> None:
        """Carries out the transfer with a thread per rank, but without these trainer ranks; sets `errors`."""
        calls: list[Callable[[], object]] = [
            (lambda rank=rank, channels=channels: self.senders[rank].send(channels, self.sources[rank], transfer))
            for rank, channels in self.outgoing.items()
            if rank not in without
        ]
        calls += [
            (
                lambda key=key: self.receivers[key].receive(
                    self.incoming[key], self.targets[key], transfer, engine=key[0], engine_rank=key[1]
                )
            )
            for key in self.targets
        ]
        with ThreadPoolExecutor(len(calls)) as threads:
            futures = [threads.submit(call) for call in calls]
        errors = [future.exception() for future in futures]
        self.errors = [str(error) for error in errors if error]
        for error in errors:
            if error is not None and not isinstance(error, WeightSyncError):
                raise error


CASES = [
    {"tp": 1, "pp": 1, "dp": 1, "engine_tp": 1, "engines": 1},
    {"tp": 2, "pp": 2, "dp": 1, "engine_tp": 1, "engines": 1},
    {"tp": 2, "pp": 2, "dp": 2, "engine_tp": 2, "engines": 2},
    {"tp": 1, "pp": 2, "dp": 2, "engine_tp": 8, "engines": 1},
    {"tp": 1, "pp": 2, "dp": 2, "ep": 2, "engine_tp": 2, "engines": 1},
    {"tp": 2, "pp": 1, "dp": 2, "ep": 4, "engine_tp": 2, "engine_ep": 2, "engines": 2},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engines_hold_the_reference_slices_and_checksums_match(tmp_path, case, dtype) -> None:
    shape = MOE_SHAPE if "ep" in case else replace(SHAPE, tied_embeddings=case["tp"] == 2)
    sides = Sides(shape, **case, dtype=dtype)
    sides.run(make_transfer(tmp_path))
    assert not sides.errors
    for (_, rank), held in sides.targets.items():
        for name, want in sides.expected[rank].items():
            assert torch.equal(held[name], want), name
    assert not list(tmp_path.iterdir())
    # The ranks' contributions to the checksums add up to those of slices of whole tensors.
    cut_of_engine = engine_cut(shape, tp=case["engine_tp"], ep=case.get("engine_ep", 1))
    sums = merge_checksums(
        partial_checksums(
            blocks, sides.sources[rank], shapes=hf_tensor_shapes(shape), cut=cut_of_engine, dtype=torch.bfloat16
        )
        for rank, blocks in sides.plan.owned_blocks().items()
    )
    wholes = {name: torch.tensor(value).to(dtype).bfloat16() for name, value in random_tensors(shape).items()}
    assert sums == {
        name: cut_of_engine.checksums(name, whole.view(hf_tensor_shapes(shape)[name])) for name, whole in wholes.items()
    }
    assert sums["model.norm.weight"] == [tensor_checksum(wholes["model.norm.weight"])] * case["engine_tp"]


def test_the_next_transfer_reuses_the_slots_for_new_values(tmp_path) -> None:
    sides, transfer = small(tmp_path)
    sides.run(transfer)
    for held in sides.sources.values():
        for tensor in held.values():
            tensor.neg_()
    sides.run(replace(transfer, number=next(_numbers)))
    assert not sides.errors
    for name, want in sides.expected[0].items():
        assert torch.equal(sides.targets[0, 0][name], torch.where(want == 7.0, want, -want)), name


def small(tmp_path: Path, **changes: object) -> tuple[Sides, Transfer]:
    sides = Sides(SHAPE, tp=2, pp=1, dp=1, engine_tp=1, engines=1, dtype=torch.float32)
    return sides, make_transfer(tmp_path, **changes)


def test_a_sender_that_never_connects_is_named_with_its_parameter(tmp_path) -> None:
    seconds = patient(2)  # enough for rank 0, whose values arrive
    sides, transfer = small(tmp_path, deadline_seconds=seconds)
    sides.run(transfer, without=(1,))
    assert sides.errors == [
        f"receiving weights: timed out after {seconds:g} s: trainer rank 1 to engine 0, rank 0: "
        "model.embed_tokens.weight"
    ]
    assert [path.suffix for path in tmp_path.iterdir()] == [".failed"]


def test_an_engine_that_never_listens_is_named(tmp_path) -> None:
    sides, transfer = small(tmp_path, deadline_seconds=0.3)
    sides.targets = {}
    sides.run(transfer)
    late = r"connecting: timed out after 0.3 s: trainer rank \d to engine 0, rank 0: model.embed_tokens.weight"
    assert any(re.fullmatch(late, error) for error in sides.errors)
    assert len(sides.errors) == 2


def test_an_engine_that_fails_during_the_transfer_is_noticed_at_once(tmp_path) -> None:
    sides, transfer = small(tmp_path, deadline_seconds=60)
    received = itertools.count()

    def fail(channel: ChannelId, number: int, data: Tensor) -> None:
        if next(received) == 5:
            raise WeightSyncError("died")

    sides.on_receive = fail
    start = time.monotonic()
    sides.run(transfer)
    assert time.monotonic() - start < 20
    assert len(sides.errors) == 3
    assert any("trainer rank 0 to engine 0, rank 0: " in error for error in sides.errors)
    sides.on_receive = None
    sides.run(replace(transfer, number=next(_numbers)))  # nothing remains of the failed one
    assert not sides.errors


def test_a_trainer_rank_that_is_slower_than_the_deadline_is_named(tmp_path) -> None:
    sides, transfer = small(tmp_path, deadline_seconds=0.6)

    def delay(channel: ChannelId, number: int, data: Tensor) -> None:
        if channel.source_rank == 1 and number == 2:
            time.sleep(1.5)

    sides.on_send = delay
    sides.run(transfer)
    assert any("receiving weights: timed out after 0.6 s: trainer rank 1 to engine 0" in e for e in sides.errors)


def send_and_fail(sides: Sides, transfer: Transfer) -> None:
    with pytest.raises(WeightSyncError):
        send(sides.outgoing[0], sides.sources[0], transfer, SlotMemory())


def test_ranks_with_different_plans_fail(tmp_path) -> None:
    sides, transfer = small(tmp_path)
    sender = threading.Thread(target=send_and_fail, args=(sides, replace(transfer, plan="q")))
    sender.start()
    with pytest.raises(WeightSyncError, match=r"trainer rank 0 to engine 0, rank 0: .*have different resharding plans"):
        receive(sides.incoming[0, 0], sides.targets[0, 0], transfer, {}, engine=0, engine_rank=0)
    sender.join(patient(30))


def test_a_parameter_that_is_not_contiguous_is_an_error() -> None:
    with pytest.raises(WeightSyncError, match="not contiguous"):
        as_matrix(torch.zeros(4, 4).t())


def test_a_process_of_another_user_is_refused_where_a_socket_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _check_user(ours)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(ConnectionRefusedError, match="the other end belongs to user"):
            _check_user(ours)


def test_sockets_have_files_on_one_host_only(tmp_path: Path) -> None:
    transfer = make_transfer(tmp_path)
    assert transfer.address(1, 0) == f"{tmp_path}/{transfer.number}.1.0"
    group = Rendezvous(
        host="h", port=1, generation=0, trainer_ranks=1, engine_ranks=1, ranks_per_engine=1, backend="gloo",
        hosts=(0, 1),
    )  # fmt: skip
    assert replace(transfer, rendezvous=group).address(1, 0) == f"\0{tmp_path}/{transfer.number}.1.0"
