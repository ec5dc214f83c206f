"""Messages between pipeline stages whose shapes every stage knows, because it packs the same micro-batches.

Megatron (0.19.2) sends the shape before each message of variable length, and then waits for the device twice: for the
shape, and for all kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_hapo.algorithm.microbatches import MicroBatch
from megatron_hapo.model.parallel_layout import ParallelLayout


class PlannedShapes(P2PCommunicator):
    """A schedule's messages. Activations from the stage before, and gradients from the one after, arrive in the order
    in which that stage computes them (`arrivals`).

    Args:
        microbatches: those of this rank, in order.
        shards: ranks over which sequence parallelism shards a micro-batch's tokens; 1 without it.
    """

    def __init__(self, pp_group: Any, config: Any, microbatches: Sequence[MicroBatch], *, shards: int):
        super().__init__(pp_group=pp_group, config=config)
        chunks = self.virtual_pipeline_model_parallel_size or 1
        shapes = [[m.input_ids.shape[1] // shards, 1, config.hidden_size] for m in microbatches]

        def shapes_of(*, at_end: bool) -> Iterator[list[int]]:
            order = arrivals(len(microbatches), group=pp_group.size(), chunks=chunks, at_end=at_end)
            return (shapes[number] for number in order)

        self._activations = shapes_of(at_end=self.is_pp_first_stage)
        self._gradients = shapes_of(at_end=self.is_pp_last_stage)

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        """The shapes of what arrives from the stage before and from the one after; zeros where nothing does."""
        nothing = [0, 0, 0]
        return (
            next(self._activations) if recv_prev else nothing,
            next(self._gradients) if recv_next else nothing,
        )


def arrivals(num_microbatches: int, *, group: int, chunks: int, at_end: bool) -> list[int]:
    """The micro-batch of each message that a stage receives from one of its neighbours, in order.

    Stages compute groups of as many micro-batches as there are stages, and each group by one chunk after another. A
    stage at that end of the pipeline gets from its neighbour, at the other end, what is left of all chunks but one.

    Args:
        group: number of stages.
        chunks: of a stage.
    """
    received = chunks - 1 if at_end else chunks
    starts = range(0, num_microbatches, group) if chunks > 1 else range(num_microbatches)
    size = group if chunks > 1 else 1
    return [number for first in starts for _ in range(received) for number in range(first, first + size)]


def schedule_options(
    chunks: Sequence[Any], microbatches: Sequence[MicroBatch], layout: ParallelLayout
) -> dict[str, Any]:
    """Arguments of Megatron's schedule, with the shapes of its messages; empty where it sends none."""
    if layout.sizes.pp == 1:
        return {}
    config, groups = chunks[0].config, schedules._build_default_pg_collection()
    shards = layout.sizes.tp if config.sequence_parallel else 1
    communicator = PlannedShapes(layout.pp_group, config, microbatches, shards=shards)
    return {"p2p_communicator": communicator, "pg_collection": groups}
