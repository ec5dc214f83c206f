"""Fills an engine rank's parameters from the trainer's ranks, as one of SGLang's `custom_weight_loader`s.

`receive` is named in the engine's `custom_weight_loader` list and runs in every tensor-parallel rank for an update
with `load_format=RECEIVE`. The rank reads its part of the plan once, from a file that its engine has written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hapo.errors import WeightSyncError
from megatron_hapo.resharding.float8_rows import Float8Rows
from megatron_hapo.resharding.plan import Piece
from megatron_hapo.resharding.receiving import ReceiveRequest
from megatron_hapo.resharding.staging import StagedMatrices
from megatron_hapo.resharding.transfer import Rendezvous, Transfer
from megatron_hapo.resharding.transports import Receiver
from sglang_ext.online_quantization import served_matrices

RECEIVE = "sglang_ext.receive.receive"


def payload(request: ReceiveRequest, plans: Path) -> list[tuple[str, Tensor]]:
    """The request as named tensors, which SGLang can send; `plans` is the folder of `write_plans`."""
    text = json.dumps({**asdict(request), "plans": str(plans)})
    return [("request", torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))]


def write_plans(folder: Path, plans: Sequence[str]) -> None:
    """Writes each engine rank's part of the plan to the file from which the rank reads it."""
    for rank, plan in enumerate(plans):
        _plan_path(folder, rank).write_text(plan)


def receive(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Receives one sync into this rank's parameters.

    Raises:
        WeightSyncError: the model is not the one that the plan was made for, or something did not arrive in time.
    """
    from sglang.srt.runtime_context import get_parallel

    request: dict[str, Any] = json.loads(bytes(named_tensors[0][1].cpu().numpy()).decode())
    transfer, engine, rank = _transfer(request["transfer"]), request["engine"], get_parallel().tp_rank
    prepared: _Prepared | None = getattr(model, "hapo_receiver", None)
    try:
        if prepared is None or prepared.plan != transfer.plan:
            prepared = _prepare(model, transfer, _plan_path(Path(request["plans"]), rank))
            model.hapo_receiver = prepared  # type: ignore[assignment]  # lives as long as the model
    except BaseException:
        transfer.abort()
        raise
    matrices = StagedMatrices(prepared.parameters, getattr(torch, transfer.dtype))
    with torch.no_grad():
        prepared.receiver.receive(prepared.sources, matrices, transfer, engine=engine, engine_rank=rank)
    assert not matrices.staged_bytes, "the plan writes every element"


def _transfer(fields: dict[str, Any]) -> Transfer:
    rendezvous = fields.pop("rendezvous")
    if rendezvous is None:
        return Transfer(**fields)
    return Transfer(**fields, rendezvous=Rendezvous(**{**rendezvous, "hosts": tuple(rendezvous["hosts"])}))


@dataclass(frozen=True)
class _Prepared:
    """What this rank keeps between syncs."""

    plan: str
    """Fingerprint of the plan."""
    sources: dict[int, list[Piece]]
    parameters: dict[str, Tensor | Float8Rows]
    """In the plan's order."""
    receiver: Receiver


def _plan_path(folder: Path, rank: int) -> Path:
    return folder / f"plan.{rank}.json"


def _prepare(model: nn.Module, transfer: Transfer, path: Path) -> _Prepared:
    """This rank's part of the plan, checked against the model."""
    plan = json.loads(path.read_text())
    served = served_matrices(model)
    found = {name: tuple(_weight(matrix).shape) for name, matrix in served.items()}
    planned = {name: (rows, columns) for name, rows, columns in plan["parameters"]}
    faults = [
        f"{name}: the plan has {planned.get(name, 'nothing')}, the model {found.get(name, 'nothing')}"
        for name in sorted(found.keys() | planned.keys())
        if planned.get(name) != found.get(name)
    ]
    faults += [
        f"{name}: is {matrix.dtype}, but weights are sent as {transfer.dtype}"
        for name, matrix in served.items()
        if not isinstance(matrix, Float8Rows) and matrix.dtype != getattr(torch, transfer.dtype)
    ]
    if faults:
        raise WeightSyncError("; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else ""))
    names = [name for name, _, _ in plan["parameters"]]
    sources = {
        int(source): [Piece(names[index], *place) for index, *place in pieces]
        for source, pieces in plan["sources"].items()
    }
    return _Prepared(transfer.plan, sources, {name: served[name] for name in names}, Receiver())


def _weight(matrix: Tensor | Float8Rows) -> Tensor:
    return matrix.weight if isinstance(matrix, Float8Rows) else matrix
