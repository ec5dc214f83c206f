"""Ranks of torchrun find each other in a store that outlives them, and say at once why they cannot work together."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from torch.distributed import HashStore

from megatron_hapo.config import Config
from megatron_hapo.errors import ConfigError, TrainingError
from megatron_hapo.launch.torchrun import attempt
from megatron_hapo.launch.torchrun.attempt import Facts, RefusedError

CONFIG = {"seed": 1, "optimizer": {"lr": 1e-6}}


def facts(**changes: Any) -> Facts:
    return Facts(**{"host": "a", "process": 1, "ranks_here": 2, "num_gpus": 2, "config": CONFIG, **changes})


def test_ranks_of_a_second_attempt_do_not_take_the_first_ones_orders() -> None:
    store, joined = HashStore(), []

    def follow() -> None:
        joined.append(attempt.join(store, facts(process=2), rank=1, timeout_seconds=20))

    for number in (1, 2):
        rank = threading.Thread(target=follow)
        if number == 2:
            rank.start()  # comes before rank 0 has named the new attempt
        name = attempt.announce(store)
        if number == 1:
            rank.start()
        every = attempt.gather_facts(store, name, world_size=2, own=facts(), timeout_seconds=20)
        assert [fact.process for fact in every] == [1, 2]
        attempt.begin(store, name, {"number": number})
        attempt.run_store(store, name).set("key", str(number))
        rank.join(20)
        own_store, orders = joined[-1]
        assert orders == {"number": number}
        assert own_store.get("key") == str(number).encode()


def test_an_attempt_that_was_called_off_is_no_attempt() -> None:
    store = HashStore()
    attempt.call_off(store, attempt.announce(store))
    with pytest.raises(RefusedError):
        attempt.join(store, facts(), rank=1, timeout_seconds=20)


def test_ranks_that_do_not_come_are_named() -> None:
    store = HashStore()
    with pytest.raises(TrainingError, match=r"trainer ranks \[1, 2\] did not start within 0.1 s"):
        attempt.gather_facts(store, attempt.announce(store), world_size=3, own=facts(), timeout_seconds=0.1)
    with pytest.raises(TrainingError, match="rank 0 did not begin within"):
        attempt.join(HashStore(), facts(), rank=1, timeout_seconds=0.1)


@pytest.mark.parametrize(
    ("world_size", "hint"),
    [(12, "set parallel.dp=3, or start 8 ranks"), (6, "must be a multiple of tp x pp x cp = 4")],
)
def test_a_world_that_the_layout_does_not_divide(world_size: int, hint: str) -> None:
    config = Config.model_validate(
        {
            "name": "x", "steps": 1, "model": {"path": "m"}, "parallel": {"tp": 2, "pp": 2, "dp": 2},
            "data": {"train": {"type": "arithmetic", "size": 1}},
        }
    )  # fmt: skip
    attempt.check_world_size(config, 8)
    with pytest.raises(ConfigError, match=hint) as fault:
        attempt.check_world_size(config, world_size)
    assert f"8 ranks, torchrun started {world_size}" in str(fault.value)


def test_every_fault_of_every_host_is_told_once() -> None:
    other = {"seed": 2, "optimizer": {"lr": 1e-6}}
    every = [
        facts(),
        facts(),
        facts(host="b", num_gpus=1),
        facts(host="b", num_gpus=1),
        facts(host="c", config=other),
        facts(host="d", config=None, fault="x.yaml: no such config file"),
    ]
    with pytest.raises(ConfigError) as fault:
        attempt.check_facts(every, device="cuda")
    assert fault.value.faults == [
        "b: 1 GPUs for 2 trainer ranks; start torchrun there with --nproc-per-node 1",
        "c: its config says seed=2, that of rank 0 seed=1; start every node with the same config",
        "d: x.yaml: no such config file",
    ]
    attempt.check_facts([facts(num_gpus=0)] * 2, device="cpu")
