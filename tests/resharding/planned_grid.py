"""The trainer's shards of any parallel layout without building its models, and the bytes that a plan moves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_hapo.config import ParallelSizes
from megatron_hapo.model.families import Shape, Spec, is_expert, padded_vocab_size, placement, table_parameters
from megatron_hapo.resharding.layouts import matrix_sizes, trainer_parameter
from megatron_hapo.resharding.plan import Parameter, ReshardingPlan, Shard


def trainer_shards(shape: Shape, sizes: ParallelSizes, *, spec: Spec = "te") -> list[Shard]:
    """Shards of a grid of Megatron ranks, which agree with those of real models (`tests/trainer/test_trainer.py`).

    The order of ranks is tp, cp, dp, pp, from fastest to slowest. For experts the tp x cp x dp ranks of a stage are
    ordered etp, ep, replicas.

    Raises:
        ValueError: the layers do not split over the pipeline.
    """
    if faults := [message for _, message in sizes.faults(shape.num_layers)]:
        raise ValueError("; ".join(faults))
    shards = []
    for stage in range(sizes.pp):
        layers = [layer for chunk in sizes.chunks(shape.num_layers, stage) for layer in chunk]
        held = table_parameters(shape, layers, first=stage == 0, last=stage == sizes.pp - 1, ep=sizes.ep)
        names = [parameter.name(spec) for parameter in held]
        ranks = range(stage * sizes.stage_size, (stage + 1) * sizes.stage_size)
        dense, experts = [n for n in names if not is_expert(n)], [n for n in names if is_expert(n)]
        shards += _dense_shards(shape, dense, ranks, tp=sizes.tp)
        shards += _expert_shards(shape, experts, ranks, ep=sizes.ep, etp=sizes.etp) if experts else []
    return shards


def traffic(plan: ReshardingPlan) -> np.ndarray:
    """[trainer ranks, engines, engine ranks] int64, bytes that each trainer rank sends to each engine rank."""
    num_ranks = 1 + max(max(shard.ranks) for shard in plan.shards)
    engine_rank = np.array([copy.engine_rank for copy in plan.copies])
    num_engine_ranks = 1 + int(engine_rank.max())
    num_bytes = np.zeros((num_ranks, plan.engines, num_engine_ranks), dtype=np.int64)
    for engine in range(plan.engines):
        links = plan.senders(engine) * num_engine_ranks + engine_rank
        sums = np.bincount(links, plan.copy_bytes, num_ranks * num_engine_ranks)  # float64: exact below 2^53
        num_bytes[:, engine] = sums.reshape(num_ranks, num_engine_ranks)
    return num_bytes


def _dense_shards(shape: Shape, names: Sequence[str], ranks: range, *, tp: int) -> Iterator[Shard]:
    for tp_rank in range(tp):
        held = (_planned_parameter(name, shape, tp_rank=tp_rank, tp_size=tp) for name in names)
        yield Shard(tuple(ranks[tp_rank::tp]), tuple(held))


def _expert_shards(shape: Shape, names: Sequence[str], ranks: range, *, ep: int, etp: int) -> Iterator[Shard]:
    for ep_rank, etp_rank in itertools.product(range(ep), range(etp)):
        part = {"ep_rank": ep_rank, "ep_size": ep, "etp_rank": etp_rank, "etp_size": etp}
        held = (_planned_parameter(name, shape, **part) for name in names)
        yield Shard(tuple(ranks[ep_rank * etp + etp_rank :: ep * etp]), tuple(held))


def _planned_parameter(name: str, shape: Shape, *, tp_rank: int = 0, tp_size: int = 1, **of_expert: int) -> Parameter:
    place = placement(name, shape, first_layer=0, tp_rank=tp_rank, tp_size=tp_size, **of_expert)
    sizes = matrix_sizes(shape)
    rows, columns = sizes[place.runs[0].tensor]
    length = sum(run.stop - run.start for run in place.runs)
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = padded_vocab_size(shape.vocab_size, tp_size) // tp_size
    elif place.axis == 0:
        rows = length
    elif place.axis == 1:
        columns = length
    return trainer_parameter(name, (rows, columns), place, shape)
