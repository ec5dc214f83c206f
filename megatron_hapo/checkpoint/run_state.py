"""Which checkpoints a run has, and what the driver must know to go on from one. Runs in the driver."""

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
    """State of the prompt sampler."""
    stats: EntropyStats | None


class Checkpoints:
    """The `step_*` folders below a run's `checkpoints`; a folder under its final name is complete."""

    def __init__(self, folder: Path, *, keep: int, resume: bool):
        self._folder, self._keep, self._resume = folder, keep, resume

    def save(self, state: RunState, trainer: Trainer) -> None:
        """Write a checkpoint, then drop the oldest beyond `keep`, and later ones: of a run that was started over."""
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
        """Load the newest checkpoint into the trainer; None where there is none or the run starts anew."""
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
        """Step that a run will go on from; 0 where it starts anew."""
        complete = self._complete() if self._resume else []
        return int(complete[-1].name.removeprefix("step_")) if complete else 0

    def _complete(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step_*") if path.suffix != ".partial")
