"""Which checkpoints of a run are kept, and from which it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hapo.checkpoint.run_checkpoints import Checkpoints, RunState


class Trainer:
    """A trainer whose checkpoint is the name of its folder."""

    def __init__(self) -> None:
        self.loaded = ""

    def save_checkpoint(self, folder: Path) -> None:
        (folder / "weights").write_text(folder.name)

    def load_checkpoint(self, folder: Path) -> None:
        self.loaded = (folder / "weights").read_text()


def save(folder: Path, *steps: int, resume: bool = True) -> list[str]:
    checkpoints, trainer = Checkpoints(folder, keep=2, resume=resume), Trainer()
    for step in steps:
        checkpoints.save(RunState(step=step, prompts=10 * step, stats=None), _any(trainer))
    return sorted(path.name for path in folder.iterdir())


def _any(trainer: Trainer) -> Any:
    return trainer


def test_the_newest_are_kept_and_a_run_resumes_from_the_last(tmp_path: Path) -> None:
    assert save(tmp_path, 5, 10, 15) == ["step_00000010", "step_00000015"]
    trainer = Trainer()
    state = Checkpoints(tmp_path, keep=2, resume=True).newest(_any(trainer))
    assert (state and (state.step, state.prompts), trainer.loaded) == ((15, 150), "step_00000015.partial")


def test_a_restarted_run_keeps_its_own_checkpoints_only(tmp_path: Path) -> None:
    save(tmp_path, 950, 1000)
    started_over = Checkpoints(tmp_path, keep=2, resume=False)
    assert started_over.newest_step() == 0
    assert save(tmp_path, 50, resume=False) == ["step_00000050"]
    assert Checkpoints(tmp_path, keep=2, resume=True).newest_step() == 50
    assert save(tmp_path, 100) == ["step_00000050", "step_00000100"]
