"""Encoding of values between the driver and torchrun's ranks: JSON and raw arrays, so that decoding runs no code.

Layout: length of the JSON (8 bytes), the JSON, then the arrays that it refers to, each aligned to 16 bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hapo.observe.spans import Span, Timeline
from megatron_hapo.resharding.plan import Block, Channel, OwnedBlock, Parameter, Piece, SendingTask
from megatron_hapo.resharding.transfer import Rendezvous, Transfer
from megatron_hapo.types import EntropyStats, KeptTokens, TokenScores, TrainBatch, WeightBucket

_LENGTH = struct.Struct("<q")
_ALIGNMENT = 16
_RECORDS: dict[str, Any] = {
    record.__name__: record
    for record in (
        *(TrainBatch, KeptTokens, TokenScores, WeightBucket, EntropyStats, Span, Timeline),
        *(Transfer, Rendezvous, SendingTask, Channel, OwnedBlock, Piece, Parameter, Block),
    )
}

_FIELDS: dict[str, tuple[str, ...]] = {
    name: tuple(field.name for field in fields(record)) if is_dataclass(record) else record._fields
    for name, record in _RECORDS.items()
}


def encode(value: Any) -> bytearray:
    """The encoded value: numbers, strings, paths, numeric arrays, `_RECORDS`, and lists, tuples and dicts of them.

    Raises:
        TypeError: the value contains anything else.
    """
    arrays: list[np.ndarray] = []
    text = json.dumps(_describe(value, arrays)).encode()
    data = bytearray(_LENGTH.pack(len(text)) + text)
    for array in arrays:
        data += bytes(-len(data) % _ALIGNMENT)
        data += np.ascontiguousarray(array).data.cast("B") if array.size else b""
    return data


def decode(data: bytearray | np.ndarray) -> Any:
    """The value that `encode` was given. Arrays share the memory of `data`, whose start must be aligned to 16 bytes."""
    (length,) = _LENGTH.unpack_from(data)
    start = _LENGTH.size + length
    view = memoryview(data)
    return _restore(json.loads(bytes(view[_LENGTH.size : start])), view, _Cursor(start))


class _Cursor:
    """Position of the next array; arrays follow in the order in which the JSON names them."""

    def __init__(self, position: int):
        self._position = position

    def take(self, num_bytes: int) -> int:
        """Start of the next array, of this many bytes."""
        start = self._position + -self._position % _ALIGNMENT
        self._position = start + num_bytes
        return start


def _describe(value: Any, arrays: list[np.ndarray]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return _describe(value.item(), arrays)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise TypeError(f"an array of {value.dtype} cannot be sent")
        arrays.append(value)
        return {"array": [value.dtype.str, value.shape]}
    if isinstance(value, Path):
        return {"path": str(value)}
    name = type(value).__name__
    if _RECORDS.get(name) is type(value):
        return {name: [_describe(getattr(value, field), arrays) for field in _FIELDS[name]]}
    if isinstance(value, list):
        return [_describe(entry, arrays) for entry in value]
    if isinstance(value, tuple):
        return {"tuple": [_describe(entry, arrays) for entry in value]}
    if isinstance(value, dict):
        return {"dict": [[_describe(key, arrays), _describe(entry, arrays)] for key, entry in value.items()]}
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _restore(description: Any, data: memoryview, cursor: _Cursor) -> Any:
    if isinstance(description, list):
        return [_restore(entry, data, cursor) for entry in description]
    if not isinstance(description, dict):
        return description
    ((kind, content),) = description.items()
    if kind == "array":
        dtype, shape = np.dtype(content[0]), tuple(content[1])
        count = int(np.prod(shape, dtype=np.int64))
        start = cursor.take(count * dtype.itemsize) if count else 0
        return np.frombuffer(data, dtype, count, start).reshape(shape)
    if kind == "path":
        return Path(content)
    if kind == "dict":
        return {_restore(key, data, cursor): _restore(entry, data, cursor) for key, entry in content}
    values = [_restore(entry, data, cursor) for entry in content]
    if kind == "tuple":
        return tuple(values)
    return _RECORDS[kind](**dict(zip(_FIELDS[kind], values, strict=True)))
