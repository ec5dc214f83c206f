"""Two layouts of one model -> which piece of which parameter goes where. Pure: no process group, no tensor.

Both layouts are described in the coordinates of the Hugging Face tensors: a parameter is made of blocks, each a
rectangle of one such tensor at a place of the parameter. A copy is the intersection of a source block and a target
block. Parameters and tensors count as two-dimensional: all axes but the last are rows, a vector has one column.

All engines are alike, so one engine's copies are planned; which of the ranks that hold the same block serves which
engine follows from a closed form (`Plan.senders`), so that a plan for hundreds of GPUs takes seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Block(NamedTuple):
    """`rows` x `columns` of an HF tensor, from (row, column) on, that lie at (at_row, at_column) of a parameter."""

    tensor: str
    row: int
    column: int
    rows: int
    columns: int
    at_row: int
    at_column: int


class Parameter(NamedTuple):
    """A rank's own parameter; its blocks cover all of it but the last `padding_rows`, each element once."""

    name: str
    rows: int
    columns: int
    blocks: tuple[Block, ...]
    padding_rows: int = 0


@dataclass(frozen=True)
class Shard:
    """Parameters that these trainer ranks hold alike (data parallel replicas). A rank may belong to several shards."""

    ranks: tuple[int, ...]
    parameters: tuple[Parameter, ...]


class Piece(NamedTuple):
    """A rectangle of a rank's parameter."""

    parameter: str
    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Channel:
    """Everything that one trainer rank sends to one engine rank, in order: sources[i] goes to targets[i]."""

    source_rank: int
    engine: int
    engine_rank: int
    sources: tuple[Piece, ...]
    targets: tuple[Piece, ...]


class OwnBlock(NamedTuple):
    """A block of an HF tensor that one rank answers for, and where the rank keeps it."""

    piece: Piece
    tensor: str
    row: int
    column: int


@dataclass(frozen=True)
class SendingTask:
    """One trainer rank's part of a plan."""

    channels: tuple[Channel, ...]
    own_blocks: tuple[OwnBlock, ...]


class _Copy(NamedTuple):
    """Of one engine; the source is whoever holds `box`."""

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
    """Where the ranks of one shard keep a box."""

    shard: int
    parameter: str
    row: int
    column: int


class _Box(NamedTuple):
    """A rectangle of an HF tensor that trainer ranks hold as one block."""

    tensor: str
    row: int
    column: int
    rows: int
    columns: int
    holders: tuple[_Holder, ...]


@dataclass(frozen=True)
class Plan:
    """Which rank sends what to every engine rank; made by `make_plan`."""

    engines: int
    engine_ranks: int
    itemsize: int
    """Bytes of an element on the way: the engine's dtype."""
    shards: tuple[Shard, ...]
    boxes: tuple[_Box, ...]
    copies: tuple[_Copy, ...]
    """Of one engine."""
    copy_bytes: np.ndarray
    """[copies] int64."""
    _holders: np.ndarray
    """[copies] index into `_ranks_of_class`."""
    _ranks_of_class: tuple[np.ndarray, ...]
    _starts: np.ndarray
    """[copies] bytes before this copy in its class, in one engine."""
    _class_bytes: np.ndarray
    """[classes] bytes of a class in one engine."""

    def senders(self, engine: int) -> np.ndarray:
        """[copies] the trainer rank that serves each copy of this engine.

        All engines' copies of a class of equal holders, laid end to end, are cut into equal parts, one a holder: loads
        differ by one copy at most, and a holder serves as few engines as can be.
        """
        senders = np.empty(len(self.copies), dtype=np.int64)
        for index, ranks in enumerate(self._ranks_of_class):
            mine = self._holders == index
            total = int(self._class_bytes[index])
            part = (engine * total + self._starts[mine]) * len(ranks) // (self.engines * total)
            senders[mine] = ranks[part]
        return senders

    def channels(self) -> Iterator[Channel]:
        """Every pair of a trainer rank and an engine rank between which anything moves."""
        shard_of = [{rank: None for rank in shard.ranks} for shard in self.shards]
        for engine in range(self.engines):
            pieces: dict[tuple[int, int], tuple[list[Piece], list[Piece]]] = defaultdict(lambda: ([], []))
            for copy, sender in zip(self.copies, self.senders(engine).tolist(), strict=True):
                holder = next(h for h in self.boxes[copy.box].holders if sender in shard_of[h.shard])
                sources, targets = pieces[sender, copy.engine_rank]
                size = (copy.rows, copy.columns)
                sources.append(
                    Piece(holder.parameter, holder.row + copy.box_row, holder.column + copy.box_column, *size)
                )
                targets.append(Piece(copy.target, copy.row, copy.column, *size))
            for (sender, engine_rank), (sources, targets) in sorted(pieces.items()):
                yield Channel(sender, engine, engine_rank, tuple(sources), tuple(targets))

    def own_blocks(self) -> dict[int, list[OwnBlock]]:
        """Every element of the model once, over the trainer's ranks: who says what it ought to be."""
        owned: dict[int, list[OwnBlock]] = defaultdict(list)
        for index, box in enumerate(self.boxes):
            holder = box.holders[index % len(box.holders)]
            ranks = self.shards[holder.shard].ranks
            piece = Piece(holder.parameter, holder.row, holder.column, box.rows, box.columns)
            owned[ranks[index % len(ranks)]].append(OwnBlock(piece, box.tensor, box.row, box.column))
        return owned

    def traffic(self) -> np.ndarray:
        """[trainer ranks, engines, engine ranks] int64, bytes from each rank to each."""
        num_ranks = 1 + max(max(shard.ranks) for shard in self.shards)
        bytes_to = np.zeros((num_ranks, self.engines, self.engine_ranks), dtype=np.int64)
        engine_rank = np.array([copy.engine_rank for copy in self.copies])
        for engine in range(self.engines):
            links = self.senders(engine) * self.engine_ranks + engine_rank
            sums = np.bincount(links, self.copy_bytes, num_ranks * self.engine_ranks)  # float64: exact below 2^53
            bytes_to[:, engine] = sums.reshape(num_ranks, self.engine_ranks)
        return bytes_to


def make_plan(
    shards: Sequence[Shard],
    engine: Sequence[Sequence[Parameter]],
    tensors: Mapping[str, tuple[int, int]],
    *,
    engines: int,
    itemsize: int,
    max_copy_bytes: int,
) -> Plan:
    """The plan from the trainer's shards to `engines` engines, with the proof that each target element comes once.

    Args:
        shards: of all trainer ranks.
        engine: the parameters of each rank of an engine.
        tensors: rows and columns of every HF tensor.
        max_copy_bytes: larger copies are split by rows, for balance and for buckets.
    Raises:
        ValueError: a tensor that the trainer does not hold exactly once (apart from replicas), an engine parameter that
            its blocks do not cover exactly once, a tensor that only one side knows.
    """
    boxes_of, boxes = _source_boxes(shards, tensors)
    copies: list[_Copy] = []
    wanted: set[str] = set()
    for engine_rank, parameters in enumerate(engine):
        for parameter in parameters:
            who = f"engine rank {engine_rank}, {parameter.name}"
            _check_target(parameter, tensors, who)
            for block in parameter.blocks:
                wanted.add(block.tensor)
                if block.tensor not in boxes_of:
                    raise ValueError(f"{who}: no trainer rank holds {block.tensor}")
                for box in boxes_of[block.tensor]:
                    copies.extend(
                        _intersection(box, boxes[box], block, parameter.name, engine_rank, max_copy_bytes // itemsize)
                    )
    unused = sorted(boxes_of.keys() - wanted)
    if unused:
        raise ValueError(f"no engine parameter takes the trainer's {', '.join(unused[:5])} ({len(unused)} tensors)")
    copy_bytes = np.array([copy.rows * copy.columns * itemsize for copy in copies], dtype=np.int64)
    holders, ranks_of_class, starts, class_bytes = _classes(shards, boxes, copies, copy_bytes)
    return Plan(
        engines, len(engine), itemsize, tuple(shards), tuple(boxes), tuple(copies), copy_bytes, holders,
        ranks_of_class, starts, class_bytes,
    )  # fmt: skip


def _source_boxes(
    shards: Sequence[Shard], tensors: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, list[int]], list[_Box]]:
    """Indices of each tensor's boxes, which together cover it exactly once; and the boxes."""
    found: dict[str, dict[tuple[int, int, int, int], list[_Holder]]] = defaultdict(dict)
    for index, shard in enumerate(shards):
        for parameter in shard.parameters:
            for block in parameter.blocks:
                if not block.rows * block.columns:  # a rank that holds nothing but padding
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


def _check_target(parameter: Parameter, tensors: Mapping[str, tuple[int, int]], who: str) -> None:
    for block in parameter.blocks:
        rows, columns = tensors.get(block.tensor, (0, 0))
        if block.row < 0 or block.column < 0 or block.row + block.rows > rows or block.column + block.columns > columns:
            raise ValueError(f"{who}: takes {block} of a tensor of {rows} x {columns}")
    rectangles = [(block.at_row, block.at_column, block.rows, block.columns) for block in parameter.blocks]
    _check_cover(rectangles, parameter.rows - parameter.padding_rows, parameter.columns, who)


def _check_cover(rectangles: list[tuple[int, int, int, int]], rows: int, columns: int, who: str) -> None:
    """Raises unless these (row, column, rows, columns) cover rows x columns exactly once.

    Rectangles lie in bands of equal rows, as every cut by tensor or expert parallel does; then inside the whole, apart
    from each other, and of its area is a proof.
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
            raise ValueError(f"{who}: rows {row}..{end} come more than once")
        end, side = row + height, 0
        for column, width in sorted(spans):
            if column < side:
                raise ValueError(f"{who}: columns {column}..{side} of rows {row}..{end} come more than once")
            side = column + width
        if side > columns:
            raise ValueError(f"{who}: columns up to {side} of {columns}")
    if end > rows:
        raise ValueError(f"{who}: rows up to {end} of {rows}")
    if area != rows * columns:
        raise ValueError(f"{who}: {rows * columns - area} of {rows * columns} elements come from nowhere")


def _intersection(
    index: int, box: _Box, block: Block, target: str, engine_rank: int, max_elements: int
) -> Iterator[_Copy]:
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


def _classes(
    shards: Sequence[Shard], boxes: Sequence[_Box], copies: Sequence[_Copy], copy_bytes: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """Copies grouped by the set of ranks that could serve them: class of each copy, ranks, starts, bytes."""
    class_of_shards: dict[tuple[int, ...], int] = {}
    ranks_of_class: list[np.ndarray] = []
    class_of_box = np.empty(len(boxes), dtype=np.int64)
    for index, box in enumerate(boxes):
        key = tuple(holder.shard for holder in box.holders)
        if key not in class_of_shards:
            class_of_shards[key] = len(ranks_of_class)
            ranks_of_class.append(np.array(_unique(rank for shard in key for rank in shards[shard].ranks)))
        class_of_box[index] = class_of_shards[key]
    classes = class_of_box[np.array([copy.box for copy in copies], dtype=np.int64)]
    starts = np.empty(len(copies), dtype=np.int64)
    class_bytes = np.zeros(len(ranks_of_class), dtype=np.int64)
    for index in range(len(ranks_of_class)):
        mine = classes == index
        ends = np.cumsum(copy_bytes[mine])
        starts[mine] = ends - copy_bytes[mine]
        class_bytes[index] = ends[-1] if len(ends) else 1
    return classes, tuple(ranks_of_class), starts, class_bytes


def _unique(ranks: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(ranks))
