"""Tasks of reasoning-gym: the package, and how a task travels to its scorer as a ground truth."""

from __future__ import annotations

import importlib
import json
import warnings
from types import ModuleType
from typing import Any

REASONING_GYM_PREFIX = "reasoning_gym/"
"""Opens the data source of reasoning-gym's tasks; the dataset's name follows."""


def import_reasoning_gym() -> ModuleType:
    """The package reasoning_gym, without what Python says when it first compiles one of its dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # cellpylib 2.4 compares with literals by `is`
        return importlib.import_module("reasoning_gym")


def encode_task(*, answer: str, index: int, size: int, seed: int, options: dict[str, Any]) -> str:
    """The ground truth of a reasoning-gym task: its answer, and how to build the task again for its own scorer."""
    return json.dumps({"answer": answer, "index": index, "size": size, "seed": seed, "options": options})
