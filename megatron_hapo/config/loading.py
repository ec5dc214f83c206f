"""A config file and its `key=value` overrides to a checked Config, or to all of its faults at once.

A config is a YAML file; `base:` names the file (or files) that it builds on, and `key=value` arguments come last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import ValidationError

from megatron_hapo.config.contradictions import contradictions, settings_without_effect
from megatron_hapo.config.faults import Fault, schema_faults
from megatron_hapo.config.settings import Config
from megatron_hapo.config.sources import COMMAND_LINE, read_sources
from megatron_hapo.errors import ConfigError


@dataclass(frozen=True)
class Draft:
    """What a config file and its overrides say, before anyone relies on it."""

    path: Path
    config: Config | None
    """The settings, with defaults in the place of faulty ones; None where that is impossible."""
    faults: list[Fault]
    origins: Mapping[str, str] = field(repr=False)
    """Dotted key to the file that set it last, or COMMAND_LINE."""

    def with_checks(self, found: Sequence[Fault]) -> Draft:
        """The draft with these faults too, except those that may only echo a setting already rejected."""
        rejected = [fault.key for fault in self.faults]

        def is_echo(fault: Fault) -> bool:
            return any(_overlap(key, bad) for key in (fault.key, *fault.involves) for bad in rejected)

        news = [fault for fault in found if not is_echo(fault)]
        return Draft(self.path, self.config, self.faults + news, self.origins)

    def accept(self) -> Config:
        """The config, if it has no fault.

        Raises:
            ConfigError: one line a fault, each opening with the file that set the value, or with COMMAND_LINE.
        """
        if self.faults or self.config is None:
            raise ConfigError([f"{self._origin(fault.key)}: {fault}" for fault in self.faults])
        return self.config

    def _origin(self, key: str) -> str:
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return str(self.path)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The checked config of a YAML file with `key=value` overrides.

    Raises:
        ConfigError: with all faults at once, one line each.
    """
    return read_config(path, overrides).accept()


def dump_config(config: Config, path: Path | str) -> None:
    """Write every setting as YAML; load_config reads it back to an equal config."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Draft:
    """The settings and their faults, so that a caller can add what it finds wrong before it reports.

    Raises:
        ConfigError: a file or an override that cannot be read at all.
    """
    path = Path(path)
    raw, origins = read_sources(path, overrides)
    draft = _validate(path, raw, origins)
    if draft.config is None:
        return draft
    from_command_line = [key for key, origin in origins.items() if origin == COMMAND_LINE]
    return draft.with_checks([*contradictions(draft.config), *settings_without_effect(draft.config, from_command_line)])


def _overlap(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def _validate(path: Path, raw: dict[str, Any], origins: Mapping[str, str]) -> Draft:
    try:
        return Draft(path, Config.model_validate(raw), [], origins)
    except ValidationError as invalid:
        faults = schema_faults(invalid, Config)
    for fault in faults:
        _remove(raw, fault.key.split("."))
    try:
        config = Config.model_validate(raw)
    except ValidationError:  # a required setting is missing or faulty: nothing to check the others against
        config = None
    return Draft(path, config, faults, origins)


def _remove(raw: dict[str, Any], keys: list[str]) -> None:
    for key in keys[:-1]:
        if not isinstance(raw.get(key), dict):
            raw.pop(key, None)  # an entry of a list: the whole list goes
            return
        raw = raw[key]
    raw.pop(keys[-1], None)
