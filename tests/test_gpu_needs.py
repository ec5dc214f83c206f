"""Why a test in tests/gpu is skipped, from what it says it needs and what a machine has."""

from __future__ import annotations

import pytest

from tests.gpu.conftest import what_is_missing


@pytest.mark.parametrize(
    ("needs", "gpus", "missing"),
    [
        (pytest.mark.needs("torch"), 0, "a CUDA device"),
        (pytest.mark.needs("torch", "megatron.core"), 1, None),
        (pytest.mark.needs("torch", "no_such_package"), 1, "the package no_such_package"),
        (pytest.mark.needs("no_such_package.part"), 1, "the package no_such_package.part"),
        (pytest.mark.needs("torch", gpus=2), 1, "2 GPUs, and this machine has 1"),
        (pytest.mark.needs("torch", gpus=2), 2, None),
    ],
)
def test_the_first_missing_need_is_named(
    request: pytest.FixtureRequest, needs: pytest.MarkDecorator, gpus: int, missing: str | None
) -> None:
    request.node.add_marker(needs)
    assert what_is_missing(request.node, gpus=gpus) == missing
