"""Rows of data files: Parquet, JSON Lines, JSON arrays and CSV. A malformed row is reported and ends nothing."""

from __future__ import annotations

import csv
import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hapo.data.chat_template import is_valid_unicode
from megatron_hapo.errors import DataError, one_line

Row = dict[str, Any]

BATCH_ROWS = 1000
ARROW_ROWS = 100
"""Rows of Arrow tables that are converted at once: a row with test cases or images can have megabytes."""
LONGEST_ROW = 16 << 20
LARGEST_JSON_ARRAY = 4 << 30
"""A JSON array is read as a whole, JSON Lines row by row."""


@dataclass(frozen=True)
class InvalidRow:
    """A row that cannot be used."""

    row: str
    """Which row it is, e.g. "row 3" or "line 4"."""
    reason: str


@dataclass(frozen=True)
class RowFile:
    """A file, or another table, whose rows can be read."""

    columns: Mapping[str, list[str]]
    """The columns, each with the columns nested in it, as far as the schema or the first row shows them."""
    has_rows: bool
    rows: Callable[[], Iterator[Row | InvalidRow]]
    """Reads the rows, from the first."""


def open_rows(path: Path) -> RowFile:
    """A file's columns and rows.

    Raises:
        DataError, OSError, ValueError, ArrowException: the file cannot be read, or holds no valid row at its start.
    """
    match path.suffix:
        case ".parquet":
            file = pq.ParquetFile(path)
            return RowFile(
                nested_columns(file.schema_arrow),
                file.metadata.num_rows > 0,
                lambda: batch_rows(_parquet_batches(path)),
            )
        case ".jsonl":
            return _from_first_rows(path, lambda: _json_lines(path))
        case ".json":
            if not _is_array(path):
                return _from_first_rows(path, lambda: _json_lines(path))
            rows = _json_array(path)
            return _from_first_rows(path, lambda: iter(rows))
        case ".csv":
            return _from_first_rows(path, lambda: _csv_rows(path))
    raise ValueError(f"the file name must end in .parquet, .jsonl, .json or .csv, not {path.suffix!r}")


def nested_columns(schema: pa.Schema) -> dict[str, list[str]]:
    """The columns of a schema, each with those nested in it."""
    return {
        field.name: [child.name for child in field.type] if pa.types.is_struct(field.type) else [] for field in schema
    }


def batch_rows(batches: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[Row | InvalidRow]:
    """The rows of Arrow batches."""
    start = 0
    for batch in batches:
        try:
            yield from batch.to_pylist()
        except (ValueError, OverflowError):  # text that is not UTF-8, or a date that Python cannot represent
            yield from (_single_row(batch, index, start + index) for index in range(batch.num_rows))
        start += batch.num_rows


def find(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of one nested in another by a dotted name; None if there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def json_value(value: Any) -> Any:
    """The value as JSON has it: dates as ISO text, other numbers as text; None for bytes and non-finite numbers."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): json_value(inner) for key, inner in value.items()}
        case list() | tuple():
            return [json_value(inner) for inner in value]
        case datetime.date() | datetime.time():
            return value.isoformat()
        case bytes():
            return None
    return str(value)


def _from_first_rows(path: Path, rows: Callable[[], Iterator[Row | InvalidRow]]) -> RowFile:
    """A file whose columns are those of its first valid row."""
    start = list(islice(rows(), BATCH_ROWS))
    first = next((row for row in start if not isinstance(row, InvalidRow)), None)
    if first is None and start:
        invalid = start[0]
        assert isinstance(invalid, InvalidRow)
        raise DataError(f"{path}: {invalid.row} {invalid.reason}")
    columns = {name: list(value) if isinstance(value, dict) else [] for name, value in (first or {}).items()}
    return RowFile(columns, first is not None, rows)


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    yield from pq.ParquetFile(path).iter_batches(batch_size=ARROW_ROWS)


def _single_row(batch: pa.RecordBatch | pa.Table, index: int, number: int) -> Row | InvalidRow:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return InvalidRow(f"row {number}", one_line(error))


def _json_lines(path: Path) -> Iterator[Row | InvalidRow]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_ROW + 1):
            number += 1
            if len(line) > LONGEST_ROW:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_ROW)
                yield InvalidRow(f"line {number}", f"has more than {LONGEST_ROW} bytes")
            elif line.strip():
                yield _json_line(line, number)


def _json_line(line: bytes, number: int) -> Row | InvalidRow:
    try:
        row = json.loads(line.decode())
    except RecursionError:
        return InvalidRow(f"line {number}", "is not a row: it is nested too deeply")
    except ValueError as error:
        return InvalidRow(f"line {number}", f"is not JSON: {one_line(error)}")
    return row if isinstance(row, dict) else InvalidRow(f"line {number}", "is not a JSON object")


def _is_array(path: Path) -> bool:
    """Whether the file's first character is that of a JSON array; otherwise it may hold JSON Lines."""
    with path.open("rb") as file:
        return file.read(4096).lstrip().startswith(b"[")


def _json_array(path: Path) -> list[Row | InvalidRow]:
    if path.stat().st_size > LARGEST_JSON_ARRAY:
        raise ValueError(f"a JSON array may have {LARGEST_JSON_ARRAY >> 30} GiB; write the rows as JSON Lines (.jsonl)")
    try:
        rows = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("is not JSON: it is nested too deeply") from None
    return [
        row if isinstance(row, dict) else InvalidRow(f"row {number}", "is not a JSON object")
        for number, row in enumerate(rows)
    ]


def _csv_rows(path: Path) -> Iterator[Row | InvalidRow]:
    csv.field_size_limit(LONGEST_ROW)
    # What is not UTF-8 becomes half of a surrogate pair, so that it costs its row and not the file.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file)
        header = _next_record(reader)
        if isinstance(header, str):
            raise ValueError(f"the header {header}")
        if header and len(set(header)) < len(header):
            raise ValueError(f"the header has a column twice: {', '.join(header)}")
        number = -1
        while header and (record := _next_record(reader)) is not None:
            if record == []:  # an empty line
                continue
            number += 1
            if isinstance(record, str):
                yield InvalidRow(f"row {number}", record)
            elif len(record) != len(header):
                yield InvalidRow(f"row {number}", f"has {len(record)} fields, but the header has {len(header)}")
            elif not all(map(is_valid_unicode, record)):
                yield InvalidRow(f"row {number}", "is not UTF-8 text")
            else:
                yield dict(zip(header, record, strict=True))


def _next_record(reader: Iterator[list[str]]) -> list[str] | str | None:
    """The next record, or why it cannot be read; None at the end."""
    try:
        return next(reader, None)
    except csv.Error as error:
        return f"is not CSV: {error}"
