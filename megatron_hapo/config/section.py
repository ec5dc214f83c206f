"""The base class of all sections of settings, the value ranges they share, and how to walk a tree of sections."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

# Every number has bounds, wide enough for any real run: what lies outside is a typing error, found before it costs
# memory or time.
PositiveInt = Annotated[int, Field(gt=0, le=2**31 - 1)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**31 - 1)]
MAX_RANKS = 2**14
Ranks = Annotated[int, Field(gt=0, le=MAX_RANKS)]
"""A number of processes over all nodes, or a factor of it."""
Bytes = Annotated[int, Field(gt=0, le=2**50)]
Examples = Annotated[int, Field(gt=0, le=10_000_000)]
"""A number of prompts that are generated and held in memory."""
Seed = Annotated[int, Field(ge=-(2**62), le=2**62)]
Port = Annotated[int, Field(ge=1024, le=65535)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
ClipLow = Annotated[float, Field(gt=0, le=1)]
"""Distance of an importance ratio's lower bound from 1; 1 is no bound."""
ClipHigh = Annotated[float, Field(gt=0, le=1e6)]
"""Distance of an importance ratio's upper bound from 1."""
Seconds = Annotated[float, Field(gt=0, le=1e7)]
Strength = Annotated[float, Field(ge=0, le=1e3)]
"""A factor that scales an effect; 0 disables it."""


def path_fault(path: str) -> str | None:
    """Why no file can have this path; None if one can. Nothing is looked up."""
    if not path.isprintable():
        return "must not contain control characters or invalid Unicode"
    if not path:
        return "must not be empty"
    encoded = path.encode()
    if len(encoded) > 4000 or any(len(part) > 255 for part in encoded.split(b"/")):
        return "is too long for a path"
    return None


def _usable_path(path: Path) -> Path:
    if (fault := path_fault(str(path))) is not None:
        raise PydanticCustomError("path", fault)  # pyright: ignore[reportArgumentType]  # a literal, for translations
    return path


FilePath = Annotated[Path, AfterValidator(_usable_path)]
"""A path of a file or folder, which need not exist."""


ONE, SEVERAL, NAMED = "<one>", "<several>", "<named>"
"""Tags of the forms that a setting can have; no name in a config is spelled like them."""


def is_named(value: Any) -> bool:
    """Whether a value is a mapping of named sections, and not one section that is chosen by its `type`."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and "type" not in value
        and all(isinstance(section, Mapping | BaseModel) for section in value.values())
    )


def one_or_named(value: Any) -> str:
    """The tag of a setting that is one section or a mapping of named ones."""
    return NAMED if is_named(value) else ONE


def one_or_several(value: Any) -> str:
    """The tag of a setting that is one value or a list."""
    return SEVERAL if isinstance(value, list | tuple) else ONE


def section_name_fault(name: str) -> str | None:
    """Why a section cannot have this name; None if one can."""
    fits = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name) is not None
    return None if fits else "must be a name of letters, digits and underscores"


def _section_name(name: str) -> str:
    if (fault := section_name_fault(name)) is not None:
        raise PydanticCustomError("name", fault)  # pyright: ignore[reportArgumentType]  # a literal, for translations
    return name


SectionName = Annotated[str, AfterValidator(_section_name)]
"""What a config calls one of several named sections."""


class Section(BaseModel):
    """A section of a config file: frozen, and unknown keys are rejected. The docstring below a field describes it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, serialize_by_alias=True, allow_inf_nan=False
    )


def fields_by_key(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section under the keys that a config file uses for them."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def section_types(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section types in a field's annotation: none for a plain value, several for a choice by `type`.

    Those of a mapping of named sections are left out: see `named_types`.
    """
    if get_origin(annotation) is dict:
        return
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from section_types(argument)


def named_types(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section types in the mapping of named sections that a field accepts; none if it accepts no such mapping."""
    if get_origin(annotation) is dict:
        yield from section_types(get_args(annotation)[1])
        return
    for argument in get_args(annotation):
        yield from named_types(argument)


def value_of(config: BaseModel, key: str) -> Any:
    """The value of a dotted key, such as async.max_staleness; None below a section that is not set."""
    value: Any = config
    for part in key.split("."):
        if value is None:
            return None
        names = {info.alias or name: name for name, info in type(value).model_fields.items()}
        value = getattr(value, names[part])
    return value
