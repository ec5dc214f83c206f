"""A run's checkpoints: which are sound, which are kept, and the driver's state in them. Runs in the driver."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hapo.checkpoint.manifest import MANIFEST, has_manifest, quick_faults
from megatron_hapo.checkpoint.model_folder import atomic_folder, model_fingerprint, remove_partial
from megatron_hapo.config import Config
from megatron_hapo.config.resumption import changed_settings, refusals
from megatron_hapo.data.sampling import SamplerState
from megatron_hapo.errors import ConfigError
from megatron_hapo.protocols import Trainer
from megatron_hapo.types import EntropyStats

logger = logging.getLogger(__name__)

STATE_FILE = "run_state.json"
GROUPS_FILE = "finished_groups.npz"
"""Groups that wait to be trained on, if there are any."""
SETTINGS_FILE = "run_settings.json"
"""The settings that a checkpoint was written with, and a fingerprint of the model that the run started from."""
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The driver's part of a checkpoint."""

    step: int
    prompts: SamplerState
    """Where the sequence of prompts stands."""
    stats: EntropyStats | None
    controllers: dict[str, float] = field(default_factory=dict)
    """State of the method's controllers (`Part.next_state`); checkpoints of earlier versions have none."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The step's, for its row if the run ends before it is written; checkpoints of earlier versions have none."""
    finished_groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Groups that wait to be trained on (`rollout.saved_groups`)."""


class Checkpoints:
    """The `step_*` folders in a run's `checkpoints` folder. One is sound if all files agree with its manifest.

    Args:
        keep: number of sound checkpoints that are kept.
        resume: whether the run continues from the newest sound checkpoint.
        config: of the run, for comparison with the settings of the checkpoint; None: not compared.
    """

    def __init__(self, folder: Path, *, keep: int, resume: bool, config: Config | None = None):
        self._folder, self._keep, self._resume, self._config = folder, keep, resume, config
        self._damaged: dict[Path, str] = {}
        """Checkpoints that cannot be used, with a reason, as far as they have been looked at."""
        self._is_verified = False
        self._written: set[Path] = set()
        """Checkpoints of this run, beside which a run that starts over keeps no others."""

    def save(self, state: RunState, trainer: Trainer) -> None:
        """Write a checkpoint, then remove the oldest beyond `keep`, and later steps: a restarted run left those.

        A failed attempt leaves nothing behind.
        """
        for leftover in self._folder.glob("*.partial"):
            remove_partial(leftover)
        final = self._folder / f"step_{state.step:08d}"
        hashes: dict[str, str] = {}
        with atomic_folder(final, hashes) as partial, _explain_full_disk(partial):
            hashes |= trainer.save_checkpoint(partial)
            values = asdict(replace(state, finished_groups={}))
            del values["finished_groups"]
            (partial / STATE_FILE).write_text(json.dumps(values, indent=2))
            if state.finished_groups:
                np.savez(partial / GROUPS_FILE, allow_pickle=False, **state.finished_groups)
            if self._config is not None:
                (partial / SETTINGS_FILE).write_text(json.dumps(_settings(self._config), indent=2))
        self._damaged.pop(final, None)
        self._written.add(final)
        ours = [folder for folder in self._numbered() if has_manifest(folder)]
        mine = ours if self._resume else [folder for folder in ours if folder in self._written]
        sound = [folder for folder in mine if self._fault(folder) is None]
        kept = sound[: sound.index(final) + 1][-self._keep :]
        for old in ours:
            if old not in kept:
                shutil.rmtree(old)

    def check(self) -> None:
        """Find the checkpoint to resume from, before anything starts, by what can be read quickly; log what changed.

        Raises:
            ConfigError: all checkpoints are damaged, or the newest sound one does not go with the run's settings.
        """
        if (folder := self._newest_sound()) is not None:
            self._check_settings(folder)

    def verify(self, trainer: Trainer) -> None:
        """Read that checkpoint completely, each rank a part. If it is damaged, the next older one takes its place.

        Raises:
            ConfigError: as `check` does.
        """
        if self._is_verified:
            return
        while (folder := self._newest_sound()) is not None:
            faults = trainer.damaged_files(folder)
            if not faults:
                break
            self._skip(folder, faults[0])
            self.check()
        self._is_verified = True

    def newest(self, trainer: Trainer) -> RunState | None:
        """Load the newest sound checkpoint into the trainer; None if there is none or the run does not resume."""
        self.verify(trainer)
        folder = self._newest_sound()
        if folder is None:
            return None
        values = json.loads((folder / STATE_FILE).read_text())
        stats = EntropyStats(**values.pop("stats")) if values["stats"] else None
        trainer.load_checkpoint(folder)
        logger.info("resuming from %s", folder)
        return RunState(**{**values, "stats": stats}, finished_groups=_arrays(folder / GROUPS_FILE))

    def newest_step(self) -> int:
        """The step that the run continues from; 0 if it starts from the beginning."""
        folder = self._newest_sound()
        return 0 if folder is None else _step(folder)

    def bytes_on_disk(self) -> int:
        """Size of the checkpoints that later ones will replace."""
        return sum(path.stat().st_size for path in self._folder.glob("step_*/**/*") if path.is_file())

    def _newest_sound(self) -> Path | None:
        """The checkpoint to resume from, as far as the damage is known; None to start from the beginning."""
        if not self._resume:
            return None
        damaged = []
        for folder in reversed(self._numbered()):
            fault = self._fault(folder)
            if fault is None:
                return folder
            self._skip(folder, fault)
            if any((folder / name).exists() for name in (MANIFEST, STATE_FILE, ".metadata")):
                damaged.append(folder)
        if damaged:
            reasons = [self._damaged[folder] for folder in damaged]
            raise ConfigError(
                [*reasons, f"{self._folder}: no checkpoint is sound; checkpoint.resume=false starts over"]
            )
        return None

    def _skip(self, folder: Path, fault: str) -> None:
        if folder not in self._damaged:
            self._damaged[folder] = fault
            logger.warning("checkpoint %s is skipped: %s", folder.name, fault)

    def _fault(self, folder: Path) -> str | None:
        """Why the folder is not a sound checkpoint, as far as that can be seen quickly; None if it may be one."""
        if folder in self._damaged:
            return self._damaged[folder]
        if not has_manifest(folder):
            return f"{folder}: has no {MANIFEST}, so it is not a checkpoint, or is incomplete"
        if faults := quick_faults(folder):
            return faults[0]
        try:
            step = json.loads((folder / STATE_FILE).read_text())["step"]
        except (OSError, ValueError, KeyError, TypeError):
            return f"{folder / STATE_FILE}: cannot be read"
        return None if step == _step(folder) else f"{folder}: is a checkpoint of step {step} under another name"

    def _check_settings(self, folder: Path) -> None:
        """Log the settings that differ from the checkpoint's; raise ConfigError if one of them is refused."""
        path = folder / SETTINGS_FILE
        if self._config is None or not path.is_file():
            return
        recorded = json.loads(path.read_text())
        changes = changed_settings(recorded["settings"], self._config)
        faults = refusals(changes, self._config, step=_step(folder), checkpoint=folder)
        if recorded["model"] != model_fingerprint(self._config.model.path):
            faults.append(
                f"model.path: {self._config.model.path} is not the model that {folder} was trained from "
                f"({recorded['settings']['model']['path']}); set it back, or start over with checkpoint.resume=false"
            )
        if faults:
            raise ConfigError(faults)
        effective = [str(change) for change in changes if change.on_resume == "effective"]
        if effective:
            logger.warning(
                "settings changed since %s, in effect from the next step: %s", folder.name, ", ".join(effective)
            )

    def _numbered(self) -> list[Path]:
        """Folders that are named like checkpoints, by step."""
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file; none if it is not there."""
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _settings(config: Config) -> dict[str, Any]:
    return {"settings": config.model_dump(mode="json"), "model": model_fingerprint(config.model.path)}


@contextlib.contextmanager
def _explain_full_disk(folder: Path) -> Iterator[None]:
    from megatron_hapo.checkpoint.checkpoint_errors import explain_write_errors  # imports torch

    with explain_write_errors(folder):
        yield
