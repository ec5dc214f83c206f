"""YAML files with their bases, and `key=value` arguments, merged into one mapping, with the origin of each value."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_hapo.config.scorer_names import with_located_scorers
from megatron_hapo.config.section import is_named, path_fault
from megatron_hapo.config.time_limit import time_limit
from megatron_hapo.config.yaml_text import MAX_DEPTH, UnreadableYamlError, parse_yaml, read_yaml
from megatron_hapo.errors import ConfigError, one_line

COMMAND_LINE = "command line"
"""Name of the origin of `key=value` arguments."""
MAX_BASES = 20
"""Files that may build on each other, from the first to the last."""
RESOLVE_SECONDS = 5.0


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
    layers = [*_file_layers(path, faults, [], including=()), (COMMAND_LINE, _parse_overrides(overrides, faults))]
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
    return [Path(name).resolve() for name, _ in _file_layers(path, [], [], including=())]


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


def _file_layers(
    path: Path, faults: list[str], read: list[Path], *, including: tuple[Path, ...]
) -> list[tuple[str, dict[str, Any]]]:
    """The name and the contents of each of the file's bases, then of the file itself; `read` collects all files."""
    try:
        resolved = path.resolve()
        if resolved in including:
            faults.append(f"{path}: base: the file builds on itself")
            return []
        read.append(resolved)
        layer = _to_dict(read_yaml(path))
    except FileNotFoundError:
        faults.append(f"{path}: no such config file")
        return []
    except (OSError, RuntimeError):  # too long a name, or a loop of symbolic links
        faults.append(f"{path}: cannot be read: not a usable path")
        return []
    except UnreadableYamlError as error:
        faults.append(f"{path}: {error}")
        return []
    base = layer.pop("base", [])
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        faults.append(f"{path}: base: must be a file name or a list of file names, got {reprlib.repr(base)}")
        return []
    layers = []
    for name in bases:
        if path_fault(name) is not None or Path(name).suffix not in (".yaml", ".yml"):
            faults.append(f"{path}: base: must be files that end in .yaml or .yml, got {name[:200]!r}")
        elif len(read) > MAX_BASES:
            faults.append(f"{path}: base: more than {MAX_BASES} files in all")
            break
        else:
            layers += _file_layers(path.parent / name, faults, read, including=(*including, resolved))
    return [*layers, (str(path), with_located_scorers(layer, path.parent))]


def _parse_overrides(overrides: Sequence[str], faults: list[str]) -> dict[str, Any]:
    """The merged `key=value` arguments; those that cannot be read become faults."""
    merged: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        shown = override if len(override) <= 200 else f"{override[:200]}..."
        parts = key.split(".")
        if not equals or not all(part.isidentifier() for part in parts) or len(parts) > MAX_DEPTH:
            faults.append(f"{COMMAND_LINE}: {shown}: must have the form key=value, e.g. optimizer.lr=1e-6")
            continue
        try:
            parse_yaml(f"value: {value}" if "\n" not in value else f"value:\n  {value}")
            merged = merge(merged, _to_dict(OmegaConf.from_dotlist([override])))
        except UnreadableYamlError as error:
            faults.append(f"{COMMAND_LINE}: {shown}: {error}")
        except (YAMLError, OmegaConfBaseException, ValueError, TypeError, ArithmeticError, LookupError) as error:
            faults.append(f"{COMMAND_LINE}: {shown}: cannot be read: {one_line(error)}")
    return with_located_scorers(merged, Path())


def _resolve(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings with interpolations replaced by their values."""
    try:
        with time_limit(RESOLVE_SECONDS):
            resolved = OmegaConf.to_container(OmegaConf.create(raw), resolve=True, throw_on_missing=True)
    except TimeoutError:
        raise ConfigError([f"{path}: interpolations take longer than {RESOLVE_SECONDS:g} s to resolve"]) from None
    except RecursionError:
        raise ConfigError([f"{path}: interpolations are nested too deeply, or refer to themselves"]) from None
    except (OmegaConfBaseException, ValueError, TypeError, ArithmeticError, LookupError, MemoryError) as error:
        raise ConfigError([f"{path}: {one_line(error)}"]) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _to_dict(config: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated by `over`. A section whose `type` changes is replaced: the keys of the old type do not apply.

    So is a section by several named ones that have types, and the reverse.
    """
    merged = dict(base)
    for key, value in over.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _other_type(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _other_type(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if "type" in old and "type" in new:
        return old["type"] != new["type"]
    return ("type" in old and _have_types(new)) or (_have_types(old) and "type" in new)


def _have_types(sections: Mapping[str, Any]) -> bool:
    return is_named(sections) and all("type" in section for section in sections.values())


def _dotted_keys(layer: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all sections and values of a layer."""
    for key, value in layer.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{key}.")
