"""From two layouts of one model to the pieces that each trainer rank sends to each engine rank. Pure Python and numpy.

Both layouts are described in the coordinates of the Hugging Face tensors. A parameter consists of blocks; each block is
a rectangle of one such tensor, placed somewhere in the parameter. A copy is the intersection of a source block and a
target block. Parameters and tensors are treated as matrices: all axes but the last are rows, a vector has one column.

All engines have the same layout, so the copies are planned for one engine. Which of the ranks that hold the same block
serves which engine follows from a closed form (`ReshardingPlan.senders`), so a plan for hundreds of GPUs takes seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Block(NamedTuple):
    """A `rows` x `columns` rectangle at (row, column) of an HF tensor, stored at (at_row, at_column) of a parameter."""

    tensor: str
    row: int
    column: int
    rows: int
    columns: int
    at_row: int
    at_column: int


class Parameter(NamedTuple):
    """A rank's local parameter. Its blocks cover each element exactly once, except for the last `padding_rows` rows."""

    name: str
    rows: int
    columns: int
    blocks: tuple[Block, ...]
    padding_rows: int = 0


@dataclass(frozen=True)
class Shard:
    """Parameters of which every one of these trainer ranks (data-parallel replicas) holds a copy.

    A rank may belong to several shards: one of dense and one of expert parameters.
    """

    ranks: tuple[int, ...]
    parameters: tuple[Parameter, ...]


class Piece(NamedTuple):
    """A rectangle of a rank's local parameter, in rows and columns of that parameter."""

    parameter: str
    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Channel:
    """Everything that one trainer rank sends to one engine rank, in order: sources[i] is copied to targets[i]."""

    source_rank: int
    engine: int
    engine_rank: int
    sources: tuple[Piece, ...]
    targets: tuple[Piece, ...]


class OwnedBlock(NamedTuple):
    """A rectangle of an HF tensor whose expected checksum one trainer rank computes, and where that rank stores it."""

    piece: Piece
    """In the rank's parameter."""
    tensor: str
    """Name of the HF tensor, in which the rectangle starts at (row, column)."""
    row: int
    column: int


@dataclass(frozen=True)
class SendingTask:
    """The part of a plan that one trainer rank carries out."""

    channels: tuple[Channel, ...]
    owned_blocks: tuple[OwnedBlock, ...]


class _Copy(NamedTuple):
    """A copy into one engine, from any rank that holds `box`."""

    box: int
    box_row: int
    box_column: int
    rows: int
    columns: int
    engine_rank: int
    target: str
    row: int
    column: int


class _Holder(NamedTuple):
    """Where the ranks of one shard store a box."""

    shard: int
    parameter: str
    row: int
    column: int


class _Box(NamedTuple):
    """A rectangle of an HF tensor that trainer ranks store as one block."""

    tensor: str
    row: int
    column: int
    rows: int
    columns: int
    holders: tuple[_Holder, ...]


@dataclass(frozen=True)
class ReshardingPlan:
    """Which trainer rank sends what to every engine rank; made by `make_plan`."""

    engines: int
    """Number of engines."""
    shards: tuple[Shard, ...]
    """What the trainer's ranks hold."""
    boxes: tuple[_Box, ...]
    """Rectangles that cover each HF tensor of the trainer exactly once."""
    copies: tuple[_Copy, ...]
    """Into one engine; every engine gets the same."""
    copy_bytes: np.ndarray
    """[copies] int64, size of each copy in the engine's dtype."""
    _replicas: tuple[np.ndarray, ...]
    """The distinct sets of trainer ranks that can serve a copy."""
    _replicas_of_copy: np.ndarray
    """[copies] int64, index into `_replicas`."""

    def senders(self, engine: int) -> np.ndarray:
        """[copies] int64, the trainer rank that serves each copy of this engine.

        The copies of all engines that the same replicas can serve are laid end to end and cut into equal parts, one for
        each replica. So loads differ by one copy at most, and each replica serves as few engines as possible.
        """
        senders = np.empty(len(self.copies), dtype=np.int64)
        for index, ranks in enumerate(self._replicas):
            selected = self._replicas_of_copy == index
            ends = np.cumsum(self.copy_bytes[selected])
            if not ends.size:
                continue
            starts, total = ends - self.copy_bytes[selected], int(ends[-1])
            part = (engine * total + starts) * len(ranks) // (self.engines * total)
            senders[selected] = ranks[part]
        return senders

    def channels(self) -> Iterator[Channel]:
        """Yields one channel for each pair of a trainer rank and an engine rank between which data moves."""
        ranks_of = [frozenset(shard.ranks) for shard in self.shards]
        for engine in range(self.engines):
            pieces: dict[tuple[int, int], tuple[list[Piece], list[Piece]]] = defaultdict(lambda: ([], []))
            for copy, sender in zip(self.copies, self.senders(engine).tolist(), strict=True):
                holder = next(h for h in self.boxes[copy.box].holders if sender in ranks_of[h.shard])
                sources, targets = pieces[sender, copy.engine_rank]
                size = (copy.rows, copy.columns)
                sources.append(
                    Piece(holder.parameter, holder.row + copy.box_row, holder.column + copy.box_column, *size)
                )
                targets.append(Piece(copy.target, copy.row, copy.column, *size))
            for (sender, engine_rank), (sources, targets) in sorted(pieces.items()):
                yield Channel(sender, engine, engine_rank, tuple(sources), tuple(targets))

    def owned_blocks(self) -> dict[int, list[OwnedBlock]]:
        """For each trainer rank, the blocks it owns: every element of the model belongs to exactly one rank.

        The owner contributes the block to the checksums that the engines are compared with.
        """
        owned: dict[int, list[OwnedBlock]] = defaultdict(list)
        for index, box in enumerate(self.boxes):
            holder = box.holders[index % len(box.holders)]
            ranks = self.shards[holder.shard].ranks
            piece = Piece(holder.parameter, holder.row, holder.column, box.rows, box.columns)
            owned[ranks[index % len(ranks)]].append(OwnedBlock(piece, box.tensor, box.row, box.column))
        return owned


def make_plan(
    shards: Sequence[Shard],
    engine: Sequence[Sequence[Parameter]],
    tensors: Mapping[str, tuple[int, int]],
    *,
    engines: int,
    itemsize: int,
    max_copy_bytes: int,
) -> ReshardingPlan:
    """The plan from the trainer's shards to `engines` engines, which writes each target element exactly once.

    Args:
        shards: of all trainer ranks.
        engine: the parameters of each rank of one engine.
        tensors: (rows, columns) of every HF tensor.
        engines: number of engines.
        itemsize: bytes per element in the engine's dtype, in which weights are sent.
        max_copy_bytes: larger copies are split by rows, to balance the load and to fit the buckets.
    Raises:
        ValueError: the trainer's shards do not cover a tensor exactly once (apart from replicas), the blocks of an
            engine parameter do not cover it exactly once, or only one side has a tensor.
    """
    boxes_of, boxes = _source_boxes(shards, tensors)
    copies: list[_Copy] = []
    wanted: set[str] = set()
    for engine_rank, parameters in enumerate(engine):
        for parameter in parameters:
            where = f"engine rank {engine_rank}, {parameter.name}"
            _check_target(parameter, tensors, where)
            for block in parameter.blocks:
                wanted.add(block.tensor)
                if block.tensor not in boxes_of:
                    raise ValueError(f"{where}: no trainer rank holds {block.tensor}")
                for box in boxes_of[block.tensor]:
                    copies.extend(
                        _intersection(box, boxes[box], block, parameter.name, engine_rank, max_copy_bytes // itemsize)
                    )
    unused = sorted(boxes_of.keys() - wanted)
    if unused:
        raise ValueError(f"no engine parameter uses the trainer's {', '.join(unused[:5])} ({len(unused)} tensors)")
    copy_bytes = np.array([copy.rows * copy.columns * itemsize for copy in copies], dtype=np.int64)
    replicas, replicas_of_copy = _find_replicas(shards, boxes, copies)
    return ReshardingPlan(engines, tuple(shards), tuple(boxes), tuple(copies), copy_bytes, replicas, replicas_of_copy)


def _source_boxes(
    shards: Sequence[Shard], tensors: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, list[int]], list[_Box]]:
    """The indices of each tensor's boxes, which together cover it exactly once; and all boxes."""
    found: dict[str, dict[tuple[int, int, int, int], list[_Holder]]] = defaultdict(dict)
    for index, shard in enumerate(shards):
        for parameter in shard.parameters:
            for block in parameter.blocks:
                if not block.rows * block.columns:  # a rank that holds only padding
                    continue
                holders = found[block.tensor].setdefault(block[1:5], [])
                holders.append(_Holder(index, parameter.name, block.at_row, block.at_column))
    boxes_of: dict[str, list[int]] = {}
    boxes: list[_Box] = []
    for tensor, rectangles in found.items():
        if tensor not in tensors:
            raise ValueError(f"the trainer holds {tensor}, which the model does not have")
        rows, columns = tensors[tensor]
        _check_cover(list(rectangles), rows, columns, f"the trainer's {tensor}")
        boxes_of[tensor] = list(range(len(boxes), len(boxes) + len(rectangles)))
        boxes.extend(_Box(tensor, *rectangle, tuple(holders)) for rectangle, holders in rectangles.items())
    return boxes_of, boxes


def _check_target(parameter: Parameter, tensors: Mapping[str, tuple[int, int]], where: str) -> None:
    for block in parameter.blocks:
        rows, columns = tensors.get(block.tensor, (0, 0))
        if block.row < 0 or block.column < 0 or block.row + block.rows > rows or block.column + block.columns > columns:
            raise ValueError(f"{where}: {block} exceeds the tensor of {rows} x {columns}")
    rectangles = [(block.at_row, block.at_column, block.rows, block.columns) for block in parameter.blocks]
    _check_cover(rectangles, parameter.rows - parameter.padding_rows, parameter.columns, where)


def _check_cover(rectangles: list[tuple[int, int, int, int]], rows: int, columns: int, where: str) -> None:
    """Raises unless these (row, column, rows, columns) rectangles cover rows x columns exactly once.

    The rectangles must form bands of equal rows, as every tensor- or expert-parallel split does. Then it is enough that
    they lie inside the matrix, do not overlap, and add up to its area.
    """
    bands: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    area = 0
    for row, column, height, width in rectangles:
        if height * width:
            bands[row, height].append((column, width))
            area += height * width
    end = 0
    for (row, height), spans in sorted(bands.items()):
        if row < end:
            raise ValueError(f"{where}: rows {row}..{end} are covered more than once")
        end, side = row + height, 0
        for column, width in sorted(spans):
            if column < side:
                raise ValueError(f"{where}: columns {column}..{side} of rows {row}..{end} are covered more than once")
            side = column + width
        if side > columns:
            raise ValueError(f"{where}: columns up to {side}, but there are {columns}")
    if end > rows:
        raise ValueError(f"{where}: rows up to {end}, but there are {rows}")
    if area != rows * columns:
        raise ValueError(f"{where}: {rows * columns - area} of {rows * columns} elements have no source")


def _intersection(
    index: int, box: _Box, block: Block, target: str, engine_rank: int, max_elements: int
) -> Iterator[_Copy]:
    """Yields the copies from a box into an engine's block, each of at most `max_elements` or one row."""
    top, bottom = max(box.row, block.row), min(box.row + box.rows, block.row + block.rows)
    left, right = max(box.column, block.column), min(box.column + box.columns, block.column + block.columns)
    if top >= bottom or left >= right:
        return
    step = max(1, max_elements // (right - left))
    for row in range(top, bottom, step):
        yield _Copy(
            index, row - box.row, left - box.column, min(step, bottom - row), right - left, engine_rank, target,
            block.at_row + row - block.row, block.at_column + left - block.column,
        )  # fmt: skip


def _find_replicas(
    shards: Sequence[Shard], boxes: Sequence[_Box], copies: Sequence[_Copy]
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The distinct sets of trainer ranks that can serve a copy, and [copies] int64, the index of each copy's set."""
    index_of_shards: dict[tuple[int, ...], int] = {}
    replicas: list[np.ndarray] = []
    index_of_box = np.empty(len(boxes), dtype=np.int64)
    for number, box in enumerate(boxes):
        key = tuple(holder.shard for holder in box.holders)
        if key not in index_of_shards:
            index_of_shards[key] = len(replicas)
            ranks = dict.fromkeys(rank for shard in key for rank in shards[shard].ranks)
            replicas.append(np.array(list(ranks)))
        index_of_box[number] = index_of_shards[key]
    return tuple(replicas), index_of_box[np.array([copy.box for copy in copies], dtype=np.int64)]
