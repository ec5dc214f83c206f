"""Which checkpoints of a run are kept, and from which it resumes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hapo.checkpoint import manifest
from megatron_hapo.checkpoint.disk_space import check_disk_space
from megatron_hapo.checkpoint.manifest import MANIFEST, damaged_files, hash_files, write_manifest
from megatron_hapo.checkpoint.run_checkpoints import GROUPS_FILE, STATE_FILE, Checkpoints, RunState
from megatron_hapo.config import Config
from megatron_hapo.errors import ConfigError, HapoError
from tests.checkpoint.test_manifest import flip


class Trainer:
    """A trainer whose checkpoint is the name of its folder."""

    def __init__(self) -> None:
        self.loaded = ""

    def save_checkpoint(self, folder: Path) -> dict[str, str]:
        (folder / "weights").write_text(folder.name)
        return hash_files(folder, ["weights"])

    def damaged_files(self, folder: Path) -> list[str]:
        return damaged_files(folder)

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


def test_the_state_of_controllers_is_restored_exactly(tmp_path: Path) -> None:
    checkpoints, trainer = Checkpoints(tmp_path, keep=2, resume=True), Trainer()
    state = {"entropy_bonus/coefficient": 0.1 + 0.2, "other/integral": -1e-17 / 3}
    checkpoints.save(RunState(step=5, prompts=0, stats=None, controllers=state), _any(trainer))
    restored = Checkpoints(tmp_path, keep=2, resume=True).newest(_any(trainer))
    assert restored is not None
    assert restored.controllers == state


def test_groups_that_wait_to_be_trained_on_are_restored_and_guarded_by_the_manifest(tmp_path: Path) -> None:
    checkpoints, trainer = Checkpoints(tmp_path, keep=2, resume=True), Trainer()
    groups = {"policy_versions": np.arange(3, dtype=np.int32), "json": np.frombuffer(b"{}", np.uint8)}
    checkpoints.save(RunState(step=5, prompts=0, stats=None, finished_groups=groups), _any(trainer))
    restored = Checkpoints(tmp_path, keep=2, resume=True).newest(_any(trainer))
    assert restored is not None
    assert restored.finished_groups.keys() == groups.keys()
    for name, array in restored.finished_groups.items():
        np.testing.assert_array_equal(array, groups[name], strict=True)
    flip(tmp_path / "step_00000005" / GROUPS_FILE, 100)
    with pytest.raises(ConfigError, match=GROUPS_FILE):
        Checkpoints(tmp_path, keep=2, resume=True).newest(_any(trainer))


def test_a_checkpoint_without_controllers_is_one_of_an_earlier_version(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (folder,) = tmp_path.glob("step_*")
    values = json.loads((folder / STATE_FILE).read_text())
    del values["controllers"]
    (folder / STATE_FILE).write_text(json.dumps(values))
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    restored = Checkpoints(tmp_path, keep=2, resume=True).newest(_any(Trainer()))
    assert restored is not None
    assert restored.controllers == {}


def test_a_restarted_run_keeps_its_own_checkpoints_only(tmp_path: Path) -> None:
    save(tmp_path, 950, 1000)
    started_over = Checkpoints(tmp_path, keep=2, resume=False)
    assert started_over.newest_step() == 0
    assert save(tmp_path, 50, resume=False) == ["step_00000050"]
    assert Checkpoints(tmp_path, keep=2, resume=True).newest_step() == 50
    assert save(tmp_path, 100) == ["step_00000050", "step_00000100"]


def test_a_run_that_starts_over_keeps_no_earlier_checkpoint_of_another_run(tmp_path: Path) -> None:
    save(tmp_path, 50)
    assert save(tmp_path, 100, 150, resume=False) == ["step_00000100", "step_00000150"]


def spoil_bit(name: str) -> Callable[[Path], None]:
    return lambda folder: flip(folder / name, 9)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit in the weights": spoil_bit("weights"),
    "flipped bit in the driver's state": spoil_bit(STATE_FILE),
    "flipped bit in the manifest": spoil_bit(MANIFEST),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "file missing": lambda folder: (folder / "weights").unlink(),
    "truncated": lambda folder: os.truncate(folder / "weights", 3),
    "another step under this name": lambda folder: shutil.copytree(
        folder.with_name("step_00000010"), folder, dirs_exist_ok=True
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 5, 10, 15)
    DAMAGES[damage](tmp_path / "step_00000015")
    checkpoints, trainer = Checkpoints(tmp_path, keep=2, resume=True), Trainer()
    checkpoints.check()
    assert caplog.text.count("checkpoint step_00000015 is skipped: ") == 1
    assert checkpoints.newest_step() == 10
    state = checkpoints.newest(_any(trainer))
    assert (state and state.step, trainer.loaded) == (10, "step_00000010.partial")
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    checkpoints.save(RunState(step=12, prompts=0, stats=None), _any(trainer))
    left = {path.name for path in tmp_path.iterdir()} - ({"step_00000015"} if damage == "no manifest" else set())
    assert left == {"step_00000010", "step_00000012"}


def test_damage_that_only_reading_everything_shows_is_found_before_the_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Large files are not read before everything has started, but before anything is loaded or logged."""
    monkeypatch.setattr(manifest, "SMALL_BYTES", -1)
    save(tmp_path, 5, 10)
    flip(tmp_path / "step_00000010" / "weights", 9)
    checkpoints, trainer = Checkpoints(tmp_path, keep=2, resume=True), Trainer()
    checkpoints.check()
    assert checkpoints.newest_step() == 10
    checkpoints.verify(_any(trainer))
    assert checkpoints.newest_step() == 5
    assert "step_00000010 is skipped: " in caplog.text
    assert "weights: its checksum differs" in caplog.text


def test_if_no_checkpoint_is_sound_the_run_does_not_start_over(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    for folder in tmp_path.iterdir():
        flip(folder / "weights", 9)
    with pytest.raises(ConfigError) as refused:
        Checkpoints(tmp_path, keep=2, resume=True).check()
    assert len(refused.value.faults) == 3
    assert refused.value.faults[2] == f"{tmp_path}: no checkpoint is sound; checkpoint.resume=false starts over"
    Checkpoints(tmp_path, keep=2, resume=False).check()


def test_stray_folders_are_not_checkpoints(tmp_path: Path) -> None:
    strays = ["step_best", "step_7", "step_00000099", "step_00000010.copy", "notes"]
    for name in strays:
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000050").write_text("a file")
    assert Checkpoints(tmp_path, keep=2, resume=True).newest_step() == 0
    save(tmp_path, 5, 10, 15)
    assert Checkpoints(tmp_path, keep=2, resume=True).newest_step() == 15
    assert {path.name for path in tmp_path.iterdir()} == {
        *strays, "step_00000050", "step_00000010", "step_00000015",
    }  # fmt: skip


def test_a_full_disk_leaves_the_older_checkpoints_and_no_partial_folder(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step_00000003.partial").mkdir()  # of a run that was killed

    class Full(Trainer):
        def save_checkpoint(self, folder: Path) -> dict[str, str]:
            (folder / "half").touch()
            raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(tmp_path, keep=2, resume=True)
    with pytest.raises(HapoError, match=r"cannot be written, .* GB are free on its disk: .*No space left on device"):
        checkpoints.save(RunState(step=10, prompts=0, stats=None), _any(Full()))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


def test_files_and_folders_are_on_the_disk_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path, 5)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {"weights", STATE_FILE, MANIFEST, "step_00000005.partial"} <= set(before)
    assert before.index(MANIFEST) > before.index(STATE_FILE)
    assert after == [tmp_path.name]


def make_config(folder: Path, **settings: Any) -> Config:
    return Config.model_validate(
        {
            "name": "run",
            "output_dir": folder,
            "steps": 20,
            "model": {"path": folder / "model"},
            "data": {"train": {"type": "arithmetic", "size": 4}},
            **settings,
        }
    )


def test_a_setting_that_cannot_change_on_resume_is_refused_and_others_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    folder = tmp_path / "checkpoints"
    first = Checkpoints(folder, keep=1, resume=True, config=make_config(tmp_path))
    first.save(RunState(step=10, prompts=0, stats=None), _any(Trainer()))

    def resume(**settings: Any) -> None:
        Checkpoints(folder, keep=1, resume=True, config=make_config(tmp_path, **settings)).check()

    resume()
    assert caplog.messages == []
    resume(optimizer={"weight_decay": 0.9, "lr": 1e-3}, name="other")
    assert caplog.messages == [
        "settings changed since step_00000010, in effect from the next step: optimizer.lr: 1e-06 -> 0.001, "
        "optimizer.weight_decay: 0.1 -> 0.9"
    ]
    with pytest.raises(ConfigError) as refused:
        resume(trainer={"dtype": "float32"}, steps=9)
    dtype, steps = refused.value.faults
    assert dtype.startswith(f"trainer.dtype: is float32, but {folder}/step_00000010 was written with bfloat16, and ")
    assert steps.startswith(f"steps: is 9, but {folder}/step_00000010 has made 10 steps; ")
    moved = model.rename(tmp_path / "moved")
    resume(model={"path": moved})
    (moved / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(ConfigError, match=rf"^model\.path: {moved} is not the model that .* \({model}\)"):
        resume(model={"path": moved})


def test_the_room_that_checkpoints_need_is_stated_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, checkpoint={"every": 5, "keep": 2, "hf_at_end": False})
    caplog.set_level("INFO", logger="megatron_hapo")
    usage = shutil.disk_usage(tmp_path)

    def check(free: float, existing: float = 0) -> str:
        caplog.clear()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(free)))
        check_disk_space(10**9, config, first_step=0, existing_bytes=int(existing))
        return f"{caplog.records[0].levelname} {caplog.messages[0]}"

    assert check(43e9) == (
        "INFO checkpoints and exports take up to 42.0 GB: 14.0 GB per checkpoint, and room for checkpoint.keep + 1 = 3 "
        f"of them; 43.0 GB are free on the disk of {tmp_path}/run"
    )
    assert check(15e9, existing=28e9).startswith("INFO")
    assert check(41e9).startswith("WARNING")
    with pytest.raises(ConfigError, match=r"output_dir: .*, which is not enough for one"):
        check(13e9, existing=28e9)
