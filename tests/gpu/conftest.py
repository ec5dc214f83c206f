"""Tests that need a CUDA device; the same cases run smaller on a CPU in the folders above.

A file says what it needs besides torch: `pytestmark = pytest.mark.needs("sglang", gpus=2)`. What is missing is the
reason of the skip, so that torch and Megatron alone are enough for the files that need no more.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    here, gpus = Path(__file__).parent, torch.cuda.device_count()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if (missing := what_is_missing(item, gpus=gpus)) is not None:
                item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))


def what_is_missing(item: pytest.Item, *, gpus: int) -> str | None:
    """The first of its needs that this machine, with so many GPUs, does not have."""
    if not gpus:
        return "a CUDA device"
    for marker in item.iter_markers("needs"):
        if gpus < (wanted := marker.kwargs.get("gpus", 1)):
            return f"{wanted} GPUs, and this machine has {gpus}"
        for module in marker.args:
            if not is_installed(module):
                return f"the package {module}"
    return None


def is_installed(module: str) -> bool:
    """Whether a module can be found; its packages are imported for that, but not the module itself."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
