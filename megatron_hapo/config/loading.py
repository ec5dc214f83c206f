"""Loads a config file with `key=value` overrides: a checked Config, or all of its faults at once.

A config is a YAML file; `base:` names the file (or files) that it builds on, and `key=value` arguments come last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import ValidationError

from megatron_hapo.config.effects import Condition, settings_without_effect
from megatron_hapo.config.faults import Fault, boolean_faults, schema_faults
from megatron_hapo.config.settings import Config
from megatron_hapo.config.sources import Origin, read_sources
from megatron_hapo.errors import ConfigError

_DEFAULTS = -1
"""The layer of settings that no file and no override sets."""


@dataclass(frozen=True)
class Draft:
    """A config that has been read but not yet accepted."""

    path: Path
    config: Config | None
    """The settings, with defaults in place of faulty ones; None if a required setting is faulty or missing."""
    faults: list[Fault]
    origins: Mapping[str, Origin] = field(repr=False)
    """Where each dotted key was set last."""

    def with_checks(self, found: Sequence[Fault]) -> Draft:
        """The draft with these faults added, except possible consequences of a setting that is already rejected."""
        rejected = [fault.key for fault in self.faults]

        def is_consequence(fault: Fault) -> bool:
            return any(_overlap(key, bad) for key in (fault.key, *fault.involves) for bad in rejected)

        new = [fault for fault in found if not is_consequence(fault)]
        return Draft(self.path, self.config, self.faults + new, self.origins)

    def accept(self) -> Config:
        """The config, if it has no faults.

        Raises:
            ConfigError: one line per fault, beginning with the file that set the value, or with COMMAND_LINE.
        """
        if self.faults or self.config is None:
            raise ConfigError([f"{self._origin(fault.key)}: {fault}" for fault in self.faults])
        return self.config

    def _origin(self, key: str) -> str:
        while key:
            if key in self.origins:
                return self.origins[key].name
            key = key.rpartition(".")[0]
        return str(self.path)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The checked config of a YAML file with `key=value` overrides.

    Raises:
        ConfigError: with all faults at once, one line each.
    """
    return read_config(path, overrides).accept()


def dump_config(config: Config, path: Path | str) -> None:
    """Write the settings as YAML; load_config reads the file back to an equal config."""
    Path(path).write_text(config_as_yaml(config))


def config_as_yaml(config: Config) -> str:
    """All settings, defaults included, as load_config reads them.

    Settings without effect are left out: load_config would refuse them, and gives them their defaults anyway.
    """
    settings = config.model_dump(mode="json")
    for key in settings_without_effect(config):
        _remove(settings, key.split("."))
    return OmegaConf.to_yaml(OmegaConf.create(settings))


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Draft:
    """The settings and their faults, to which a caller can add before it reports them.

    Raises:
        ConfigError: a file or an override that cannot be read at all.
    """
    path = Path(path)
    raw, origins = read_sources(path, overrides)
    draft = _validate(path, raw, origins)
    if draft.config is None:
        return draft
    failing = settings_without_effect(draft.config)
    given = {key: conditions for key, conditions in failing.items() if _contains(raw, key.split("."))}
    ignored = [fault for key, conditions in given.items() for fault in _ignored(draft.config, key, conditions, origins)]
    for key in given:
        _remove(raw, key.split("."))
    config = Config.model_validate(raw)
    return replace(draft, config=config).with_checks(ignored).with_checks([*config.contradictions()])


def _ignored(
    config: Config, key: str, conditions: Sequence[Condition], origins: Mapping[str, Origin]
) -> Iterator[Fault]:
    """The fault of a setting without effect, unless a later layer disabled it (see effects)."""

    def layer(of: str) -> int:
        return origins[of].layer if of in origins else _DEFAULTS

    for condition in conditions:
        if layer(key) >= max(map(layer, condition.keys)):
            yield Fault(key, f"has no effect: {condition.why_not(config)}", condition.keys)
            return


def _overlap(key: str, other: str) -> bool:
    """Whether one of the keys is the other, or contains it."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def _validate(path: Path, raw: dict[str, Any], origins: Mapping[str, Origin]) -> Draft:
    """The draft with the faults of single settings, which are removed from `raw`."""
    faults = list(boolean_faults(raw, Config))
    try:
        config = Config.model_validate(raw)
        if not faults:
            return Draft(path, config, [], origins)
    except ValidationError as invalid:
        known = {fault.key for fault in faults}
        faults += [fault for fault in schema_faults(invalid, Config) if fault.key not in known]
    for fault in faults:
        _remove(raw, fault.key.split("."))
    try:
        config = Config.model_validate(raw)
    except ValidationError:  # a required setting is missing or faulty: nothing to check the others against
        config = None
    return Draft(path, config, faults, origins)


def _contains(settings: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Whether the nested settings set this key."""
    value: Any = settings
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True


def _remove(settings: dict[str, Any], keys: Sequence[str]) -> None:
    """Remove a key from nested settings, and the sections that this leaves empty."""
    key, *inner = keys
    value = settings.get(key)
    if inner and isinstance(value, dict):
        _remove(value, inner)
        if value:
            return
    settings.pop(key, None)  # if the key is of a list's entry, the whole list
