"""Reads a model's config.json: every value that is used has its type and its range checked, and faults name the key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hapo.errors import ConfigError

MAX_BYTES = 16 << 20
"""Real files have a few kilobytes."""
_SHOWN = 80


class ModelConfig:
    """The keys of a config.json, or of a section within it. A key that is null counts as missing.

    Every method raises ConfigError: the key is required and missing, or its value has another type or is out of range.
    """

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = ""):
        self._values = values
        self._path = path
        self._prefix = prefix

    def with_default(self, key: str, value: Any) -> ModelConfig:
        """The same config with a value for a key that is missing altogether."""
        return ModelConfig({key: value, **self._values}, self._path, self._prefix)

    def has(self, key: str) -> bool:
        """Whether the key has a value other than null."""
        return self._values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int) -> int:
        """A whole number in this range, bounds included; required if there is no default."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fault(f"{self._name(key)} must be a whole number from {low} to {high}, got {_shown(value)}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float, high: float) -> float:
        """A number in this range, bounds included; required if there is no default."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.fault(f"{self._name(key)} must be a number from {low:g} to {high:g}, got {_shown(value)}")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.fault(f"{self._name(key)} must be true or false, got {_shown(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; required if there is no default."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.fault(f"{self._name(key)} must be a string, got {_shown(value)}")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of strings; empty if it is missing."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fault(f"{self._name(key)} must be a list of strings, got {_shown(value)}")
        return value

    def integers(self, key: str, *, low: int, high: int) -> list[int]:
        """A list of whole numbers in this range, bounds included; empty if it is missing."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(type(item) is int and low <= item <= high for item in value):
            raise self.fault(
                f"{self._name(key)} must be a list of whole numbers from {low} to {high}, got {_shown(value)}"
            )
        return value

    def section(self, key: str) -> ModelConfig | None:
        """The section under a key; None if it is missing or empty."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fault(f"{self._name(key)} must be an object, got {_shown(value)}")
        return ModelConfig(value, self._path, f"{self._name(key)}.") if value else None

    def fault(self, message: str) -> ConfigError:
        """The error that says so, to be raised."""
        return ConfigError([f"model.path: {self._path}: {message}"])

    def _value(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise ConfigError([f"model.path: {self._path} has no {self._name(key)}"])
            return default
        return value

    def _name(self, key: str) -> str:
        return f"{self._prefix}{key}"


def read_model_config(path: Path) -> ModelConfig:
    """The keys of a config.json.

    Raises:
        ConfigError: the file cannot be read, or is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"model.path: {path} cannot be read: {error.strerror}"]) from error
    if len(content) > MAX_BYTES:
        raise ConfigError([f"model.path: {path} has more than {MAX_BYTES} bytes, which no config.json needs"])
    try:
        values = json.loads(content)
    except RecursionError:
        raise ConfigError([f"model.path: {path} is not a model's config: it is nested too deeply"]) from None
    except ValueError as error:
        raise ConfigError([f"model.path: {path} is not JSON: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"model.path: {path} must contain a JSON object"])
    return ModelConfig(values, path)


def _shown(value: Any) -> str:
    """The value as JSON, cut to a length that an error message can show."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
