"""reasoning-gym: importing the package, and encoding a task as a ground truth for its scorer."""

from __future__ import annotations

import importlib
import json
import warnings
from types import ModuleType
from typing import Any

REASONING_GYM_PREFIX = "reasoning_gym/"
"""Prefix of the data source of reasoning-gym's tasks; the dataset's name follows."""


def import_reasoning_gym() -> ModuleType:
    """The package reasoning_gym, imported without the syntax warnings that one of its dependencies causes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # cellpylib 2.4 compares with literals by `is`
        return importlib.import_module("reasoning_gym")


def encode_task(*, answer: str, index: int, size: int, seed: int, options: dict[str, Any]) -> str:
    """The ground truth of a reasoning-gym task: its answer, and what its scorer needs to build the task again."""
    return json.dumps({"answer": answer, "index": index, "size": size, "seed": seed, "options": options})
