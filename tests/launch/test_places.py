"""Placement: colocated engines use the GPUs of known trainer ranks; others are spread over the nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hapo.config import load_config
from megatron_hapo.errors import ConfigError
from megatron_hapo.launch.places import GpuPlacement, beside_ranks, spread
from megatron_hapo.launch.ray.engine_actor import actor_options
from megatron_hapo.launch.torchrun.host import is_single_host
from megatron_hapo.launch.torchrun.rank_rendezvous import RankPlace

_CONFIG = Path(__file__).parents[2] / "configs/demo_cpu.yaml"
TWO_NODES = [GpuPlacement(node, (str(gpu),)) for node in ("a", "b") for gpu in (4, 5, 6, 7)]


def test_a_colocated_engine_uses_the_gpus_of_its_ranks_in_their_order() -> None:
    assert beside_ranks(TWO_NODES, engines=4, tp=2) == [
        GpuPlacement("a", ("4", "5")),
        GpuPlacement("a", ("6", "7")),
        GpuPlacement("b", ("4", "5")),
        GpuPlacement("b", ("6", "7")),
    ]
    assert beside_ranks(TWO_NODES, engines=1, tp=4) == [GpuPlacement("a", ("4", "5", "6", "7"))]


def test_on_a_cpu_a_colocated_engine_is_on_the_node_of_its_ranks() -> None:
    assert beside_ranks([GpuPlacement("a"), GpuPlacement("a"), GpuPlacement("b")], engines=3, tp=1) == [
        GpuPlacement("a"),
        GpuPlacement("a"),
        GpuPlacement("b"),
    ]


def test_an_engine_on_two_nodes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout.tp: engine 1 of tp=3 would use .* of trainer ranks 3 to 5"):
        beside_ranks(TWO_NODES, engines=2, tp=3)


def test_ray_counts_shared_gpus_once() -> None:
    """For Ray they belong to the trainer ranks; an engine sees them by name."""
    node = "ab" * 28
    shared = actor_options(2, "cuda", GpuPlacement(node, ("4", "5")), loopback=True)
    assert shared["num_gpus"] == 0
    assert shared["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert actor_options(2, "cuda", GpuPlacement(node), loopback=True)["num_gpus"] == 2
    assert actor_options(2, "cuda", None, loopback=True)["scheduling_strategy"] == "DEFAULT"


@pytest.mark.parametrize(
    ("gpus", "engines", "tp", "places"),
    [
        ({"a": 0, "b": 0}, 3, 1, None),
        ({"a": 4, "b": 4}, 4, 2, ["a", "b", "a", "b"]),
        ({"a": 1, "b": 4}, 2, 2, ["b", "b"]),  # an engine's ranks share a node
        ({"a": 3, "b": 3}, 3, 2, None),
        ({"a": 2, "b": 8}, 3, 2, ["b", "a", "b"]),
        ({}, 1, 1, None),
    ],
)
def test_engines_are_spread_as_the_gpus_allow(
    gpus: dict[str, int], engines: int, tp: int, places: list[str] | None
) -> None:
    assert spread(gpus, engines=engines, tp=tp, on_gpus=True) == places


def test_on_cpus_engines_are_spread_evenly() -> None:
    assert spread({"a": 0, "b": 0}, engines=3, tp=2, on_gpus=False) == ["a", "b", "a"]


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
