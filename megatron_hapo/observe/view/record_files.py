"""The records of a run as arrays: one row per response, sorted by group and sample, read column by column."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hapo.errors import DataError, one_line

FOLDER = "rollouts"
SCHEMA_VERSION = "1"
TOKEN_VALUES = (
    "temperatures", "rollout_log_probs", "old_log_probs", "rollout_temperature_log_probs", "entropies", "h",
    "token_advantages", "importance_ratios", "clip_low", "clip_high", "policy_versions",
)  # fmt: skip
"""The columns that hold one number for each response token, or null."""
_SCALARS = (
    "group", "sample", "uid", "data_source", "prompt", "response", "ground_truth", "reward", "correctness",
    "finish_reason", "failure", "advantage",
)  # fmt: skip
_REQUIRED = ("group", "sample", "prompt", "response", "response_ids", "token_ends")
_UNREADABLE = (OSError, ValueError, pa.ArrowException)
"""What pyarrow raises for a damaged file; ValueError also for text that is not UTF-8."""
_FILE_NAME = re.compile(r"(step|eval)_([0-9]{8})\.parquet")


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

    @cached_property
    def job(self) -> dict[str, Any]:
        """What the file says about the run that wrote it; empty if it says nothing.

        Raises:
            DataError: the file cannot be read, or has another version of the schema.
        """
        metadata = self._schema.metadata or {}
        version = metadata.get(b"megatron_hapo.schema", b"none").decode(errors="replace")
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{self.path}: its records have schema {one_line(version)}; this version shows {SCHEMA_VERSION}"
            )
        try:
            job = json.loads(metadata.get(b"megatron_hapo.job", b"{}"))
        except ValueError:
            job = None
        return job if isinstance(job, dict) else {}

    @cached_property
    def _schema(self) -> pa.Schema:
        try:
            schema = pq.read_schema(self.path)
        except _UNREADABLE as error:
            raise DataError(f"{self.path} cannot be read: {one_line(error)}") from None
        columns = (*_SCALARS, *TOKEN_VALUES, "prompt_ids", "response_ids", "token_ends", "reward_parts")
        missing = sorted(set(columns) - set(schema.names))
        if missing:
            raise DataError(f"{self.path}: columns {', '.join(missing)} are missing; it holds no records of a run")
        return schema

    def _read(self, columns: Sequence[str], filters: Any = None) -> pa.Table:
        try:
            table = pq.read_table(self.path, columns=list(columns), filters=filters)
        except _UNREADABLE as error:
            raise DataError(f"{self.path} cannot be read: {one_line(error)}") from None
        if incomplete := [name for name in _REQUIRED if name in columns and table[name].null_count]:
            raise DataError(f"{self.path}: {incomplete[0]} is missing in some rows")
        return table

    @cached_property
    def _order(self) -> pa.Array:
        return _sorted_rows(self._read(["group", "sample"]))

    def column(self, name: str) -> list[Any]:
        """One value per response."""
        return self._read([name])[name].take(self._order).to_pylist()

    @cached_property
    def lengths(self) -> np.ndarray:
        """[B] int64, number of tokens of each response."""
        return _list_lengths(self._in_order(self._read(["response_ids"])["response_ids"]))

    def tokens(self, name: str) -> np.ndarray:
        """[N] values of all response tokens: int32 for ids and ends, float32 for measures, NaN where not recorded.

        Raises:
            DataError: a response has another number of values than tokens.
        """
        values = self._in_order(self._read([name])[name])
        lengths = _list_lengths(values)
        flat = np.asarray(values.flatten())
        recorded = lengths > 0
        if not np.array_equal(lengths[recorded], self.lengths[recorded]):
            raise DataError(f"{self.path}: {name} has another number of values than a response has tokens")
        if np.array_equal(lengths, self.lengths):
            return flat
        spread = np.full(int(self.lengths.sum()), np.nan, dtype=np.float32)
        spread[np.repeat(recorded, self.lengths)] = flat
        return spread

    def _in_order(self, column: pa.ChunkedArray) -> Any:
        return column.take(self._order).combine_chunks()

    def responses(self, first_group: int, last_group: int) -> list[dict[str, Any]]:
        """Whole rows of the groups from first to last, sorted; token columns as numpy arrays, or None."""
        lists = (*TOKEN_VALUES, "response_ids", "token_ends")
        columns = [*_SCALARS, "reward_parts", *lists]
        table = self._read(columns, [("group", ">=", first_group), ("group", "<=", last_group)])
        table = table.take(_sorted_rows(table))
        plain = table.drop_columns(list(lists)).to_pylist()
        for name in lists:
            for row, value in zip(plain, table[name], strict=True):
                row[name] = np.asarray(value.values) if value.is_valid else None
        for row in plain:
            self._check(row)
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
        paths = [path for path in (folder / FOLDER).glob("*.parquet") if _FILE_NAME.fullmatch(path.name)]
        if not paths:
            raise DataError(f"{folder}: no records in {FOLDER}/; it must be the folder of a run that records responses")
        files = sorted(map(RecordFile, paths), key=lambda file: (file.step, not file.is_evaluation))
        for file in files:
            _ = file.job  # checks the file's version and columns
        runs.append(RecordedRun(one_line(folder.resolve().name), folder, files))
    return runs


def _sorted_rows(table: pa.Table) -> pa.Array:
    return pa.array(np.lexsort((table["sample"].to_numpy(), table["group"].to_numpy())))


def _list_lengths(lists: Any) -> np.ndarray:
    """[B] int64, number of values of each list; 0 for null."""
    return np.asarray(lists.value_lengths().fill_null(0), dtype=np.int64)
