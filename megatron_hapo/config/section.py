"""The base class of all sections of settings, the value ranges they share, and how to walk a tree of sections."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

NonNegativeInt = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=1024, le=65535)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A section of a config file: frozen, and unknown keys are rejected. The docstring below a field describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, serialize_by_alias=True)


def fields_by_key(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section under the keys that a config file uses for them."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def section_types(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section types in a field's annotation: none for a plain value, several for a choice by `type`."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from section_types(argument)


def value_of(config: BaseModel, key: str) -> Any:
    """The value of a dotted key, such as async.max_staleness; None below a section that is not set."""
    value: Any = config
    for part in key.split("."):
        if value is None:
            return None
        names = {info.alias or name: name for name, info in type(value).model_fields.items()}
        value = getattr(value, names[part])
    return value
