"""Sizes that do not divide the world are rejected before any process group is made."""

from __future__ import annotations

import pytest

from megatron_hapo.model.parallel_layout import check_sizes


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (4, {"cp": 3}, "4 ranks must be a multiple of tp=1 x pp=1 x cp=3 = 3"),
        (8, {"tp": 2, "cp": 3}, "8 ranks must be a multiple of tp=2 x pp=1 x cp=3 = 6"),
        (8, {"pp": 2, "ep": 8}, r"etp x ep must divide the 4 ranks of a pipeline stage \(tp x cp x dp\), got 1 x 8"),
        (4, {"ep": 3}, "ep must divide the 4 ranks"),
        (8, {"tp": 2, "etp": 2, "ep": 8}, "etp x ep must divide the 8 ranks .*, got 2 x 8"),
        (8, {"tp": 2, "etp": 4}, "etp must divide tp=2, got 4"),
        (4, {"cp": 0}, "cp must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_divide_are_named(world_size: int, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sizes(world_size, **{"tp": 1, "pp": 1, "cp": 1, "ep": 1} | sizes)


@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "ep": 4}, {"cp": 2, "pp": 2, "ep": 2}, {"tp": 4, "etp": 2, "ep": 4}])
def test_sizes_that_divide_are_accepted(sizes: dict[str, int]) -> None:
    check_sizes(8, **{"tp": 1, "pp": 1, "cp": 1, "ep": 1} | sizes)
