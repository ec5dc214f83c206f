"""What is wrong with a config, in the user's words: faults, and pydantic's errors as faults. Knows no setting."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails


@dataclass(frozen=True)
class Fault:
    """One reason why a run cannot work."""

    key: str
    """The setting to change, e.g. parallel.tp."""
    message: str
    involves: tuple[str, ...] = ()
    """Other settings that the message is about."""

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


def schema_faults(invalid: ValidationError, schema: type[BaseModel]) -> list[Fault]:
    """One fault for each faulty setting of a config that `schema` rejected."""
    faults = (_fault(error, schema) for error in invalid.errors())
    return list({fault.key: fault for fault in faults}.values())


def _fault(error: ErrorDetails, schema: type[BaseModel]) -> Fault:
    key, owner = _locate(error["loc"], schema)
    given, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "missing":
            message = "is required"
        case "extra_forbidden":
            message = f"unknown key; {_suggestion(key, owner, schema)}"
        case "union_tag_not_found":
            return Fault(f"{key}.type", "is required")
        case "union_tag_invalid":
            return Fault(f"{key}.type", f"must be one of {context['expected_tags']}, got {context['tag']!r}")
        case "literal_error":
            message = f"must be {context['expected']}, got {given!r}"
        case "greater_than":
            message = f"must be greater than {context['gt']:g}, got {given}"
        case "greater_than_equal":
            message = f"must be at least {context['ge']:g}, got {given}"
        case "less_than":
            message = f"must be less than {context['lt']:g}, got {given}"
        case "less_than_equal":
            message = f"must be at most {context['le']:g}, got {given}"
        case "int_parsing" | "int_type" | "int_from_float":
            message = f"must be a whole number, got {given!r}"
        case "float_parsing" | "float_type":
            message = f"must be a number, got {given!r}"
        case "bool_parsing" | "bool_type":
            message = f"must be true or false, got {given!r}"
        case "tuple_type":
            message = f"must be a list, e.g. [{given}]"
        case "model_type" | "model_attributes_type" | "dict_type":
            message = f"must be a section of settings, got {given!r}"
        case _:
            message = f"{error['msg'].removeprefix('Input ')}, got {given!r}"
    return Fault(key, message)


def _locate(location: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The dotted key of pydantic's location, and the section that owns its last part.

    Pydantic puts the variant's name into the location of a setting of a variant; a config file has no such level.
    """
    sections: list[type[BaseModel]] = [schema]
    owner: type[BaseModel] | None = None
    keys: list[str] = []
    for part in location:
        variant = [s for s in sections if len(sections) > 1 and part in get_args(s.model_fields["type"].annotation)]
        if variant:
            sections = variant
            continue
        keys.append(str(part))
        owner = sections[0] if sections else None
        info = _settings(owner).get(str(part)) if owner else None
        sections = list(_sections(info.annotation)) if info else []
    return ".".join(keys), owner


def _settings(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The section's fields by the names that a config file has for them."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section types in a field's annotation: several for a choice by `type`."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _suggestion(key: str, owner: type[BaseModel] | None, schema: type[BaseModel]) -> str:
    name = key.rpartition(".")[2]
    siblings = list(_settings(owner)) if owner else []
    near = difflib.get_close_matches(name, siblings, n=1)
    elsewhere = [known for known in _known_keys(schema) if known.rpartition(".")[2] == name]
    if key in elsewhere:
        return f"it belongs to another {key.rpartition('.')[0]}.type"
    if near:
        return f"did you mean {near[0]}?"
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"allowed here: {', '.join(siblings)}"


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in _settings(section).items():
        yield prefix + name
        for inner in _sections(info.annotation):
            yield from _known_keys(inner, f"{prefix}{name}.")
