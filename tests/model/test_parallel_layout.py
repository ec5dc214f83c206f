"""Sizes that do not match a world are rejected before any process group is created."""

from __future__ import annotations

import pytest

from megatron_hapo.config import ParallelSizes


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (4, {"cp": 3}, r"the world size 4 must be a multiple of tp=1 \* pp=1 \* cp=3 = 3"),
        (8, {"tp": 2, "cp": 3}, r"the world size 8 must be a multiple of tp=2 \* pp=1 \* cp=3 = 6"),
        (8, {"pp": 2, "ep": 8}, r"ep must divide tp \* dp / etp = 4, got 8"),
        (4, {"ep": 3}, r"ep must divide tp \* dp / etp = 4, got 3"),
        (8, {"tp": 2, "etp": 2, "ep": 8}, r"ep must divide tp \* dp / etp = 4, got 8"),
        (8, {"tp": 2, "etp": 4}, "etp must divide tp=2, got 4"),
        (4, {"cp": 0}, "cp\n  Input should be greater than 0 .*input_value=0"),
    ],
)
def test_sizes_that_do_not_divide_are_named(world_size: int, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelSizes.for_world(world_size, **sizes).check_world(world_size)


@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "ep": 4}, {"cp": 2, "pp": 2, "ep": 2}, {"tp": 4, "etp": 2, "ep": 4}])
def test_sizes_that_divide_are_accepted(sizes: dict[str, int]) -> None:
    ParallelSizes.for_world(8, **sizes).check_world(8)


def test_a_world_of_another_size_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"tp=2 \* pp=1 \* cp=1 \* dp=2 = 4 must equal the world size, got 8 ranks"):
        ParallelSizes(tp=2, dp=2).check_world(8)
