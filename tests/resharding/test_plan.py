"""The plan writes every engine element exactly once, between any two layouts, and balances the load over replicas."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pytest

from megatron_hapo.config import ParallelSizes
from megatron_hapo.model.families import MoeShape, Shape
from megatron_hapo.resharding.layouts import engine_parameters, matrix_sizes
from megatron_hapo.resharding.plan import Block, Parameter, ReshardingPlan, Shard, make_plan
from tests.resharding.planned_grid import traffic, trainer_shards
from tests.shapes import TINY

SHAPE = replace(TINY, qkv_bias=True)

MOE = MoeShape(num_experts=8, ffn_size=16, top_k=2, normalize_top_k=True, dense_layers=frozenset())
MOE_SHAPE = replace(SHAPE, qkv_bias=False, moe=MOE)

Weights = dict[str, np.ndarray]


def random_tensors(shape: Shape, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(size) for name, size in matrix_sizes(shape).items()}


def cut(tensors: Weights, parameters: tuple[Parameter, ...]) -> Weights:
    """Reference: what a rank with these parameters holds, each [rows, columns] float64 with NaN as padding."""
    held = {}
    for p in parameters:
        held[p.name] = np.full((p.rows, p.columns), np.nan)
        for b in p.blocks:
            part = tensors[b.tensor][b.row : b.row + b.rows, b.column : b.column + b.columns]
            held[p.name][b.at_row : b.at_row + b.rows, b.at_column : b.at_column + b.columns] = part
    return held


def carry_out(
    plan: ReshardingPlan, sources: dict[int, Weights], engine: list[tuple[Parameter, ...]]
) -> list[list[Weights]]:
    """What each rank of each engine holds after all copies; asserts that no two copies overlap."""
    engines = [
        [{p.name: np.full((p.rows, p.columns), np.nan) for p in rank} for rank in engine] for _ in range(plan.engines)
    ]
    for channel in plan.channels():
        for source, target in zip(channel.sources, channel.targets, strict=True):
            values = sources[channel.source_rank][source.parameter]
            values = values[source.row : source.row + source.rows, source.column : source.column + source.columns]
            place = engines[channel.engine][channel.engine_rank][target.parameter]
            place = place[target.row : target.row + target.rows, target.column : target.column + target.columns]
            assert place.shape == values.shape
            assert np.isnan(place).all()
            place[...] = values
    return engines


def held_by_ranks(shards: list[Shard], tensors: Weights) -> dict[int, Weights]:
    held: dict[int, Weights] = {}
    for shard in shards:
        for rank in shard.ranks:
            held.setdefault(rank, {}).update(cut(tensors, shard.parameters))
    return held


def plan_of(
    shape: Shape, shards: list[Shard], engine: list[tuple[Parameter, ...]], engines: int, limit: int
) -> ReshardingPlan:
    return make_plan(shards, engine, matrix_sizes(shape), engines=engines, itemsize=2, max_copy_bytes=limit)


@pytest.mark.parametrize("seed", range(30))
def test_any_layout_to_any_layout(seed: int) -> None:
    rng = random.Random(seed)
    shape = replace(
        SHAPE,
        tied_embeddings=rng.random() < 0.5,
        qk_norm=rng.random() < 0.5,
        qkv_bias=rng.random() < 0.5,
        vocab_size=rng.choice([64, 101, 130, 200]),
    )
    tensors = random_tensors(shape, seed)
    tp, pp, dp = rng.choice([1, 2, 4]), rng.choice([1, 2, 4]), rng.choice([1, 2, 3])
    shards = trainer_shards(shape, ParallelSizes(tp=tp, pp=pp, dp=dp), spec=rng.choice(["te", "local"]))
    engine = engine_parameters(shape, rng.choice([1, 2, 4, 8]))
    plan = plan_of(shape, shards, engine, rng.choice([1, 2, 5]), rng.choice([50, 500, 1 << 20]))
    expected = [cut(tensors, parameters) for parameters in engine]
    for ranks in carry_out(plan, held_by_ranks(shards, tensors), engine):
        for got, want in zip(ranks, expected, strict=True):
            for name in want:
                np.testing.assert_array_equal(
                    got[name], want[name], err_msg=name
                )  # NaN equals NaN: padding is not written


@pytest.mark.parametrize("seed", range(20))
def test_experts_from_any_layout_to_any_layout(seed: int) -> None:
    rng = random.Random(seed)
    tensors = random_tensors(MOE_SHAPE, seed)
    tp, pp, dp = rng.choice([1, 2, 4]), rng.choice([1, 2, 4]), rng.choice([1, 2, 4])
    etp = rng.choice([size for size in (1, 2, 4) if tp % size == 0])
    ep = rng.choice([size for size in (1, 2, 4, 8) if tp * dp % (etp * size) == 0])
    shards = trainer_shards(
        MOE_SHAPE, ParallelSizes(tp=tp, pp=pp, dp=dp, ep=ep, etp=etp), spec=rng.choice(["te", "local"])
    )
    engine_tp = rng.choice([1, 2, 4, 8])
    engine = engine_parameters(MOE_SHAPE, engine_tp, rng.choice([1, engine_tp]))
    plan = plan_of(MOE_SHAPE, shards, engine, rng.choice([1, 2, 3]), rng.choice([50, 500, 1 << 20]))
    expected = [cut(tensors, parameters) for parameters in engine]
    for ranks in carry_out(plan, held_by_ranks(shards, tensors), engine):
        for got, want in zip(ranks, expected, strict=True):
            for name in want:
                np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_fused_experts_by_hand() -> None:
    """w13 stacks gate over up for each expert. With ep = tp a rank holds whole experts, with ep = 1 a part of each."""
    tensors = random_tensors(MOE_SHAPE)
    name = "model.layers.1.mlp.experts."

    def tensor(expert: int, part: str) -> np.ndarray:
        return tensors[f"{name}{expert}.{part}_proj.weight"]

    whole = cut(tensors, engine_parameters(MOE_SHAPE, 2, 2)[1])
    np.testing.assert_array_equal(
        whole[name + "w13_weight"], np.concatenate([tensor(e, p) for e in range(4, 8) for p in ("gate", "up")])
    )
    np.testing.assert_array_equal(whole[name + "w2_weight"], np.concatenate([tensor(e, "down") for e in range(4, 8)]))
    parts = cut(tensors, engine_parameters(MOE_SHAPE, 2)[1])
    np.testing.assert_array_equal(
        parts[name + "w13_weight"], np.concatenate([tensor(e, p)[8:] for e in range(8) for p in ("gate", "up")])
    )
    np.testing.assert_array_equal(
        parts[name + "w2_weight"], np.concatenate([tensor(e, "down")[:, 8:] for e in range(8)])
    )


@pytest.mark.parametrize("engine_tp", [1, 2, 4])
def test_the_round_trip_is_bitwise_exact(engine_tp: int) -> None:
    """A -> B -> A. Without replicated KV heads an engine layout can be a source layout too."""
    tensors = random_tensors(SHAPE)
    a = trainer_shards(SHAPE, ParallelSizes(tp=2, pp=2, dp=1))
    b = engine_parameters(SHAPE, engine_tp)
    (there,) = carry_out(plan_of(SHAPE, a, b, 1, 300), held_by_ranks(a, tensors), b)
    back_shards = [Shard((rank,), parameters) for rank, parameters in enumerate(b)]
    for shard in a:
        # One rank of A is not a whole engine. Tensors that it lacks would be unused, so only its own are planned.
        own = {block.tensor for parameter in shard.parameters for block in parameter.blocks}
        sources = [
            Shard(s.ranks, tuple(p for p in s.parameters if {x.tensor for x in p.blocks} <= own)) for s in back_shards
        ]
        plan = plan_of(SHAPE, sources, [shard.parameters], 1, 300)
        ((back,),) = carry_out(plan, dict(enumerate(there)), [shard.parameters])
        for name, want in cut(tensors, shard.parameters).items():
            np.testing.assert_array_equal(back[name], want)


def test_senders_share_the_load_evenly() -> None:
    shards = trainer_shards(SHAPE, ParallelSizes(tp=2, pp=2, dp=4))
    for engines in (1, 3, 4, 8):
        num_bytes = traffic(plan_of(SHAPE, shards, engine_parameters(SHAPE, 2), engines, 64))
        sent = num_bytes.sum((1, 2)).reshape(2, 4, 2)  # stage, replica, tp rank
        total = sum(rows * columns for rows, columns in matrix_sizes(SHAPE).values())
        assert num_bytes.sum() >= engines * total * 2
        assert (np.ptp(sent, axis=1) <= 0.1 * sent.mean(axis=1) + 256).all()


def test_each_engine_has_its_own_replica_where_there_are_enough() -> None:
    shards = trainer_shards(SHAPE, ParallelSizes(tp=1, pp=1, dp=4))
    num_bytes = traffic(plan_of(SHAPE, shards, engine_parameters(SHAPE, 2), 4, 1 << 20))
    np.testing.assert_array_equal(num_bytes.sum(2) > 0, np.eye(4, dtype=bool))


def simple(*blocks: tuple[int, int, int, int]) -> Parameter:
    """A 4 x 4 parameter whose blocks (row, column, rows, columns) lie where they do in the tensor."""
    return Parameter("p", 4, 4, tuple(Block("t", *block, block[0], block[1]) for block in blocks))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ([simple((0, 0, 2, 4))], simple((0, 0, 4, 4)), r"trainer's t: 8 of 16 elements have no source"),
        (
            [simple((0, 0, 3, 4)), simple((2, 0, 2, 4))],
            simple((0, 0, 4, 4)),
            r"trainer's t: rows 2..3 are covered more than",
        ),
        ([simple((0, 0, 4, 3)), simple((0, 2, 4, 2))], simple((0, 0, 4, 4)), r"trainer's t: columns 2..3 of rows"),
        ([simple((0, 0, 4, 4))], simple((0, 0, 2, 4)), r"engine rank 0, p: 8 of 16 elements have no source"),
        ([simple((0, 0, 4, 4))], simple((0, 0, 4, 4), (0, 0, 4, 4)), r"engine rank 0, p: columns 0..4"),
        ([simple((0, 0, 4, 4))], simple((1, 0, 4, 4)), r"engine rank 0, p: Block.* exceeds the tensor of 4 x 4"),
    ],
)
def test_elements_not_written_exactly_once_are_an_error(
    source: list[Parameter], target: Parameter, message: str
) -> None:
    shards = [Shard((rank,), (parameter,)) for rank, parameter in enumerate(source)]
    with pytest.raises(ValueError, match=message):
        make_plan(shards, [(target,)], {"t": (4, 4)}, engines=1, itemsize=2, max_copy_bytes=100)


def test_a_tensor_missing_on_one_side_is_named() -> None:
    shards, engine = trainer_shards(SHAPE, ParallelSizes(tp=1, pp=1, dp=1)), engine_parameters(SHAPE, 1)
    with pytest.raises(ValueError, match=r"no engine parameter uses the trainer's lm_head.weight"):
        plan_of(SHAPE, shards, engine_parameters(replace(SHAPE, tied_embeddings=True), 1), 1, 1000)
    (shard,) = shards
    with pytest.raises(ValueError, match=r"no trainer rank holds lm_head.weight"):
        plan_of(SHAPE, [Shard(shard.ranks, shard.parameters[:-1])], engine, 1, 1000)


def test_engine_layouts_that_do_not_fit_the_model_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"8 attention heads do not split over the engine's tp=3"):
        engine_parameters(SHAPE, 3)
    with pytest.raises(ValueError, match=r"the engine's ep must be 1 or its tp=4, got 2"):
        engine_parameters(MOE_SHAPE, 4, 2)
    with pytest.raises(ValueError, match=r"the engine's ep must be 1 for .*, which has no experts, got 2"):
        engine_parameters(SHAPE, 2, 2)
    with pytest.raises(ValueError, match=r"SGLang gives experts to all layers"):
        engine_parameters(replace(SHAPE, moe=replace(MOE, dense_layers=frozenset({1}))), 1)


def test_a_dense_model_of_235b_is_planned_in_seconds() -> None:
    shape = replace(
        SHAPE, num_layers=96, hidden_size=12288, ffn_size=49152, num_heads=96, num_kv_heads=8, head_dim=128,
        vocab_size=151936,
    )  # fmt: skip
    start = time.process_time()
    plan = make_plan(
        trainer_shards(shape, ParallelSizes(tp=8, pp=8, dp=8)),
        engine_parameters(shape, 16),
        matrix_sizes(shape),
        engines=16,
        itemsize=2,
        max_copy_bytes=64 << 20,
    )
    num_bytes = traffic(plan)
    assert time.process_time() - start < 10
    assert num_bytes.shape == (512, 16, 16)
