"""Where engines stand. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hapo.config import Config
from megatron_hapo.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Of an engine, or of a trainer rank."""

    node: str
    """Ray's id of the node."""
    gpus: tuple[str, ...] = ()
    """Names for CUDA_VISIBLE_DEVICES. Of an engine: those of trainer ranks; empty where Ray chooses among free ones."""


def beside_ranks(ranks: Sequence[Place], *, engines: int, tp: int) -> list[Place]:
    """Engine i stands on the GPUs of trainer ranks i * tp and following, in their order.

    Args:
        ranks: of the trainer, at least engines * tp; without GPUs on a CPU.
    Raises:
        ConfigError: an engine's ranks would stand on two nodes.
    """
    places = []
    for engine in range(engines):
        own = ranks[engine * tp : (engine + 1) * tp]
        if len({rank.node for rank in own}) > 1:
            raise ConfigError(
                [
                    f"rollout.tp: engine {engine} of tp={tp} would stand on the GPUs of trainer ranks {engine * tp} to "
                    f"{(engine + 1) * tp - 1}, which are on two nodes; with placement=colocated rollout.tp must divide "
                    "the trainer ranks of a node"
                ]
            )
        places.append(Place(own[0].node, tuple(gpu for rank in own for gpu in rank.gpus)))
    return places


def check_gpus(config: Config, *, here: int, everywhere: int) -> None:
    """Whether Ray's GPUs hold the run; else its actors would wait for GPUs that never come.

    Args:
        here: GPUs of this node, where the trainer's ranks are to be.
        everywhere: of all of Ray's nodes.
    Raises:
        ConfigError: they do not.
    """
    ranks, rollout = config.parallel.world_size, config.rollout
    if ranks > here:
        raise ConfigError(
            [
                f"parallel: {ranks} trainer ranks need as many GPUs, and this node has {here}; start it with torchrun "
                "on as many nodes as it needs (docs/launching.md), or find another layout with `megatron-hapo plan`"
            ]
        )
    engines = rollout.engines * rollout.tp if config.placement == "disaggregated" else 0
    if ranks + engines > everywhere:
        raise ConfigError(
            [
                f"rollout.engines: {rollout.engines} engines of tp={rollout.tp} need {engines} GPUs beside the "
                f"{ranks} of the trainer, and Ray has {everywhere} in all; take fewer, colocated ones or more nodes"
            ]
        )
