"""What the engines are to hold, in checksums, without a whole tensor anywhere: each rank adds what it answers for.

The cut comes from `checksum.engine_slices`, not from the plan, and the engine compares with what its own layers say
(`sglang_ext.verify`): a fault of the plan cannot confirm itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_hapo.resharding.checksum import add_checksums, block_checksum
from megatron_hapo.resharding.layouts import matrix_size
from megatron_hapo.resharding.plan import OwnBlock
from megatron_hapo.resharding.weight_buckets import EngineCut


def partial_checksums(
    blocks: Sequence[OwnBlock],
    matrices: Mapping[str, Tensor],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    cut: EngineCut,
    dtype: torch.dtype,
) -> dict[str, list[int]]:
    """For each HF tensor that these blocks touch, what they add to the checksum of each engine rank's slice.

    Args:
        matrices: the rank's parameters, two-dimensional.
        shapes: of the HF tensors.
        dtype: of the engines.
    """
    sums: dict[str, list[int]] = {}
    for block in blocks:
        piece, name = block.piece, block.tensor
        values = matrices[piece.parameter][
            piece.row : piece.row + piece.rows, piece.column : piece.column + piece.columns
        ].to(dtype)
        known: dict[tuple[int, int, int, int], int] = {}
        parts = []
        for rows in _slices(name, shapes[name], cut):
            if rows not in known:
                known[rows] = _inside(values, block, rows)
            parts.append(known[rows])
        sums[name] = [add_checksums(pair) for pair in zip(sums.get(name, [0] * cut.tp), parts, strict=True)]
    return sums


def merge_checksums(parts: Iterable[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    """Checksums of whole slices, from the sums of all ranks."""
    merged: dict[str, list[list[int]]] = defaultdict(list)
    for part in parts:
        for name, sums in part.items():
            merged[name].append(sums)
    return {name: [add_checksums(column) for column in zip(*sums, strict=True)] for name, sums in merged.items()}


def _slices(name: str, shape: tuple[int, ...], cut: EngineCut) -> list[tuple[int, int, int, int]]:
    """(row, column, rows, columns) of each engine rank's slice."""
    # The views of a tensor without storage tell where they begin.
    whole = torch.empty(shape, device="meta")
    slices = cut.slices(name, whole)
    columns = matrix_size(shape)[1]
    return [(*divmod(int(part.storage_offset()), columns), *matrix_size(tuple(part.shape))) for part in slices]


def _inside(values: Tensor, block: OwnBlock, rows: tuple[int, int, int, int]) -> int:
    row, column, height, width = rows
    top, bottom = max(block.row, row), min(block.row + values.shape[0], row + height)
    left, right = max(block.column, column), min(block.column + values.shape[1], column + width)
    if top >= bottom or left >= right:
        return 0
    part = values[top - block.row : bottom - block.row, left - block.column : right - block.column]
    return block_checksum(part, row=top - row, column=left - column, columns=width)
