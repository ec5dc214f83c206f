"""Every setting says what its change does on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hapo.config import Config
from megatron_hapo.config.resumption import ON_RESUME, changed_settings, on_resume, refusals, setting_keys

REFUSED = {"trainer.dtype", "trainer.distributed_optimizer"}
IRRELEVANT = {"name", "output_dir", "model.path", "parallel.gpu_memory"}


def make_config(**settings: Any) -> Config:
    required = {"name": "run", "steps": 9, "model": {"path": "model"}}
    return Config.model_validate({**required, "data": {"train": {"type": "arithmetic", "size": 4}}, **settings})


def test_every_setting_is_effective_refused_or_irrelevant() -> None:
    classes = {key: on_resume(key) for key in setting_keys()}
    assert {key for key, value in classes.items() if value == "refused"} == REFUSED
    assert {key for key, value in classes.items() if value == "irrelevant"} == IRRELEVANT
    assert len(classes) > 100


def test_the_table_names_existing_settings_only() -> None:
    keys = setting_keys()
    sections = {f"{key.partition('.')[0]}.*" for key in keys}
    assert ON_RESUME.keys() <= {*keys, *sections}
    # A setting that reaches what a checkpoint restores is listed itself.
    assert not ON_RESUME.keys() & {"optimizer.*", "trainer.*", "model.*", "parallel.*", "batch.*"}


def test_a_change_of_any_single_setting_is_found() -> None:
    """Including nested ones, those of data sources, and those that get or lose a value."""
    config = make_config()
    recorded = config.model_dump(mode="json")
    assert changed_settings(recorded, config) == []
    for key in setting_keys():
        *path, last = key.split(".")
        before = config.model_dump(mode="json")
        section: Any = before
        for part in path:
            section = section.get(part) or {}
        if last in section:
            section[last] = "another value"
            assert [change.key for change in changed_settings(before, config)] == [key]


def test_another_kind_of_data_is_listed_with_its_settings() -> None:
    before = make_config().model_dump(mode="json")
    config = make_config(
        data={"train": {"type": "file", "path": "rows.jsonl"}, "eval": {"type": "arithmetic", "size": 2}}
    )
    texts = [str(change) for change in changed_settings(before, config)]
    assert {"data.train.type: arithmetic -> file", "data.train.path: not set -> rows.jsonl"} <= set(texts)
    assert {"data.train.size: 4 -> not set", "data.eval.size: not set -> 2"} <= set(texts)


def test_settings_that_an_older_version_did_not_have_are_no_change() -> None:
    before = make_config().model_dump(mode="json")
    del before["trainer"]["quantization"], before["metrics"]
    assert changed_settings(before, make_config()) == []


def test_a_refusal_names_both_values() -> None:
    before = make_config().model_dump(mode="json")
    config = make_config(trainer={"distributed_optimizer": False})
    (fault,) = refusals(changed_settings(before, config), config, step=3, checkpoint=Path("step_3"))
    assert fault == (
        "trainer.distributed_optimizer: is false, but step_3 was written with true, and the optimizer state is stored "
        "in another form; set it back, or start over with checkpoint.resume=false"
    )
