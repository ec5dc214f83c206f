"""YAML files with their bases, and `key=value` arguments, merged into one mapping, with the origin of each value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_hapo.errors import ConfigError

COMMAND_LINE = "command line"
"""Name of the origin of `key=value` arguments."""


class Origin(NamedTuple):
    """Where a value was set."""

    name: str
    """The file, or COMMAND_LINE."""
    layer: int
    """Its position in the order of merging; later layers replace the values of earlier ones."""


def read_sources(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Origin]]:
    """The merged settings, not yet checked, and where each dotted key was set last.

    Bases come first, then the file, then the overrides; interpolations such as `${seed}` are resolved.

    Raises:
        ConfigError: files or overrides that cannot be read, all of them at once.
    """
    faults: list[str] = []
    layers = [*_file_layers(path, faults, including=()), (COMMAND_LINE, _parse_overrides(overrides, faults))]
    if faults:
        raise ConfigError(faults)
    merged: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for number, (name, layer) in enumerate(layers):
        merged = merge(merged, layer)
        origins |= dict.fromkeys(_dotted_keys(layer), Origin(name, number))
    return _resolve(merged, path), origins


def files_of(path: Path) -> list[Path]:
    """The resolved paths of the file and of all its bases; those that cannot be read are left out."""
    return [Path(name).resolve() for name, _ in _file_layers(path, [], including=())]


def settings_of(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as nested sections, as in a config file.

    Raises:
        ConfigError: arguments that cannot be read, all of them at once.
    """
    faults: list[str] = []
    settings = _parse_overrides(overrides, faults)
    if faults:
        raise ConfigError(faults)
    return settings


def _file_layers(path: Path, faults: list[str], *, including: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The name and the contents of each of the file's bases, then of the file itself."""
    if path.resolve() in including:
        faults.append(f"{path}: base: the file builds on itself")
        return []
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        faults.append(f"{path}: no such config file")
        return []
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        faults.append(f"{path}: cannot be read: {_one_line(error)}")
        return []
    if not isinstance(loaded, DictConfig):
        faults.append(f"{path}: must be a mapping of settings, got a list")
        return []
    layer = _to_dict(loaded)
    base = layer.pop("base", [])
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        faults.append(f"{path}: base: must be a file name or a list of file names, got {base!r}")
        return []
    layers = []
    for name in bases:
        layers += _file_layers(path.parent / name, faults, including=(*including, path.resolve()))
    return [*layers, (str(path), layer)]


def _parse_overrides(overrides: Sequence[str], faults: list[str]) -> dict[str, Any]:
    """The merged `key=value` arguments; those that cannot be read become faults."""
    merged: dict[str, Any] = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not all(part.isidentifier() for part in key.split(".")):
            faults.append(f"{COMMAND_LINE}: {override}: must have the form key=value, e.g. optimizer.lr=1e-6")
            continue
        try:
            merged = merge(merged, _to_dict(OmegaConf.from_dotlist([override])))
        except (YAMLError, OmegaConfBaseException) as error:
            faults.append(f"{COMMAND_LINE}: {override}: cannot be read: {_one_line(error)}")
    return merged


def _resolve(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings with interpolations replaced by their values."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(raw), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{path}: {_one_line(error)}"]) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _to_dict(config: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated by `over`. A section whose `type` changes is replaced: the keys of the old type do not apply."""
    merged = dict(base)
    for key, value in over.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _other_type(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _other_type(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "type" in old and "type" in new and old["type"] != new["type"]


def _dotted_keys(layer: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all sections and values of a layer."""
    for key, value in layer.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{key}.")
