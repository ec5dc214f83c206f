"""Fills an engine rank's parameters from the trainer's ranks; SGLang's `custom_weight_loader` extension point.

`receive` is named in the engine's `custom_weight_loader` list and runs in every tensor parallel rank when an update
comes with `load_format=RECEIVE`. The rank reads its part of the plan once, from a file in the folder of the sync.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hapo.errors import WeightSyncError
from megatron_hapo.resharding import transfer as shared_memory
from megatron_hapo.resharding.plan import Parameter, Piece
from megatron_hapo.resharding.transfer import Transfer, as_matrix

RECEIVE = "sglang_ext.receive.receive"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the engine's ranks need to know of one sync."""

    transfer: Transfer
    engine: int

    def payload(self) -> list[tuple[str, Tensor]]:
        """The request as the named tensors that SGLang carries."""
        return [("request", torch.frombuffer(bytearray(json.dumps(asdict(self)).encode()), dtype=torch.uint8))]


def write_receiver_plan(
    transfer_folder: Path,
    *,
    engine: int,
    engine_rank: int,
    parameters: Sequence[Parameter],
    sources: Mapping[int, Sequence[Piece]],
) -> None:
    """Leave an engine rank's part of the plan where it will look for it.

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
    _plan_path(transfer_folder, engine, engine_rank).write_text(json.dumps(plan))


def receive(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Takes part in one sync with this rank's parameters.

    Raises:
        WeightSyncError: the model is not what the plan was made for, or something did not come in time.
    """
    from sglang.srt.runtime_context import get_parallel

    request: dict[str, Any] = json.loads(bytes(named_tensors[0][1].cpu().numpy()).decode())
    transfer, engine, rank = Transfer(**request["transfer"]), request["engine"], get_parallel().tp_rank
    known: _Known | None = getattr(model, "hapo_receiver", None)
    try:
        if known is None or known.plan != transfer.plan:
            known = _read(model, transfer, engine, rank)
            model.hapo_receiver = known  # type: ignore[assignment]  # kept with what it describes
    except BaseException:
        transfer.give_up()
        raise
    with torch.no_grad():
        shared_memory.receive(known.sources, known.matrices, transfer, engine=engine, engine_rank=rank)


@dataclass(frozen=True)
class _Known:
    """What this rank knows of its plan between syncs."""

    plan: str
    sources: dict[int, list[Piece]]
    matrices: dict[str, Tensor]


def _plan_path(folder: Path, engine: int, engine_rank: int) -> Path:
    return folder / f"plan.{engine}.{engine_rank}.json"


def _read(model: nn.Module, transfer: Transfer, engine: int, rank: int) -> _Known:
    plan = json.loads(_plan_path(Path(transfer.folder), engine, rank).read_text())
    # named_parameters leaves out what it has met before: an output head tied to the embedding
    matrices = {name: as_matrix(parameter) for name, parameter in model.named_parameters()}
    found = {name: tuple(matrix.shape) for name, matrix in matrices.items()}
    planned = {name: (rows, columns) for name, rows, columns in plan["parameters"]}
    faults = [
        f"{name}: the plan has {planned.get(name, 'nothing')}, the model {found.get(name, 'nothing')}"
        for name in sorted(found.keys() | planned.keys())
        if planned.get(name) != found.get(name)
    ]
    faults += [
        f"{name}: is {matrix.dtype}, weights come as {transfer.dtype}"
        for name, matrix in matrices.items()
        if matrix.dtype != getattr(torch, transfer.dtype)
    ]
    if faults:
        raise WeightSyncError("; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else ""))
    names = [name for name, _, _ in plan["parameters"]]
    sources = {
        int(source): [Piece(names[index], *place) for index, *place in pieces]
        for source, pieces in plan["sources"].items()
    }
    return _Known(transfer.plan, sources, matrices)
