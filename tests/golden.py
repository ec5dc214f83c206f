"""Golden values computed with HAPO's released code; see tests/fixtures/README.md."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

FLOOR = 1e-8
"""Entropy floor of the released code."""
RTOL, ATOL, GRAD_ATOL = 2e-5, 1e-6, 1e-7


@cache
def load() -> dict[str, np.ndarray]:
    """All arrays of the file, by key."""
    with np.load(Path(__file__).parent / "fixtures/hapo_golden.npz") as file:
        return dict(file)


def cases(family: str) -> list[str]:
    """Names of the family's cases."""
    return sorted({key.split(":")[1] for key in load() if key.startswith(f"{family}:")})


def settings(name: str) -> dict[str, Any]:
    """Settings of a case, `family:case`."""
    return json.loads(str(load()["manifest"]))[name.replace(":", "/")]


def tensor(key: str) -> torch.Tensor:
    """One array of the file."""
    return torch.from_numpy(load()[key])


def valid(name: str) -> torch.Tensor:
    """[B, T] bool, True on the response tokens of the case."""
    return tensor(f"{name}:mask").bool()


def assert_close(got: torch.Tensor | float, want: torch.Tensor | float, *, rtol: float = RTOL, atol: float = ATOL):
    expected = torch.as_tensor(want)
    torch.testing.assert_close(torch.as_tensor(got, dtype=expected.dtype), expected, rtol=rtol, atol=atol)
