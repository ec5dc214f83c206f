"""Colocated engines stand on the GPUs of known trainer ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hapo.config import load_config
from megatron_hapo.errors import ConfigError
from megatron_hapo.launch.places import Place, beside_ranks, check_gpus
from megatron_hapo.launch.ray.engine_pool import _actor_options
from megatron_hapo.launch.torchrun.host import is_single_host
from megatron_hapo.launch.torchrun.rank_rendezvous import RankPlace

_CONFIG = Path(__file__).parents[2] / "configs/demo_cpu.yaml"
TWO_NODES = [Place(node, (str(gpu),)) for node in ("a", "b") for gpu in (4, 5, 6, 7)]


def test_an_engine_stands_on_the_gpus_of_its_ranks_in_their_order() -> None:
    assert beside_ranks(TWO_NODES, engines=4, tp=2) == [
        Place("a", ("4", "5")),
        Place("a", ("6", "7")),
        Place("b", ("4", "5")),
        Place("b", ("6", "7")),
    ]
    assert beside_ranks(TWO_NODES, engines=1, tp=4) == [Place("a", ("4", "5", "6", "7"))]


def test_on_a_cpu_it_stands_on_the_node_of_its_ranks() -> None:
    assert beside_ranks([Place("a"), Place("a"), Place("b")], engines=3, tp=1) == [Place("a"), Place("a"), Place("b")]


def test_an_engine_on_two_nodes_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"rollout.tp: engine 1 of tp=3 would stand on .* of trainer ranks 3 to 5"):
        beside_ranks(TWO_NODES, engines=2, tp=3)


def test_ray_counts_shared_gpus_once() -> None:
    """They are the trainer ranks' in its books; an engine is shown them by name."""
    node = "ab" * 28
    shared = _actor_options(2, "cuda", Place(node, ("4", "5")))
    assert shared["num_gpus"] == 0
    assert shared["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert _actor_options(2, "cuda", Place(node))["num_gpus"] == 2
    assert _actor_options(2, "cuda", None)["scheduling_strategy"] == "DEFAULT"


def test_gpus_that_never_come_are_not_waited_for() -> None:
    config = load_config(_CONFIG, ["parallel.dp=2", "rollout.engines=3"])
    check_gpus(config, here=4, everywhere=7)
    with pytest.raises(ConfigError, match=r"parallel: 4 trainer ranks need .* this node has 2; .*torchrun"):
        check_gpus(config, here=2, everywhere=16)
    with pytest.raises(ConfigError, match=r"3 engines of tp=1 need 3 GPUs beside the 4 of the trainer, and Ray has 6"):
        check_gpus(config, here=4, everywhere=6)
    check_gpus(config.model_copy(update={"placement": "colocated"}), here=4, everywhere=4)


@pytest.mark.parametrize(
    ("nodes", "engines", "cluster", "alone"),
    [
        (1, "trainer_nodes", None, True),
        (2, "trainer_nodes", None, False),
        (1, "own_nodes", None, False),
        (1, "trainer_nodes", "10.0.0.1:6379", False),
        (1, "trainer_nodes", "127.0.0.1:6379", True),
    ],
)
def test_a_torchrun_node_listens_on_loopback_only_if_all_is_on_it(
    monkeypatch: pytest.MonkeyPatch, nodes: int, engines: str, cluster: str | None, alone: bool
) -> None:
    if cluster is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", cluster)
    rank = RankPlace(rank=0, world_size=2, local_rank=0, local_world_size=1, node=0, num_nodes=nodes)
    assert is_single_host(rank, load_config(_CONFIG, [f"launch.engines={engines}"])) == alone
