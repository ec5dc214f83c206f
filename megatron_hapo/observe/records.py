"""Records of responses and their tokens: a parquet file per step, written by a thread beside the training.

The columns are documented in docs/records.md. The training only hands over references to what it has anyway: text is
decoded, and files are written, in the thread. What goes wrong there is logged once and never ends the run.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hapo.config import Config
from megatron_hapo.errors import one_line
from megatron_hapo.observe.record_schema import FOLDER, JOB_KEY, MEASURES, SCHEMA, SCHEMA_VERSION, VERSION_KEY, Origin
from megatron_hapo.observe.token_text import Decode, decoder, text_and_ends
from megatron_hapo.protocols import Trainer
from megatron_hapo.types import KeptTokens, Rollout, ScoredGroup, TokenScores, TrainBatch, merge_tokens

logger = logging.getLogger(__name__)

_FILE = re.compile(r"\.?(?:step|eval)_([0-9]{8})\.parquet(\.partial)?")
ROW_GROUP_TOKENS = 1 << 18
"""Response tokens that are encoded at once; a single group may have more."""
_STREAMS = [f"{name}.list.element" for name in MEASURES]
_DICTIONARIES = [
    f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
    for field in SCHEMA if field.name not in MEASURES and not pa.types.is_floating(field.type)
]  # fmt: skip
"""Paths of columns in a file, for parquet's encodings."""
_MAX_WAITING = 2
"""Files that may wait for the disk; further ones are left out rather than delay the training or fill the memory."""


@contextmanager
def open_records(config: Config, tokenizer: Any, origin: Origin, *, start_step: int) -> Iterator[RecordWriter | None]:
    """The writer of a run that continues after this step; None if the run records nothing."""
    if not config.record.every:
        yield None
        return
    with RecordWriter(config, decoder(tokenizer), origin, start_step=start_step) as writer:
        yield writer


class RecordWriter:
    """Writes the files of `config.record` into the run folder; a context manager, which waits for the last file.

    Args:
        decode: token ids to text, with special tokens.
        origin: the model that the run started from.
        start_step: files of later steps are removed: they come from a run that this one replaces. With 0 all are.
    """

    def __init__(self, config: Config, decode: Decode, origin: Origin, *, start_step: int):
        self._config, self._settings, self._origin = config, config.record, origin
        self._folder = config.run_dir / FOLDER
        self._decode = lru_cache(maxsize=1 << 16)(decode)
        self._start_step = start_step
        self._waiting: queue.Queue[tuple[str, Callable[[], Iterator[pa.Table]]] | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._write_all, name="records", daemon=True)
        self._told: set[str] = set()

    def __enter__(self) -> RecordWriter:
        try:
            for path, step, partial in _files(self._folder):
                if partial or step > self._start_step or not self._start_step:
                    path.unlink()
        except OSError as error:
            self._tell("remove", f"records of an earlier run in {self._folder} cannot be removed: {error}")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.put(None)
        self._thread.join()

    def num_responses(self, step: int, groups: Sequence[ScoredGroup]) -> int:
        """How many responses of a training step are recorded, from the first; 0 if the step is not."""
        recorded = self._recorded(groups) if step % self._settings.every == 0 else ()
        return sum(len(group.rollouts) for group in recorded)

    def _recorded(self, groups: Sequence[ScoredGroup]) -> Sequence[ScoredGroup]:
        return groups[: self._settings.groups or len(groups)]

    def add_step(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        batch: TrainBatch,
        scores: TokenScores,
        updated: Mapping[str, np.ndarray],
        *,
        collection: Mapping[str, Any],
    ) -> None:
        """Records a step, soon.

        Args:
            batch: all groups' rollouts in order, with advantages.
            scores: of all its tokens.
            updated: what the updates used of the tokens of the recorded groups, in order, by column.
            collection: how the groups were collected, as JSON values, for a replay (`rollout.replay`).
        """
        stats = None if batch.stats is None else asdict(batch.stats)
        routes = batch.routes is not None
        details = {"num_groups": len(groups), "collection": collection, "stats": stats, "replayed_routes": routes}
        groups = self._recorded(groups)
        num_tokens = sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)
        measures = {
            "old_log_probs": scores.log_probs[:num_tokens],
            "rollout_temperature_log_probs": scores.rollout_temperature_log_probs[:num_tokens],
            "entropies": scores.entropies[:num_tokens],
            **updated,
        }
        self._add(f"step_{step:08d}", lambda: self._tables(step, groups, batch.advantages, measures, details))

    def add_evaluation(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Records an evaluation after this step, soon."""
        details = {"num_groups": len(groups)}
        groups = self._recorded(groups)
        self._add(f"eval_{step:08d}", lambda: self._tables(step, groups, None, {}, details))

    def _add(self, name: str, tables: Callable[[], Iterator[pa.Table]]) -> None:
        try:
            self._waiting.put_nowait((name, tables))
        except queue.Full:
            self._tell(
                "full",
                f"{name}.parquet is left out, since the files before it are still being written; record fewer tokens "
                "(record.every, record.groups), or write to a faster disk",
            )

    # ----- in the thread

    def _write_all(self) -> None:
        while (job := self._waiting.get()) is not None:
            name, tables = job
            try:
                self._write(name, tables())
            except Exception as error:
                self._tell(
                    "write", f"{name}.parquet cannot be written: {type(error).__name__}: {one_line(error)[:300]}"
                )

    def _write(self, name: str, tables: Iterator[pa.Table]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f".{name}.parquet.partial"
        try:
            write_row_groups(partial, tables)
            os.replace(partial, self._folder / f"{name}.parquet")
        finally:
            partial.unlink(missing_ok=True)
        self._remove_oldest()

    def _remove_oldest(self) -> None:
        """Removes what exceeds `record.keep` and `record.max_gigabytes`."""
        newest_first = sorted(_files(self._folder), key=lambda file: (file[1], file[0].name), reverse=True)
        total = 0
        for number, (path, _, _) in enumerate(newest_first):
            total += path.stat().st_size
            if number and (number >= self._settings.keep or total > self._settings.max_gigabytes * 1e9):
                path.unlink()

    def _tell(self, kind: str, fault: str) -> None:
        """Logs the first fault of each kind; the run goes on."""
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("records: %s; the training goes on, and this is not repeated", fault)

    def _tables(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        advantages_B: np.ndarray | None,
        measures: Mapping[str, np.ndarray],
        details: Mapping[str, Any],
    ) -> Iterator[pa.Table]:
        """Tables of a few groups each, so that a reader, and this thread, need not hold a whole step."""
        schema = SCHEMA.with_metadata(self._metadata(step, details))
        first_row = first_token = 0
        for first, last in row_groups([sum(len(r.response_ids) for r in group.rollouts) for group in groups]):
            some = groups[first:last]
            num_rows = sum(len(group.rollouts) for group in some)
            num_tokens = sum(len(rollout.response_ids) for group in some for rollout in group.rollouts)
            yield self._table(
                step, some, None if advantages_B is None else advantages_B[first_row : first_row + num_rows],
                {name: values_N[first_token : first_token + num_tokens] for name, values_N in measures.items()},
                schema, first_group=first,
            )  # fmt: skip
            first_row, first_token = first_row + num_rows, first_token + num_tokens

    def _table(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        advantages_B: np.ndarray | None,
        measures: Mapping[str, np.ndarray],
        schema: pa.Schema,
        *,
        first_group: int,
    ) -> pa.Table:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = [score for group in groups for score in group.scores]
        texts = [text_and_ends(rollout.response_ids.tolist(), self._decode) for rollout in rollouts]
        prompts = {
            group: self._decode(tuple(g.rollouts[0].prompt.token_ids.tolist())) for group, g in enumerate(groups)
        }
        places = [(group, sample) for group, g in enumerate(groups) for sample in range(len(g.rollouts))]
        columns: dict[str, Any] = {
            "step": [step] * len(rollouts),
            "group": [first_group + group for group, _ in places],
            "sample": [sample for _, sample in places],
            "uid": [rollout.prompt.uid for rollout in rollouts],
            "data_source": [rollout.prompt.data_source for rollout in rollouts],
            "prompt": [prompts[group] for group, _ in places],
            "response": [text for text, _ in texts],
            "ground_truth": [rollout.prompt.ground_truth for rollout in rollouts],
            "answer": [score.answer for score in scores],
            "prompt_ids": _lists([rollout.prompt.token_ids for rollout in rollouts]),
            "response_ids": _lists([rollout.response_ids for rollout in rollouts]),
            "token_ends": _lists([np.asarray(ends, dtype=np.int32) for _, ends in texts]),
            "reward": [score.reward for score in scores],
            "earned": [score.earned for score in scores],
            "correctness": [score.correctness for score in scores],
            "reward_parts": [[{"name": n, "value": v} for n, v in score.parts.items()] for score in scores],
            "finish_reason": [rollout.finish_reason for rollout in rollouts],
            "failure": [score.failure for score in scores],
            "advantage": advantages_B,
            "policy_versions": _lists([rollout.policy_versions for rollout in rollouts]),
            "temperatures": _lists([rollout.temperatures for rollout in rollouts]),
            "rollout_log_probs": _lists([rollout.rollout_log_probs for rollout in rollouts]),
            **_kept([rollout.kept for rollout in rollouts]),
            **{name: _cut(values_N, rollouts) for name, values_N in measures.items()},
        }
        arrays = [_array(columns.get(field.name), field.type, len(rollouts)) for field in SCHEMA]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _metadata(self, step: int, details: Mapping[str, Any]) -> dict[str, str]:
        config = self._config
        job = {
            "name": config.name,
            "step": step,
            "model": str(config.model.path),
            "origin": asdict(self._origin),
            "temperature": config.rollout.temperature,
            "algorithm": config.algorithm.model_dump(mode="json"),
            **details,
        }
        return {VERSION_KEY: SCHEMA_VERSION, JOB_KEY: json.dumps(job)}


def updates_with_tokens(
    trainer: Trainer, parts: Sequence[TrainBatch], rows: Sequence[np.ndarray], lengths_B: np.ndarray, *, step: int
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """One update on each mini-batch: their metrics, and what they used of the tokens of the recorded responses.

    Args:
        rows: of the step's batch, for each mini-batch.
        lengths_B: tokens of the recorded responses, which are the first of the step's batch; empty: none is recorded.
    """
    metrics, updated = [], []
    for part, its_rows in zip(parts, rows, strict=True):
        wanted = np.flatnonzero(its_rows < len(lengths_B)).tolist()
        metrics.append(trainer.update(part, step=step, keep_tokens=bool(wanted)))
        if wanted:
            updated += [(its_rows[held], values) for held, values in trainer.updated_tokens(wanted)]
    return metrics, merge_tokens(updated, lengths_B) if updated else {}


def write_row_groups(path: Path, tables: Iterable[pa.Table]) -> None:
    """Writes tables of the records' schema as the row groups of one file, which has the first one's metadata.

    Readers of one prompt's responses read its row group only. Dictionaries would only enlarge columns of floats.
    """
    with ExitStack() as stack:
        writer = None
        for table in tables:
            if writer is None:
                how = {"use_dictionary": _DICTIONARIES, "use_byte_stream_split": _STREAMS, "compression": "zstd"}
                writer = stack.enter_context(pq.ParquetWriter(path, table.schema, **how))
            writer.write_table(table, row_group_size=max(1, len(table)))


def row_groups(tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last + 1 group of each row group, for groups with these numbers of response tokens."""
    first = size = 0
    for group, count in enumerate(tokens):
        if group > first and size + count > ROW_GROUP_TOKENS:
            yield first, group
            first, size = group, 0
        size += count
    if tokens:
        yield first, len(tokens)


def _files(folder: Path) -> list[tuple[Path, int, bool]]:
    """The files of records in a folder: path, step, and whether it was left unfinished."""
    matches = [(path, _FILE.fullmatch(path.name)) for path in folder.glob("*.parquet*")]
    matches += [(path, _FILE.fullmatch(path.name)) for path in folder.glob(".*.parquet.partial")]
    return [(path, int(match[1]), match[2] is not None) for path, match in dict(matches).items() if match]


def _lists(parts: Sequence[np.ndarray]) -> pa.Array:
    """One list per response."""
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(parts)))


def _kept(kept: Sequence[KeptTokens | None]) -> dict[str, pa.Array]:
    """The columns of kept tokens; none if the choice was not cut."""
    present = [tokens for tokens in kept if tokens is not None]
    if len(present) < len(kept) or not present:
        return {}
    return {
        "kept_lengths": _lists([tokens.lengths for tokens in present]),
        "kept_ids": _lists([tokens.token_ids for tokens in present]),
    }


def _cut(values_N: np.ndarray, rollouts: Sequence[Rollout]) -> pa.Array:
    """One list per response of values that lie end to end."""
    offsets = np.cumsum([0, *(len(rollout.response_ids) for rollout in rollouts)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values_N))


def _array(values: Any, kind: pa.DataType, length: int) -> pa.Array:
    if values is None:
        return pa.nulls(length, kind)
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)
