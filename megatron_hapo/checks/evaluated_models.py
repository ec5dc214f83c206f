"""The configs of commands that only need engines, `eval` and `generate`, checked before anything starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_hapo.checkpoint.model_folder import is_megatron_folder
from megatron_hapo.checks.preflight import load_checked_config
from megatron_hapo.config import Config
from megatron_hapo.config.output_paths import folder_fault
from megatron_hapo.errors import ConfigError


def evaluated_configs(path: Path, overrides: Sequence[str], models: Sequence[Path]) -> dict[str, Config]:
    """The config of each model's evaluation under a name for the model.

    Args:
        models: folders of models, or of the step_* folders of a run's exports; empty: the config's own model.
    Raises:
        ConfigError: all faults at once.
    """
    folders = [model for folder in models for model in _series(folder)]
    settings = [[*overrides, f"model.path={json.dumps(str(folder))}"] for folder in folders] or [list(overrides)]
    configs, faults = [], []
    for its_settings in settings:
        try:
            configs.append(load_checked_config(path, its_settings, writes=False, starts="engines"))
        except ConfigError as error:
            faults += [fault for fault in error.faults if fault not in faults]
    if faults:
        raise ConfigError(faults)
    if configs[0].data.eval is None:
        raise ConfigError([f"{path}: data.eval: must be set to evaluate"])
    for config in configs:
        _check_readable(path, config)
    return dict(zip(_labels([config.model.path for config in configs]), configs, strict=True))


def generating_config(path: Path, overrides: Sequence[str]) -> Config:
    """The config of `megatron-hapo generate`.

    Raises:
        ConfigError: all faults at once.
    """
    config = load_checked_config(path, overrides, writes=False, starts="engines")
    if config.replay is not None:
        raise ConfigError([f"{path}: replay: must be null to generate, since a replay has its responses already"])
    _check_readable(path, config)
    return config


def _check_readable(path: Path, config: Config) -> None:
    """Raise ConfigError if engines cannot read the model without a trainer."""
    if is_megatron_folder(config.model.path):
        raise ConfigError(
            [
                f"{path}: model.path: must be a Hugging Face folder, which engines can read; "
                "`megatron-hapo convert megatron-to-hf` writes one"
            ]
        )


def check_output(folder: Path) -> None:
    """Raise ConfigError if results cannot be written into the folder."""
    if (fault := folder_fault(folder)) is not None:
        raise ConfigError([f"{folder}: {fault}"])


def _series(folder: Path) -> list[Path]:
    """The models in a folder of exports, by step; the folder itself if it is a model, or anything else."""
    if (folder / "config.json").is_file():
        return [folder]
    steps = sorted(path for path in folder.glob("step_*") if path.is_dir() and not path.name.endswith(".partial"))
    return steps or [folder]


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the models apart."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise ConfigError([f"--model: {folders[0]} is given twice"])
