"""An experiment: methods times settings times seeds, each a run of its own, compared with one of the methods."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from pydantic import AfterValidator, Field, ValidationError

from megatron_hapo.config.faults import schema_faults
from megatron_hapo.config.loading import read_config
from megatron_hapo.config.output_paths import folder_fault
from megatron_hapo.config.section import FilePath, PositiveInt, Section, Seed
from megatron_hapo.config.settings import Config
from megatron_hapo.config.yaml_text import UnreadableYamlError, read_yaml
from megatron_hapo.errors import ConfigError

type Layer = str | list[str] | dict[str, Any]
"""An overlay or several of them, or settings, which may name overlays under `base`. Paths are relative to the
experiment's file."""
Label = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+ -]*$")]


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(seeds))


class Experiment(Section):
    """The contents of an experiment's file. Paths of configs are relative to it; output_dir, as in a config, to the
    current folder."""

    name: Label
    """Name of the experiment, and of its folder in output_dir."""
    output_dir: FilePath = Path("runs")
    """Folder for the experiment's folder."""
    job: str | list[str]
    """Config of every run, or several that build on each other."""
    methods: Annotated[dict[Label, Layer], Field(min_length=1, max_length=100)]
    """Label -> what a method adds to the job: an overlay, a list of overlays, or settings with `base`."""
    settings: dict[Label, Layer] = Field(default_factory=dict)
    """Label -> what a setting adds after the method; every method runs under each. Empty: the job as it is."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000), AfterValidator(_different)]
    """Seeds of the runs; the same for all methods, so that differences are paired."""
    baseline: str
    """Label of the method with which the others are compared."""
    parallel: Annotated[PositiveInt, Field(le=64)] = 1
    """Number of runs at a time."""


@dataclass(frozen=True)
class Arm:
    """One method under one setting."""

    method: str
    setting: str
    """Empty: the experiment has no settings."""

    @property
    def label(self) -> str:
        """The method's label, with the setting's if there is one."""
        return f"{self.method}, {self.setting}" if self.setting else self.method


@dataclass(frozen=True)
class PlannedRun:
    """One run of the experiment."""

    arm: Arm
    seed: int
    file: Path
    """The config that it is started with."""
    config: Config

    @property
    def responses(self) -> int:
        """Responses that it trains on: a measure of its cost."""
        batch = self.config.batch
        return self.config.steps * batch.prompts_per_step * batch.samples_per_prompt


def read_experiment(path: Path) -> Experiment:
    """The experiment in a file.

    Raises:
        ConfigError: with all faults at once, one line each.
    """
    try:
        raw = OmegaConf.to_container(read_yaml(path))
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such experiment file"]) from None
    except UnreadableYamlError as error:
        raise ConfigError([f"{path}: {error}"]) from None
    try:
        experiment = Experiment.model_validate(raw)
    except ValidationError as invalid:
        raise ConfigError([f"{path}: {fault}" for fault in schema_faults(invalid, Experiment)]) from None
    if experiment.baseline not in experiment.methods:
        labels = ", ".join(experiment.methods)
        raise ConfigError([f"{path}: baseline: must be one of the methods ({labels}), got {experiment.baseline}"])
    return experiment


def plan_runs(experiment: Experiment, path: Path) -> list[PlannedRun]:
    """All runs with their checked configs, in the order in which they run: every arm once before any second seed, and
    the cheapest first. Writes the configs' files into the experiment's folder.

    Args:
        path: the experiment's file.
    Raises:
        ConfigError: a config has faults, or does not evaluate and record what a comparison needs.
    """
    folder = (experiment.output_dir / experiment.name).absolute()
    if (fault := folder_fault(folder)) is not None:
        raise ConfigError([f"{path}: output_dir: {folder} {fault}"])
    arms = [Arm(method, setting) for method in experiment.methods for setting in experiment.settings or {"": {}}]
    runs, faults = [], dict[str, None]()
    for arm in arms:
        for number, seed in enumerate(experiment.seeds):
            name = f"{_file_name(arm.label)}_seed{seed}"
            try:
                run = _plan(experiment, path, arm, seed, folder, name)
            except ConfigError as error:
                faults |= dict.fromkeys(f"{arm.label}: {line}" for line in str(error).splitlines())
                break
            runs.append((number, run))
    if faults:
        raise ConfigError([f"{path}: {fault}" for fault in faults])
    names = [run.config.name for _, run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError([f"{path}: two labels give the same file name: {', '.join(twice)}"])
    return [run for _, run in sorted(runs, key=lambda numbered: (numbered[0], numbered[1].responses))]


def _plan(experiment: Experiment, path: Path, arm: Arm, seed: int, folder: Path, name: str) -> PlannedRun:
    complete: Layer = {"record": {"groups": None, "keep": 1_000_000}}  # every response of every evaluation
    layers = [complete, experiment.job, experiment.methods[arm.method], experiment.settings.get(arm.setting, [])]
    bases: list[str] = []
    for number, layer in enumerate(layers):
        found, settings = _parts(layer)
        bases += [str((path.parent / base).absolute()) for base in found]
        if settings:  # between the bases, so that later layers win
            bases.append(str(_write(folder / "configs" / f"{name}.{number}.yaml", settings)))
    own = {
        "name": name, "seed": seed, "output_dir": str(folder),
        "checkpoint": {"every": 0, "hf_at_end": False},
    }  # fmt: skip
    file = _write(folder / "configs" / f"{name}.yaml", {"base": bases, **own})
    config = read_config(file).accept()
    if not config.eval.every or config.data.eval is None:
        raise ConfigError(["eval.every: a comparison needs evaluations: set it, and data.eval"])
    if not config.record.every or config.record.groups is not None:
        raise ConfigError(["record: a comparison needs all recorded evaluations: leave out record.every and .groups"])
    return PlannedRun(arm, seed, file, config)


def _write(file: Path, settings: dict[str, Any]) -> Path:
    """Writes settings as YAML; the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    return file


def _parts(layer: Layer) -> tuple[list[str], dict[str, Any]]:
    """The overlays and the settings of a layer."""
    if isinstance(layer, str):
        return [layer], {}
    if isinstance(layer, list):
        return layer, {}
    base = layer.get("base", [])
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise ConfigError([f"base: must be a file name or a list of file names, got {reprlib.repr(base)}"])
    return bases, {key: value for key, value in layer.items() if key != "base"}


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in label.lower()).strip("_")
