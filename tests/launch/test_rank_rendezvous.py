"""Ranks meet in a store that outlives them, and every reason why they cannot work together is reported at once."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from torch.distributed import HashStore

from megatron_hapo.config import Config
from megatron_hapo.errors import ConfigError, TrainingError
from megatron_hapo.launch.torchrun import rank_rendezvous
from megatron_hapo.launch.torchrun.rank_rendezvous import AttemptCancelledError, RankInfo
from tests.time_limits import patient

CONFIG = {"seed": 1, "optimizer": {"lr": 1e-6}}


def info(**changes: Any) -> RankInfo:
    return RankInfo(**{"host": "a", "process": 1, "ranks_here": 2, "num_gpus": 2, "config": CONFIG, **changes})


def test_ranks_of_a_second_attempt_do_not_follow_the_firsts_instructions() -> None:
    store, joined = HashStore(), []

    def join() -> None:
        joined.append(rank_rendezvous.join(store, info(process=2), rank=1, timeout_seconds=patient(20)))

    for number in (1, 2):
        rank = threading.Thread(target=join)
        if number == 2:
            rank.start()  # joins before rank 0 has announced the new attempt
        name = rank_rendezvous.announce(store)
        if number == 1:
            rank.start()
        infos = rank_rendezvous.gather_infos(store, name, world_size=2, own=info(), timeout_seconds=patient(20))
        assert [info.process for info in infos] == [1, 2]
        rank_rendezvous.release(store, name, {"number": number})
        rank_rendezvous.attempt_store(store, name).set("key", str(number))
        rank.join(patient(20))
        own_store, instructions = joined[-1]
        assert instructions == {"number": number}
        assert own_store.get("key") == str(number).encode()


def test_no_rank_joins_a_cancelled_attempt() -> None:
    store = HashStore()
    rank_rendezvous.cancel(store, rank_rendezvous.announce(store))
    with pytest.raises(AttemptCancelledError):
        rank_rendezvous.join(store, info(), rank=1, timeout_seconds=patient(20))


def test_ranks_that_do_not_join_are_named() -> None:
    store = HashStore()
    with pytest.raises(TrainingError, match=r"trainer ranks \[1, 2\] did not start within 0.1 s"):
        rank_rendezvous.gather_infos(
            store, rank_rendezvous.announce(store), world_size=3, own=info(), timeout_seconds=0.1
        )
    with pytest.raises(TrainingError, match="rank 0 did not start the run within"):
        rank_rendezvous.join(HashStore(), info(), rank=1, timeout_seconds=0.1)


@pytest.mark.parametrize(
    ("world_size", "hint"),
    [(12, "set parallel.dp=3, or start 8 ranks"), (6, "must be a multiple of tp x pp x cp = 4")],
)
def test_a_world_size_that_is_not_the_layouts_is_refused(world_size: int, hint: str) -> None:
    config = Config.model_validate(
        {
            "name": "x", "steps": 1, "model": {"path": "m"}, "parallel": {"tp": 2, "pp": 2, "dp": 2},
            "data": {"train": {"type": "arithmetic", "size": 1}},
        }
    )  # fmt: skip
    rank_rendezvous.check_world_size(config, 8)
    with pytest.raises(ConfigError, match=hint) as fault:
        rank_rendezvous.check_world_size(config, world_size)
    assert f"8 ranks, torchrun started {world_size}" in str(fault.value)


def test_every_fault_of_every_host_is_reported_once() -> None:
    other = {"seed": 2, "optimizer": {"lr": 1e-6}}
    infos = [
        info(),
        info(),
        info(host="b", num_gpus=1),
        info(host="b", num_gpus=1),
        info(host="c", config=other),
        info(host="d", config=None, fault="x.yaml: no such config file"),
    ]
    with pytest.raises(ConfigError) as fault:
        rank_rendezvous.check_infos(infos, device="cuda")
    assert fault.value.faults == [
        "b: 1 GPUs for 2 trainer ranks; start torchrun there with --nproc-per-node 1",
        "c: its config has seed=2, rank 0's has seed=1; start every node with the same config",
        "d: x.yaml: no such config file",
    ]
    rank_rendezvous.check_infos([info(num_gpus=0)] * 2, device="cpu")
