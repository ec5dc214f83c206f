"""A run's checkpoints: which exist, which are kept, and the driver's state in them. Runs in the driver."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_hapo.protocols import Trainer
from megatron_hapo.types import EntropyStats

logger = logging.getLogger(__name__)

STATE_FILE = "run_state.json"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The driver's part of a checkpoint."""

    step: int
    prompts: int
    """Position of the prompt sampler: prompts consumed so far."""
    stats: EntropyStats | None


class Checkpoints:
    """The `step_*` folders in a run's `checkpoints` folder; a folder with its final name is complete.

    Args:
        keep: number of checkpoints that are kept.
        resume: whether the run continues from the newest checkpoint.
    """

    def __init__(self, folder: Path, *, keep: int, resume: bool):
        self._folder, self._keep, self._resume = folder, keep, resume

    def save(self, state: RunState, trainer: Trainer) -> None:
        """Write a checkpoint, then remove the oldest beyond `keep`, and later steps: a restarted run left those."""
        final = self._folder / f"step_{state.step:08d}"
        partial = final.with_name(final.name + ".partial")
        for leftover in (partial, final):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        trainer.save_checkpoint(partial)
        (partial / STATE_FILE).write_text(json.dumps(asdict(state), indent=2))
        partial.rename(final)
        complete = self._complete()
        own = complete[: complete.index(final) + 1]
        for old in (*own[: -self._keep], *complete[len(own) :]):
            shutil.rmtree(old)

    def newest(self, trainer: Trainer) -> RunState | None:
        """Load the newest checkpoint into the trainer; None if there is none or the run does not resume."""
        complete = self._complete() if self._resume else []
        if not complete:
            return None
        folder = complete[-1]
        values = json.loads((folder / STATE_FILE).read_text())
        stats = EntropyStats(**values.pop("stats")) if values["stats"] else None
        trainer.load_checkpoint(folder)
        logger.info("resuming from %s", folder)
        return RunState(**{**values, "stats": stats})

    def newest_step(self) -> int:
        """The step that the run continues from; 0 if it starts from the beginning."""
        complete = self._complete() if self._resume else []
        return int(complete[-1].name.removeprefix("step_")) if complete else 0

    def _complete(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step_*") if path.suffix != ".partial")
