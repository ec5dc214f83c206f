"""Placement: on which nodes and GPUs engines and trainer ranks run. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hapo.errors import ConfigError


@dataclass(frozen=True)
class GpuPlacement:
    """The node of an engine or of a trainer rank, and its GPUs there."""

    node: str
    """Ray's id of the node."""
    gpus: tuple[str, ...] = ()
    """Names for CUDA_VISIBLE_DEVICES. For an engine: those of trainer ranks; empty where Ray chooses free ones."""


def beside_ranks(ranks: Sequence[GpuPlacement], *, engines: int, tp: int) -> list[GpuPlacement]:
    """The placement of each colocated engine: engine i on the GPUs of trainer ranks i * tp and following, in order.

    Args:
        ranks: of the trainer, at least engines * tp; without GPUs on a CPU.
    Raises:
        ConfigError: an engine's ranks would be on two nodes.
    """
    placements = []
    for engine in range(engines):
        own = ranks[engine * tp : (engine + 1) * tp]
        if len({rank.node for rank in own}) > 1:
            raise ConfigError(
                [
                    f"rollout.tp: engine {engine} of tp={tp} would use the GPUs of trainer ranks {engine * tp} to "
                    f"{(engine + 1) * tp - 1}, which are on two nodes; with placement=colocated rollout.tp must divide "
                    "the number of trainer ranks on a node"
                ]
            )
        placements.append(GpuPlacement(own[0].node, tuple(gpu for rank in own for gpu in rank.gpus)))
    return placements


def spread(gpus: dict[str, int], *, engines: int, tp: int, on_gpus: bool) -> list[str] | None:
    """The node of each engine, as even as the GPUs allow; None where they do not fit. An engine's ranks share a node.

    Args:
        gpus: free GPUs of each node.
    """
    free, count = dict(gpus), dict.fromkeys(gpus, 0)
    nodes = []
    for _ in range(engines):
        fitting = [name for name in free if not on_gpus or free[name] >= tp]
        if not fitting:
            return None
        name = min(fitting, key=lambda name: (count[name], -free[name] if on_gpus else 0))
        free[name] -= tp
        count[name] += 1
        nodes.append(name)
    return nodes
