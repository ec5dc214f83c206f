"""What an engine needs to receive weights: its ranks' parts of the plan once, and one request per sync."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_hapo.resharding.plan import Parameter, Piece
from megatron_hapo.resharding.transfer import Transfer


@dataclass(frozen=True, kw_only=True)
class ReceiveRequest:
    """Asks the ranks of one engine to take part in a sync."""

    transfer: Transfer
    engine: int
    """Index of the engine."""


def receiver_plan(parameters: Sequence[Parameter], sources: Mapping[int, Sequence[Piece]]) -> str:
    """One engine rank's part of the plan, as JSON.

    Args:
        parameters: the rank's parameters according to the plan; the rank compares them with those of its model.
        sources: for each trainer rank, the pieces of these parameters that it sends, in the plan's order.
    """
    index = {parameter.name: number for number, parameter in enumerate(parameters)}
    plan = {
        "parameters": [(p.name, p.rows, p.columns) for p in parameters],
        "sources": {
            rank: [(index[piece.parameter], *piece[1:]) for piece in pieces] for rank, pieces in sources.items()
        },
    }
    return json.dumps(plan)
