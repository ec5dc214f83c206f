"""Faults: what is wrong with a config, in the user's terms, and pydantic's errors as faults. Knows no setting."""

from __future__ import annotations

import difflib
import inspect
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_hapo.config.section import NAMED, ONE, SEVERAL, fields_by_key, is_named, named_types, section_types


@dataclass(frozen=True)
class Fault:
    """One reason why a run cannot work."""

    key: str
    """The setting to change, e.g. parallel.tp."""
    message: str
    """What is wrong with it: what was given and what is allowed."""
    involves: tuple[str, ...] = ()
    """Other settings that the message is about."""

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


_LONGEST_VALUE = 100

_MESSAGES = {
    "missing": "is required",
    "literal_error": "must be {expected}, got {given!r}",
    "greater_than": "must be greater than {gt}, got {given}",
    "greater_than_equal": "must be at least {ge}, got {given}",
    "less_than": "must be less than {lt}, got {given}",
    "less_than_equal": "must be at most {le}, got {given}",
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "must be a whole number, got {given!r}"),
    **dict.fromkeys(("float_parsing", "float_type"), "must be a number, got {given!r}"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false, got {given!r}"),
    "path_type": "must be a path, got {given!r}",
    "too_short": "must not be empty",
    "finite_number": "must be a finite number, got {given!r}",
    "int_parsing_size": "must be a whole number of at most 64 bits, got {given!r}",
    "tuple_type": "must be a list, e.g. [{given}]",
    **dict.fromkeys(
        ("model_type", "model_attributes_type", "dict_type"), "must be a section of settings, got {given!r}"
    ),
}
"""Templates of our messages by the type of pydantic's error, with the names of pydantic's context."""


def schema_faults(invalid: ValidationError, schema: type[BaseModel]) -> list[Fault]:
    """One fault for each invalid setting of a config that `schema` rejected."""
    faults = (_fault(error, schema) for error in invalid.errors())
    return list({fault.key: fault for fault in faults}.values())


def boolean_faults(settings: Mapping[str, Any], schema: type[BaseModel], prefix: str = "") -> Iterator[Fault]:
    """The switches that are given as 1 or "yes", and the numbers that are given as true: pydantic converts both."""
    for key, info in fields_by_key(schema).items():
        value, inner = settings.get(key), list(section_types(info.annotation))
        named = list(named_types(info.annotation))
        if named and is_named(value):
            assert isinstance(value, Mapping)
            for name, section in value.items():
                yield from _boolean_faults_inside(section, named, f"{prefix}{key}.{name}.")
        elif isinstance(value, Mapping):
            yield from _boolean_faults_inside(value, inner, f"{prefix}{key}.")
        elif info.annotation is bool:
            if value is not None and not isinstance(value, bool):
                yield Fault(prefix + key, _MESSAGES["bool_type"].format(given=_Given(value)))
        elif _has_boolean(value) and _has_number(info.annotation):
            yield Fault(prefix + key, _MESSAGES["float_type"].format(given=_Given(value)))


def _boolean_faults_inside(section: Mapping[str, Any], types: list[type[BaseModel]], prefix: str) -> Iterator[Fault]:
    """The boolean faults of a section that has one of these types, chosen by its `type` if there are several."""
    for kind in types:
        if len(types) == 1 or section.get("type") in get_args(kind.model_fields["type"].annotation):
            yield from boolean_faults(section, kind, prefix)


def _has_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list) and any(isinstance(item, bool) for item in value))


def _has_number(annotation: Any) -> bool:
    """Whether a setting of this type can be a number, or hold numbers."""
    if annotation in (int, float) or isinstance(annotation, int):  # an int is one value of a Literal
        return True
    return not inspect.isclass(annotation) and any(map(_has_number, get_args(annotation)))


def _fault(error: ErrorDetails, schema: type[BaseModel]) -> Fault:
    key, owner = _locate(error["loc"], schema)
    given = _Given(error["input"])
    context = {
        name: f"{value:g}" if isinstance(value, float) else value for name, value in error.get("ctx", {}).items()
    }
    match error["type"]:
        case "extra_forbidden":
            return Fault(key, f"unknown key; {_suggestion(key, owner, schema)}")
        case "union_tag_not_found":
            return Fault(f"{key}.type", "is required")
        case "union_tag_invalid":
            return Fault(f"{key}.type", f"must be one of {context['expected_tags']}, got {_Given(context['tag'])!r}")
        case "secret":  # what was given may be a key
            return Fault(key, error["msg"])
        case known if known in _MESSAGES:
            return Fault(key, _MESSAGES[known].format(given=given, **context))
        case _:
            return Fault(key, f"{error['msg'].removeprefix('Input ')}, got {given!r}")


@dataclass(frozen=True)
class _Given:
    """A value that the user gave, cut to a length that an error message can show."""

    value: object

    def __repr__(self) -> str:
        if isinstance(self.value, str):
            return _shortened(repr(self.value))
        try:
            return reprlib.repr(self.value)
        except ValueError:  # Python refuses to write whole numbers of more than 4300 digits
            return "a number of thousands of digits"

    def __str__(self) -> str:
        return _shortened(self.value) if isinstance(self.value, str) else repr(self)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _locate(location: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The dotted key of a location in a pydantic error, and the section that owns its last part.

    In a choice by `type`, pydantic's location contains the chosen type as a level of its own; a config file does not.
    The same holds for the tag of a setting's form.
    """
    sections: list[type[BaseModel]] = [schema]
    named: list[type[BaseModel]] = []
    """Types of the named sections that the last key may hold."""
    owner: type[BaseModel] | None = None
    keys: list[str] = []
    is_name = False
    for part in location:
        if part in (ONE, SEVERAL, "[key]"):
            continue
        if part == NAMED:
            is_name = True
            continue
        if is_name or (named and not sections):  # some settings can be nothing but a mapping of named sections
            keys.append(str(part))
            sections, is_name = named, False
            continue
        variant = [s for s in sections if len(sections) > 1 and part in get_args(s.model_fields["type"].annotation)]
        if variant:
            sections = variant
            continue
        keys.append(str(part))
        owner = sections[0] if sections else None
        info = fields_by_key(owner).get(str(part)) if owner else None
        sections = list(section_types(info.annotation)) if info else []
        named = list(named_types(info.annotation)) if info else []
    return ".".join(keys), owner


def _suggestion(key: str, owner: type[BaseModel] | None, schema: type[BaseModel]) -> str:
    """Where an unknown key may belong: a near miss in the same section, the same name elsewhere, or what is allowed."""
    name = key.rpartition(".")[2]
    siblings = list(fields_by_key(owner)) if owner else []
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
    """The dotted keys of all settings and sections."""
    for name, info in fields_by_key(section).items():
        yield prefix + name
        for inner in section_types(info.annotation):
            yield from _known_keys(inner, f"{prefix}{name}.")
