"""Checksums of what the engines should hold: each trainer rank contributes its blocks, for float8 whole tensors.

The slices come from `checksum.engine_slices`, not from the plan, and the engine derives its own from its layers
(`sglang_ext.verify`). So an error in the plan cannot go unnoticed because both sides repeat it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_hapo.resharding.checksum import add_checksums, block_checksum, tensor_checksum
from megatron_hapo.resharding.float8_rows import quantize_rows
from megatron_hapo.resharding.layouts import matrix_size
from megatron_hapo.resharding.plan import OwnedBlock
from megatron_hapo.resharding.weight_buckets import EngineCut


def partial_checksums(
    blocks: Sequence[OwnedBlock],
    matrices: Mapping[str, Tensor],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    cut: EngineCut,
    dtype: torch.dtype,
) -> dict[str, list[int]]:
    """This rank's contribution to the checksums: for each HF tensor it owns a block of, one sum per engine rank.

    Args:
        blocks: the blocks that this trainer rank owns.
        matrices: the rank's local parameters, each [rows, columns].
        shapes: shapes of the HF tensors.
        cut: how an engine slices the tensors over its ranks.
        dtype: the engines' dtype, to which values are converted first.
    """
    sums: dict[str, list[int]] = {}
    for block in blocks:
        piece, name = block.piece, block.tensor
        values = matrices[piece.parameter][
            piece.row : piece.row + piece.rows, piece.column : piece.column + piece.columns
        ].to(dtype)
        known: dict[tuple[int, int, int, int], int] = {}
        parts = []
        for rectangle in _slices(name, shapes[name], cut):
            if rectangle not in known:
                known[rectangle] = _contribution(values, block, rectangle)
            parts.append(known[rectangle])
        sums[name] = [add_checksums(pair) for pair in zip(sums.get(name, [0] * cut.tp), parts, strict=True)]
    return sums


def float8_checksums(
    tensors: Iterable[tuple[str, Tensor]], *, linear: Collection[str], cut: EngineCut, dtype: torch.dtype
) -> dict[str, list[int]]:
    """This rank's contribution where engines serve linear weights in float8, which needs whole tensors.

    A scale belongs to a row of an engine rank's slice, which may lie on several trainer ranks.

    Args:
        tensors: the whole HF tensors that this trainer rank owns (`hf_weights.owned_tensors`).
        linear: names of those that are quantized; their scales have the suffix `_scale`.
        cut: how an engine slices the tensors over its ranks.
        dtype: of the transfer, to which values are converted first.
    """
    sums: dict[str, list[int]] = {}
    for name, tensor in tensors:
        tensor = tensor.detach().to(dtype)
        if name not in linear:
            sums[name] = cut.checksums(name, tensor)
            continue
        served = [quantize_rows(part) for part in cut.slices(name, tensor)]
        sums[name] = [tensor_checksum(rows.weight) for rows in served]
        sums[f"{name}_scale"] = [tensor_checksum(rows.scale) for rows in served]
    return sums


def merge_checksums(parts: Iterable[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    """The checksum of each engine rank's slice of each HF tensor, from the contributions of all trainer ranks."""
    merged: dict[str, list[list[int]]] = defaultdict(list)
    for part in parts:
        for name, sums in part.items():
            merged[name].append(sums)
    return {name: [add_checksums(column) for column in zip(*sums, strict=True)] for name, sums in merged.items()}


def _slices(name: str, shape: tuple[int, ...], cut: EngineCut) -> list[tuple[int, int, int, int]]:
    """(row, column, rows, columns) of each engine rank's slice of an HF tensor."""
    # Views of a meta tensor know their offset, and need no memory.
    whole = torch.empty(shape, device="meta")
    slices = cut.slices(name, whole)
    columns = matrix_size(shape)[1]
    return [(*divmod(int(part.storage_offset()), columns), *matrix_size(tuple(part.shape))) for part in slices]


def _contribution(values: Tensor, block: OwnedBlock, rectangle: tuple[int, int, int, int]) -> int:
    """What the block contributes to the checksum of this rectangle of its HF tensor; 0 if they do not overlap."""
    row, column, height, width = rectangle
    top, bottom = max(block.row, row), min(block.row + values.shape[0], row + height)
    left, right = max(block.column, column), min(block.column + values.shape[1], column + width)
    if top >= bottom or left >= right:
        return 0
    part = values[top - block.row : bottom - block.row, left - block.column : right - block.column]
    return block_checksum(part, row=top - row, column=left - column, columns=width)
