"""The layers of each pipeline stage, and sizes that contradict each other or the model."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_hapo.config import ParallelConfig, ParallelSizes


@pytest.mark.parametrize(
    ("sizes", "stages"),
    [
        ({}, [[range(8)]]),
        ({"pp": 2}, [[range(4)], [range(4, 8)]]),
        ({"pp": 2, "vpp": 2}, [[range(2), range(4, 6)], [range(2, 4), range(6, 8)]]),
        ({"pp": 3, "first_stage_layers": 2}, [[range(2)], [range(2, 5)], [range(5, 8)]]),
        ({"pp": 3, "first_stage_layers": 1, "last_stage_layers": 2}, [[range(1)], [range(1, 6)], [range(6, 8)]]),
    ],
)
def test_stages_hold_their_layers(sizes: dict[str, int], stages: list[list[range]]) -> None:
    grid = ParallelSizes(**sizes)
    assert list(grid.faults(8)) == []
    assert [grid.chunks(8, stage) for stage in range(grid.pp)] == stages


@pytest.mark.parametrize(
    ("sizes", "fault"),
    [
        ({"pp": 3}, ("pp", "8 layers do not split evenly over pp=3")),
        (
            {"pp": 2, "first_stage_layers": 4, "last_stage_layers": 3},
            ("pp", "8 layers do not split evenly over pp=2, first_stage_layers=4, last_stage_layers=3"),
        ),
        ({"pp": 2, "vpp": 3}, ("vpp", "the 4 layers of a stage do not split evenly into vpp=3 chunks")),
        ({"vpp": 2}, ("vpp", "needs pp of at least 2, got 2")),
    ],
)
def test_layers_that_do_not_split_are_a_fault(sizes: dict[str, int], fault: tuple[str, str]) -> None:
    assert list(ParallelSizes(**sizes).faults(8)) == [fault]


def test_sizes_are_frozen_hashable_and_keyword_only() -> None:
    sizes: Any = ParallelSizes(tp=2)
    assert len({sizes, ParallelSizes(tp=2)}) == 1
    with pytest.raises(ValueError, match="frozen"):
        sizes.tp = 4
    with pytest.raises(TypeError):
        type(sizes)(2)


def test_the_settings_are_sizes_and_name_their_faults_in_full() -> None:
    settings = ParallelConfig(tp=4, dp=2, ep=3, gpu_memory="80GiB")
    assert settings.world_size == settings.stage_size == 8
    (fault,) = settings.grid_faults("parallel.")
    assert str(fault) == "parallel.ep: must divide parallel.tp * parallel.dp / parallel.etp = 8, got 3"
    assert fault.involves == ("parallel.tp", "parallel.dp", "parallel.etp")
