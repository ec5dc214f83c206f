"""Records of responses and their tokens: a parquet file per step, written by a thread beside the training.

The columns are documented in docs/records.md. The training only hands over references to what it has anyway: text is
decoded, and files are written, in the thread. What goes wrong there is logged once and never ends the run.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_hapo.config import Config
from megatron_hapo.errors import one_line
from megatron_hapo.observe import running_stages
from megatron_hapo.observe.record_schema import FOLDER, Origin
from megatron_hapo.observe.record_tables import RecordTables, write_row_groups
from megatron_hapo.observe.token_text import Decode, decoder
from megatron_hapo.protocols import Trainer
from megatron_hapo.types import ScoredGroup, TokenScores, TrainBatch, merge_tokens

logger = logging.getLogger(__name__)

_FILE = re.compile(r"\.?(?:step|eval)_([0-9]{8})\.parquet(\.partial)?")
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
        self._settings, self._tables = config.record, RecordTables(config, decode, origin)
        self._folder = config.run_dir / FOLDER
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
        self._add(f"step_{step:08d}", lambda: self._tables.of(step, groups, details, batch.advantages, measures))

    def add_evaluation(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Records an evaluation after this step, soon."""
        details = {"num_groups": len(groups)}
        groups = self._recorded(groups)
        self._add(f"eval_{step:08d}", lambda: self._tables.of(step, groups, details))

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


def updates_with_tokens(
    trainer: Trainer, parts: Sequence[TrainBatch], rows: Sequence[np.ndarray], lengths_B: np.ndarray, *, step: int
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """One update on each mini-batch: their metrics, and what they used of the tokens of the recorded responses.

    Args:
        rows: of the step's batch, for each mini-batch.
        lengths_B: tokens of the recorded responses, which are the first of the step's batch; empty: none is recorded.
    """
    metrics, updated = [], []
    for number, (part, its_rows) in enumerate(zip(parts, rows, strict=True)):
        running_stages.report(number, len(parts), "mini-batches")
        wanted = np.flatnonzero(its_rows < len(lengths_B)).tolist()
        metrics.append(trainer.update(part, step=step, keep_tokens=bool(wanted)))
        if wanted:
            updated += [(its_rows[held], values) for held, values in trainer.updated_tokens(wanted)]
    return metrics, merge_tokens(updated, lengths_B) if updated else {}


def _files(folder: Path) -> list[tuple[Path, int, bool]]:
    """The files of records in a folder: path, step, and whether it was left unfinished."""
    matches = [(path, _FILE.fullmatch(path.name)) for path in folder.glob("*.parquet*")]
    matches += [(path, _FILE.fullmatch(path.name)) for path in folder.glob(".*.parquet.partial")]
    return [(path, int(match[1]), match[2] is not None) for path, match in dict(matches).items() if match]
