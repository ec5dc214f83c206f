"""The names of scorers in a config: built-in ones, judges, and functions of the user's own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from megatron_hapo.config.section import path_fault, section_name_fault

BUILT_IN_SCORERS = ("auto", "math", "exact", "reasoning_gym", "code")

_JUDGE = "judge/"
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def is_own(scorer: str) -> bool:
    """Whether the scorer is a function of the user's own."""
    return ":" in scorer


def judge_of(scorer: str) -> str | None:
    """The name of the judge that a scorer is; None for any other scorer."""
    return scorer.removeprefix(_JUDGE) if scorer.startswith(_JUDGE) else None


def judge_scorer(name: str) -> str:
    """The scorer that is this judge."""
    return f"{_JUDGE}{name}"


def part_name(scorer: str) -> str:
    """What the value of one of several scorers is called among the parts of the reward."""
    return function_of(scorer)[1] if is_own(scorer) else judge_of(scorer) or scorer


def function_of(scorer: str) -> tuple[str, str]:
    """The file or module of a scorer of the user's own, and the name of its function."""
    target, _, function = scorer.rpartition(":")
    return target, function


def is_file(target: str) -> bool:
    """Whether the target of a scorer of the user's own is a file, and not a module."""
    return target.endswith(".py")


def with_located_scorers(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of one config file, with the files of scorers made absolute: they are relative to the config file.

    Args:
        folder: of the config file; for the command line the current one.
    """

    def locate(value: Any) -> Any:
        if isinstance(value, list):
            return [locate(item) for item in value]
        if not isinstance(value, str) or not is_own(value) or not is_file(function_of(value)[0]):
            return value
        target, function = function_of(value)
        return f"{os.path.abspath(folder / target)}:{function}"

    def walk(section: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in section.items():
            if key == "scorers" and isinstance(value, Mapping):
                found[key] = {name: locate(scorer) for name, scorer in value.items()}
            elif key == "scorer":
                found[key] = locate(value)
            else:
                found[key] = walk(value) if isinstance(value, Mapping) else value
        return found

    return walk(settings)


def _known_scorer(scorer: str) -> str:
    if scorer in BUILT_IN_SCORERS:
        return scorer
    judge = judge_of(scorer)
    if judge is not None and section_name_fault(judge) is None:
        return scorer
    target, function = function_of(scorer)
    if function.isidentifier() and path_fault(target) is None and (is_file(target) or _MODULE.fullmatch(target)):
        return scorer
    allowed = ", ".join(BUILT_IN_SCORERS)
    raise PydanticCustomError(
        "scorer",
        "must be {allowed}, a judge as judge/NAME, or a function as FILE.py:NAME or MODULE:NAME",
        {"allowed": allowed},
    )


Scorer = Annotated[str, AfterValidator(_known_scorer)]
"""A built-in scorer, a judge, or the user's own."""
