"""Prompts that are only sampled and scored, into files of records; an interrupted call is continued by the next.

A file has as many prompts as a training step, so that a run can be trained on the files (`replay`), and appears when it
is complete. Its metadata hold everything that the responses depend on.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hapo.config import Config
from megatron_hapo.errors import DataError, HapoError
from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.observe.record_schema import FILE_NAME, FOLDER
from megatron_hapo.observe.record_tables import RecordTables, write_row_groups
from megatron_hapo.observe.running_stages import stage
from megatron_hapo.observe.view.record_files import RecordFile
from megatron_hapo.protocols import RewardPool, RolloutPool
from megatron_hapo.rollout.collect import generate_scored, training_sampling
from megatron_hapo.types import Prompt

logger = logging.getLogger(__name__)

_SETTINGS = "generation"
"""Key of the metadata that holds what the responses depend on."""


@dataclass(frozen=True)
class Summary:
    """What was generated."""

    prompts: int
    responses: int
    tokens: int
    reward: float
    """Mean over the responses."""
    accuracy: float
    """Share of the responses that are fully correct."""
    solved: float
    """Share of the prompts whose responses are all correct."""
    unsolved: float
    """Share of the prompts whose responses are all wrong."""


class Generation:
    """The files of some prompts.

    Args:
        folder: has, or gets, the folder of records.
        prompts: in order; `batch.prompts_per_step` of them are a file.
        settings: what the responses depend on besides the prompts, as JSON values.
    Raises:
        HapoError: the folder has records that were made with other settings, or that cannot be read.
    """

    def __init__(
        self, folder: Path, prompts: Sequence[Prompt], config: Config, settings: Mapping[str, Any], tables: RecordTables
    ):
        self._folder, self._config, self._tables = folder / FOLDER, config, tables
        self._settings = json.loads(json.dumps(settings))
        size = config.batch.prompts_per_step
        self._parts = dict(enumerate(batched(prompts, size), start=1))
        for path in self._present():
            self._check(RecordFile(path))

    def missing(self) -> list[int]:
        """The numbers of the files that are still to be written."""
        return [number for number, part in self._parts.items() if not self._is_complete(number, part)]

    def complete(self, pool: RolloutPool, rewards: RewardPool) -> None:
        """Sample and score the prompts of the missing files, and log how far that is after each."""
        missing, start, tokens = self.missing(), time.monotonic(), 0
        self._folder.mkdir(parents=True, exist_ok=True)
        for done, number in enumerate(missing, start=1):
            sampling = replace(training_sampling(self._config, step=number, adaptive=None), keep_routes=False)
            with stage(f"file {done} of {len(missing)}"):
                groups = generate_scored(pool, rewards, self._parts[number], sampling, StepClock())
            collection = {"kept_share": 1.0, "metrics": {}, "prompts": 0}
            details = {"num_groups": len(groups), "collection": collection, _SETTINGS: self._settings}
            partial = self._folder / f".{self._path(number).name}.partial"
            write_row_groups(partial, self._tables.of(number, groups, details))
            os.replace(partial, self._path(number))
            tokens += sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)
            seconds = time.monotonic() - start
            left = _duration(seconds / done * (len(missing) - done))
            logger.info(
                "%d of %d files, %.0f tokens/s, %s left",
                len(self._parts) - len(missing) + done, len(self._parts), tokens / seconds, left,
            )  # fmt: skip

    def summary(self) -> Summary:
        """Over all files, which must be there."""
        files = [RecordFile(self._path(number)) for number in self._parts]
        correctness = np.concatenate([np.array(file.column("correctness")) for file in files])
        right = correctness.reshape(-1, self._config.batch.samples_per_prompt) >= 1
        rewards = np.concatenate([np.array(file.column("reward")) for file in files])
        return Summary(
            prompts=len(right), responses=right.size, tokens=int(sum(file.lengths.sum() for file in files)),
            reward=float(rewards.mean()), accuracy=float(right.mean()), solved=float(right.all(axis=1).mean()),
            unsolved=float((~right).all(axis=1).mean()),
        )  # fmt: skip

    def _is_complete(self, number: int, part: Sequence[Prompt]) -> bool:
        """Whether the file has these prompts; the last one may have been written for fewer."""
        if not self._path(number).is_file():
            return False
        uids = RecordFile(self._path(number)).column("uid")
        return uids == [prompt.uid for prompt in part for _ in range(self._config.batch.samples_per_prompt)]

    def _path(self, number: int) -> Path:
        return self._folder / f"step_{number:08d}.parquet"

    def _present(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step_*.parquet") if FILE_NAME.fullmatch(path.name))

    def _check(self, file: RecordFile) -> None:
        try:
            before = file.job.get(_SETTINGS)
        except DataError as error:
            raise HapoError(f"{error}; remove it, or choose another folder with --out") from None
        if before != self._settings:
            known = before if isinstance(before, dict) else {}
            changed = [key for key, value in self._settings.items() if known.get(key) != value]
            raise HapoError(
                f"{file.path} holds records that were not made by this command with these settings (other: "
                f"{', '.join(changed)}); remove it, or choose another folder with --out"
            )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
