"""The order in which a stage's messages arrive; that values are right is shown by real pipelines in test_trainer."""

from __future__ import annotations

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_hapo.trainer.stage_messages import arrivals


def test_messages_arrive_in_the_order_of_the_micro_batches() -> None:
    assert arrivals(5, group=2, chunks=1, at_end=False) == [0, 1, 2, 3, 4]
    assert arrivals(5, group=2, chunks=1, at_end=True) == []  # nothing comes from beyond the end
    assert arrivals(4, group=2, chunks=2, at_end=False) == [0, 1, 0, 1, 2, 3, 2, 3]
    assert arrivals(4, group=2, chunks=2, at_end=True) == [0, 1, 2, 3]


@pytest.mark.parametrize(("group", "chunks"), [(2, 2), (4, 3), (3, 2)])
def test_the_order_is_that_of_megatrons_schedule(group: int, chunks: int) -> None:
    """A stage at the end sends what comes out of all its chunks but the last to the other end."""
    table = get_schedule_table(3 * group, chunks, group)
    assert arrivals(3 * group, group=group, chunks=chunks, at_end=False) == [number for number, _ in table]
    sent = [number for number, chunk in table if chunk < chunks - 1]
    assert arrivals(3 * group, group=group, chunks=chunks, at_end=True) == sent
