"""Every setting of a run has an effect, or is refused; and every setting says what it does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megatron_hapo.config import Config, dump_config, load_config, read_config
from megatron_hapo.config.effects import Clause, Condition, declared_conditions
from megatron_hapo.config.section import fields_by_key, section_types, value_of
from tests.config.test_config import MINIMAL, faults_of, write

ROOT = Path(__file__).parents[2]
CONDITIONS = dict(declared_conditions(Config))
CONDITIONAL = {key: conditions for key, conditions in CONDITIONS.items() if conditions}
CASES = [(key, condition) for key, conditions in CONDITIONAL.items() for condition in conditions]
CASE_IDS = [f"{key}-{number}" for number, (key, _) in enumerate(CASES)]
CANDIDATES: tuple[Any, ...] = (
    True,
    False,
    0,
    1,
    2,
    3,
    0.25,
    0.5,
    1.5,
    1 << 30,
    "80GiB",
    "exact",
    [1],
    {"arithmetic": "exact"},
    None,
    {"type": "arithmetic", "size": 3},
)
"""Values of which every setting that is not a choice accepts one that is not its default."""
LAYERED = sorted((ROOT / "configs").glob("*.yaml")) + [
    path for folder in ("recipe", "paper", "large") for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))
]


def settings(schema: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All settings that are not sections, by their dotted keys."""
    for name, info in fields_by_key(schema).items():
        if not list(section_types(info.annotation)):
            yield f"{prefix}{name}", info
        for section in section_types(info.annotation):
            yield from settings(section, f"{prefix}{name}.")


def literal_values(annotation: Any) -> tuple[Any, ...]:
    """The values of a choice; empty for other annotations."""
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def minimal(**values: Any) -> dict[str, Any]:
    """The smallest config, with these values under dotted keys."""
    config = OmegaConf.create(MINIMAL)
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def valid_value(key: str, *, besides: tuple[Any, ...]) -> Any:
    """A value that the setting accepts, other than these."""
    info = dict(settings()).get(key)
    for value in (*literal_values(info and info.annotation), *CANDIDATES):
        try:
            config = Config.model_validate(minimal(**{key: value}))
        except ValidationError:
            continue
        taken = value_of(config, key)
        if taken not in besides and isinstance(taken, bool) == isinstance(value, bool):  # not 1 for true
            return value
    raise AssertionError(f"{key}: add a valid value to CANDIDATES")


def default_of(key: str) -> Any:
    return value_of(Config.model_validate(minimal()), key)


def disabled(clause: Clause) -> Any:
    """A value of the clause's setting for which it does not hold."""
    return clause.values[0] if clause.excluded else valid_value(clause.key, besides=clause.values)


def enabled(clause: Clause) -> Any:
    """A value of the clause's setting for which it holds."""
    return valid_value(clause.key, besides=clause.values) if clause.excluded else clause.values[0]


def as_overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def lines_about(key: str, lines: list[str]) -> list[str]:
    return [line for line in lines if f": {key}: has no effect: " in line]


@pytest.mark.parametrize(("key", "condition"), CASES, ids=CASE_IDS)
def test_a_setting_without_effect_is_refused(tmp_path: Path, key: str, condition: Condition) -> None:
    """In a file and on the command line, also where it has its default."""
    others = {other.clauses[0].key: enabled(other.clauses[0]) for other in CONDITIONAL[key] if other != condition}
    off = others | {clause.key: disabled(clause) for clause in condition.clauses}
    for value in (valid_value(key, besides=(default_of(key),)), default_of(key)):
        path = write(tmp_path, OmegaConf.to_yaml(OmegaConf.create(minimal(**off, **{key: value}))))
        (line,) = lines_about(key, faults_of(path))
        assert line.startswith(f"run.yaml: {key}: has no effect: ")
        assert all(deciding in line for deciding in condition.keys)
        path = write(tmp_path, MINIMAL)
        assert lines_about(key, faults_of(path, *as_overrides({**off, key: value})))[0].startswith("command line: ")


@pytest.mark.parametrize("key", CONDITIONAL)
def test_a_setting_with_an_effect_is_accepted(tmp_path: Path, key: str) -> None:
    on = {condition.clauses[0].key: enabled(condition.clauses[0]) for condition in CONDITIONAL[key]}
    values = minimal(**{**on, key: valid_value(key, besides=(default_of(key),))})
    path = write(tmp_path, OmegaConf.to_yaml(OmegaConf.create(values)))
    lines = lines_about(key, [f"run.yaml: {fault}" for fault in read_config(path).faults])  # it may have others
    deciding = {decided_by for condition in CONDITIONAL[key] for decided_by in condition.keys}
    assert not [line for line in lines if any(decided_by in line for decided_by in deciding)]


def test_conditions_name_settings_and_values_that_exist() -> None:
    choices = {key: literal_values(info.annotation) for key, info in settings()}
    for clause in (clause for _, condition in CASES for clause in condition.clauses):
        assert clause.key in CONDITIONS or clause.key == "data.eval", clause.key
        if allowed := choices.get(clause.key):
            assert set(clause.values) <= set(allowed), clause


def test_what_decides_is_decided_by_nothing_else() -> None:
    """Else a setting that returns to its default could change the effect of another."""
    for key, condition in CASES:
        for deciding in condition.keys:
            assert set(CONDITIONS.get(deciding, ())) <= set(CONDITIONAL[key]), (key, deciding)


def test_a_later_layer_supersedes_what_it_disables(tmp_path: Path) -> None:
    tuned = MINIMAL + "algorithm: {adaptive_temperature: {enabled: true, tau: 0.3}}\n"
    off = "algorithm: {adaptive_temperature: {enabled: false}}\n"
    write(tmp_path, tuned, "base.yaml")
    overlaid = load_config(write(tmp_path, f"base: base.yaml\n{off}"))
    assert overlaid.algorithm.adaptive_temperature.tau == default_of("algorithm.adaptive_temperature.tau")
    write(tmp_path, off, "overlay.yaml")
    assert load_config(write(tmp_path, "base: [base.yaml, overlay.yaml]\n")) == overlaid
    assert load_config(tmp_path / "base.yaml", ["algorithm.adaptive_temperature.enabled=false"]) == overlaid


def test_an_earlier_layer_that_disables_a_setting_is_no_excuse(tmp_path: Path) -> None:
    fault = "algorithm.adaptive_temperature.tau: has no effect: algorithm.adaptive_temperature.enabled is false"
    write(tmp_path, MINIMAL + "algorithm: {adaptive_temperature: {enabled: false}}\n", "base.yaml")
    path = write(tmp_path, "base: base.yaml\nalgorithm: {adaptive_temperature: {tau: 0.3}}\n")
    assert faults_of(path) == [f"run.yaml: {fault}"]
    assert faults_of(tmp_path / "base.yaml", "algorithm.adaptive_temperature.tau=0.3") == [f"command line: {fault}"]
    both = "algorithm: {adaptive_temperature: {enabled: false, tau: 0.05}}\n"
    assert faults_of(write(tmp_path, MINIMAL + both)) == [f"run.yaml: {fault}"]


def test_of_several_switches_the_one_set_last_counts(tmp_path: Path) -> None:
    """adaptive_clip alone still uses the entropies; its switch comes after the setting, or with it."""
    off = "adaptive_temperature: {enabled: false}, redistribution: {enabled: false}"
    write(tmp_path, MINIMAL + f"algorithm: {{{off}, entropy: {{sign: reference}}}}\n", "base.yaml")
    assert load_config(tmp_path / "base.yaml").algorithm.entropy.sign == "reference"
    assert load_config(tmp_path / "base.yaml", ["algorithm.adaptive_clip.enabled=false"]).algorithm.entropy.sign == (
        "signed"
    )
    path = write(tmp_path, MINIMAL + f"algorithm: {{{off}, adaptive_clip: {{enabled: false}}}}\n")
    assert faults_of(path, "algorithm.entropy.sign=reference") == [
        "command line: algorithm.entropy.sign: has no effect: algorithm.adaptive_temperature.enabled, "
        "algorithm.multi_temperature.enabled, algorithm.adaptive_clip.enabled and algorithm.redistribution.enabled "
        "are false"
    ]


def test_settings_for_gpus_have_an_effect_where_the_device_is_not_known(tmp_path: Path) -> None:
    settings_for_gpus = ["rollout.memory_fraction=0.5", "model.spec=te", "parallel.gpu_memory=80GiB"]
    assert load_config(write(tmp_path), settings_for_gpus).rollout.memory_fraction == 0.5
    assert len(faults_of(write(tmp_path), *settings_for_gpus, "device=cpu", "rollout.kv_cache_tokens=20000")) == 3


def test_a_rejected_switch_causes_no_second_fault(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "dynamic_sampling: {enabled: maybe, max_generation_batches: 4}\n")
    assert faults_of(path) == ["run.yaml: dynamic_sampling.enabled: must be true or false, got 'maybe'"]


def test_a_dumped_config_leaves_out_what_has_no_effect(tmp_path: Path) -> None:
    made = Config.model_validate(minimal(**{"memory_turns.trainer": "gradients", "reward.overlong.factor": 2.0}))
    dump_config(made, tmp_path / "dumped.yaml")
    dumped = (tmp_path / "dumped.yaml").read_text()
    assert "memory_turns" not in dumped
    assert "factor" not in dumped
    assert load_config(tmp_path / "dumped.yaml").reward.overlong.factor == 1.0


@pytest.mark.parametrize("path", LAYERED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_config_is_dumped_and_loaded_as_the_same_config(tmp_path: Path, path: Path) -> None:
    config = load_config(path)
    dump_config(config, tmp_path / "dumped.yaml")
    assert load_config(tmp_path / "dumped.yaml") == config


@pytest.mark.parametrize(
    ("job", "method"),
    product(("configs/demo_cpu.yaml", "configs/recipe/qwen3_8b_hapo.yaml", "examples/checked_sums/job.yaml"),
            sorted(path.stem for path in (ROOT / "configs/methods").glob("*.yaml"))),
)  # fmt: skip
def test_every_method_is_an_overlay_of_every_job(tmp_path: Path, job: str, method: str) -> None:
    path = write(tmp_path, f"base: [{ROOT / job}, {ROOT / f'configs/methods/{method}.yaml'}]\nname: both\n")
    config = load_config(path)
    dump_config(config, tmp_path / "dumped.yaml")
    assert load_config(tmp_path / "dumped.yaml") == config


def test_every_setting_and_every_choice_is_described() -> None:
    for key, info in settings():
        assert info.description, f"{key}: has no docstring"
        for value in literal_values(info.annotation):
            assert f"`{value}`" in info.description, f"{key}: the docstring does not mention `{value}`"
