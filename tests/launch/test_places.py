"""Colocated engines stand on the GPUs of known trainer ranks."""

from __future__ import annotations

import pytest

from megatron_hapo.errors import ConfigError
from megatron_hapo.launch.engines import _actor_options
from megatron_hapo.launch.places import Place, beside_ranks

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
