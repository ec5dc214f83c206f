"""What an engine needs to know to receive weights: its ranks' parts of the plan, and one request a sync."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_hapo.resharding.plan import Parameter, Piece
from megatron_hapo.resharding.transfer import Transfer


@dataclass(frozen=True, kw_only=True)
class ReceiveRequest:
    """What the engine's ranks need to know of one sync."""

    transfer: Transfer
    engine: int


def receiver_plan(parameters: Sequence[Parameter], sources: Mapping[int, Sequence[Piece]]) -> str:
    """An engine rank's part of the plan.

    Args:
        parameters: of the rank, as the plan believes; the rank compares them with its model's.
        sources: for each trainer rank, where its pieces go.
    """
    index = {parameter.name: number for number, parameter in enumerate(parameters)}
    plan = {
        "parameters": [(p.name, p.rows, p.columns) for p in parameters],
        "sources": {
            rank: [(index[piece.parameter], *piece[1:]) for piece in pieces] for rank, pieces in sources.items()
        },
    }
    return json.dumps(plan)
