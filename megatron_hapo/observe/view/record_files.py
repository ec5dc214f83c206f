"""The records of a run as arrays: one row per response, sorted by group and sample, read column by column."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hapo.errors import DataError, one_line
from megatron_hapo.observe.record_schema import (
    FILE_NAME,
    FOLDER,
    IN_VERSION_1,
    JOB_KEY,
    MEASURES,
    READABLE_VERSIONS,
    SCHEMA,
    SINCE_VERSION_2,
    VERSION_KEY,
)

TOKEN_VALUES = (*MEASURES, "policy_versions")
"""The columns that hold one number for each response token, or null."""
_SCALARS = (
    "group", "sample", "uid", "data_source", "prompt", "response", "ground_truth", "reward", "correctness",
    "finish_reason", "failure", "advantage",
)  # fmt: skip
_REQUIRED = ("group", "sample", "prompt", "response", "response_ids", "token_ends")
_UNREADABLE = (OSError, ValueError, pa.ArrowException)
"""What pyarrow raises for a damaged file; ValueError also for text that is not UTF-8."""


@dataclass(frozen=True)
class RecordFile:
    """The responses of one step, or of one evaluation."""

    path: Path

    @property
    def name(self) -> str:
        """The file's name without its suffix, e.g. step_00000012."""
        return self.path.stem

    @property
    def step(self) -> int:
        """The step after which the file is named."""
        return int(self.name.rpartition("_")[2])

    @property
    def is_evaluation(self) -> bool:
        """Whether these are responses to an evaluation's prompts."""
        return self.name.startswith("eval")

    @property
    def version(self) -> str:
        """Of the schema; `none` if the file does not say."""
        return (self._schema.metadata or {}).get(VERSION_KEY.encode(), b"none").decode(errors="replace")

    @cached_property
    def job(self) -> dict[str, Any]:
        """What the file says about the run that wrote it; empty if it says nothing.

        Raises:
            DataError: the file cannot be read, or has another version of the schema, or other columns.
        """
        if self.version not in READABLE_VERSIONS:
            raise DataError(
                f"{self.path}: its records have schema {one_line(self.version)}; this version reads "
                f"{' and '.join(READABLE_VERSIONS)}"
            )
        self._check_columns()
        try:
            job = json.loads((self._schema.metadata or {}).get(JOB_KEY.encode(), b"{}"))
        except (ValueError, RecursionError):
            job = None
        return job if isinstance(job, dict) else {}

    @cached_property
    def _schema(self) -> pa.Schema:
        try:
            return pq.read_schema(self.path)
        except _UNREADABLE as error:
            raise DataError(f"{self.path} cannot be read: {one_line(error)}") from None

    def _check_columns(self) -> None:
        """Raises DataError if a documented column is missing, or is of another type."""
        documented = [field for field in SCHEMA if self.version != "1" or field.name not in SINCE_VERSION_2]
        if missing := sorted({field.name for field in documented} - set(self._schema.names)):
            raise DataError(f"{self.path}: columns {', '.join(missing)} are missing; it holds no records of a run")
        for field in documented:
            kind = self._schema.field(field.name).type
            if kind not in (field.type, IN_VERSION_1.get(field.name)):
                raise DataError(f"{self.path}: {field.name} is {kind}, but must be {field.type}")

    def _read(self, columns: Sequence[str], filters: Any = None) -> pa.Table:
        try:
            table = pq.read_table(self.path, columns=list(columns), filters=filters)
        except _UNREADABLE as error:
            raise DataError(f"{self.path} cannot be read: {one_line(error)}") from None
        if incomplete := [name for name in _REQUIRED if name in columns and table[name].null_count]:
            raise DataError(f"{self.path}: {incomplete[0]} is missing in some rows")
        return table

    @cached_property
    def _order(self) -> pa.Array | None:
        """The rows by group and sample; None if they are in this order already, as a run writes them."""
        order = _sorted_rows(self._read(["group", "sample"]))
        return None if np.array_equal(order, np.arange(len(order))) else order

    def column(self, name: str) -> list[Any]:
        """One value per response."""
        return self.table([name])[name].to_pylist()

    @cached_property
    def lengths(self) -> np.ndarray:
        """[B] int64, number of tokens of each response."""
        return _list_lengths(self.table(["response_ids"])["response_ids"].combine_chunks())

    def tokens(self, *names: str) -> list[np.ndarray]:
        """[N] values of all response tokens of each column: int32 for ids and ends, float32 for measures, NaN where not
        recorded.

        Raises:
            DataError: a response has another number of values than tokens.
        """
        table = self.table(names)
        return [self._flat(name, table[name].combine_chunks()) for name in names]

    def _flat(self, name: str, values: Any) -> np.ndarray:
        lengths = _list_lengths(values)
        flat = np.asarray(values.flatten())
        if np.array_equal(lengths, self.lengths):
            return flat
        recorded = lengths > 0
        if not np.array_equal(lengths[recorded], self.lengths[recorded]):
            raise DataError(f"{self.path}: {name} has another number of values than a response has tokens")
        spread = np.full(int(self.lengths.sum()), np.nan, dtype=np.float32)
        spread[np.repeat(recorded, self.lengths)] = flat
        return spread

    def table(self, columns: Sequence[str], filters: Any = None) -> pa.Table:
        """These columns, sorted by group and sample.

        Args:
            filters: pyarrow's; None: all rows. With some, `columns` must have group and sample.
        """
        table = self._read(columns, filters)
        order = self._order if filters is None else _sorted_rows(table)
        return table if order is None else table.take(order)

    def responses(self, first_group: int, last_group: int) -> list[dict[str, Any]]:
        """Whole rows of the groups from first to last, sorted.

        Token columns are numpy arrays, or None; the parts of the reward are a mapping from names.
        """
        lists = (*TOKEN_VALUES, "response_ids", "token_ends")
        columns = [*_SCALARS, "reward_parts", *lists]
        table = self.table(columns, [("group", ">=", first_group), ("group", "<=", last_group)])
        plain = table.drop_columns(list(lists)).to_pylist()
        for name in lists:
            for row, value in zip(plain, table[name], strict=True):
                row[name] = np.asarray(value.values) if value.is_valid else None
        for row in plain:
            self._check(row)
            row["reward_parts"] = _parts(row["reward_parts"])
        return plain

    def _check(self, row: dict[str, Any]) -> None:
        lengths = {len(row[name]) for name in (*TOKEN_VALUES, "response_ids", "token_ends") if row[name] is not None}
        if len(lengths) > 1 or row["response_ids"] is None or row["token_ends"] is None:
            raise DataError(f"{self.path}: group {row['group']}, sample {row['sample']}: its columns differ in length")


@dataclass(frozen=True)
class RecordedRun:
    """A run and its files of records, in the order of steps; an evaluation comes before its step's own file."""

    name: str
    folder: Path
    files: list[RecordFile]


def recorded_runs(folders: Iterable[Path]) -> list[RecordedRun]:
    """The runs in these folders, with their files of records.

    Raises:
        DataError: a folder holds no records, or records that this version cannot show.
    """
    runs = []
    for folder in folders:
        paths = [path for path in (folder / FOLDER).glob("*.parquet") if FILE_NAME.fullmatch(path.name)]
        if not paths:
            raise DataError(f"{folder}: no records in {FOLDER}/; it must be the folder of a run that records responses")
        files = sorted(map(RecordFile, paths), key=lambda file: (file.step, not file.is_evaluation))
        for file in files:
            _ = file.job  # checks the file's version and columns
        runs.append(RecordedRun(one_line(folder.resolve().name), folder, files))
    return runs


def _parts(value: list[Any] | None) -> dict[str, Any]:
    """The parts of a reward by name; version 1 has pairs."""
    pairs = [tuple(part.values()) if isinstance(part, dict) else part for part in value or () if part is not None]
    return dict(pairs)


def _sorted_rows(table: pa.Table) -> pa.Array:
    return pa.array(np.lexsort((table["sample"].to_numpy(), table["group"].to_numpy())))


def _list_lengths(lists: Any) -> np.ndarray:
    """[B] int64, number of values of each list; 0 for null."""
    return np.asarray(lists.value_lengths().fill_null(0), dtype=np.int64)
