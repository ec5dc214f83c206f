"""The two layouts that a plan connects. Pure.

Megatron's follows from the table of the model family, SGLang's (0.5.23) from its rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, assert_never

from megatron_hapo.model.families import (
    Placement,
    Shape,
    TableParameter,
    first_parameters,
    hf_tensor_shapes,
    last_parameters,
    layer_parameters,
)
from megatron_hapo.resharding.plan import Block, Parameter, Shard

if TYPE_CHECKING:
    from torch import Tensor

_VOCABULARY_MULTIPLE = 64  # padding of SGLang's VocabParallelEmbedding


@lru_cache(maxsize=8)
def matrix_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every HF tensor of the model, as a plan counts them."""
    return {name: matrix_size(size) for name, size in hf_tensor_shapes(shape).items()}


def matrix_size(tensor_shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor of this shape: all axes but the last are rows, a vector is one column."""
    return (tensor_shape[0], 1) if len(tensor_shape) == 1 else (math.prod(tensor_shape[:-1]), tensor_shape[-1])


# ----- the trainer


def trainer_parameter(name: str, size: tuple[int, ...], place: Placement, shape: Shape) -> Parameter:
    """A rank's local Megatron parameter in HF coordinates.

    Args:
        name: by which the rank finds the parameter.
        size: shape of the local tensor.
        place: where its values come from, by `families.placement`.
        shape: of the model.
    """
    rows, columns = matrix_size(size)
    sizes = matrix_sizes(shape)
    if place.axis is None:
        tensor = place.runs[0].tensor
        return Parameter(name, rows, columns, (Block(tensor, 0, 0, *sizes[tensor], 0, 0),))
    blocks, at = [], 0
    for run in place.runs:
        length, (tensor_rows, tensor_columns) = run.stop - run.start, sizes[run.tensor]
        if place.axis == 0:
            blocks.append(Block(run.tensor, run.start, 0, length, tensor_columns, at, 0))
        else:
            blocks.append(Block(run.tensor, 0, run.start, tensor_rows, length, 0, at))
        at += length
    padding = rows - at if place.axis == 0 else 0
    return Parameter(name, rows, columns, tuple(blocks), padding)


def rank_parameters(
    named: Iterable[tuple[str, Tensor]], place: Callable[[str], Placement], shape: Shape
) -> tuple[Parameter, ...]:
    """All parameters of a rank's Megatron model in HF coordinates.

    Args:
        named: (name, local tensor) of each parameter.
        place: `families.placement` for this rank.
        shape: of the model.
    """
    return tuple(trainer_parameter(name, tuple(tensor.shape), place(name), shape) for name, tensor in named)


def shards_of_ranks(parameters: Iterable[tuple[Parameter, ...]]) -> list[Shard]:
    """The trainer's shards, from the parameters of rank 0, 1, and so on: ranks with equal parameters are replicas."""
    replicas: dict[tuple[Parameter, ...], list[int]] = {}
    for rank, own in enumerate(parameters):
        replicas.setdefault(own, []).append(rank)
    return [Shard(tuple(ranks), own) for own, ranks in replicas.items()]


# ----- the engine


def unsupported_by_engine(shape: Shape) -> str | None:
    """The reason why SGLang would not build this model as its checkpoint says, or None if it would."""
    if shape.moe is not None and shape.moe.dense_layers:
        return (
            f"{shape.family}: SGLang gives experts to all layers, but this model has dense layers "
            "(mlp_only_layers, decoder_sparse_step in its config.json)"
        )
    if shape.moe is not None and shape.tied_embeddings:
        return (
            f"{shape.family}: SGLang does not tie the output head of this family to the embedding "
            "(tie_word_embeddings in its config.json)"
        )
    return None


def engine_parameters(shape: Shape, tp: int, ep: int = 1) -> list[tuple[Parameter, ...]]:
    """The parameters of each of an engine's `tp` ranks, under SGLang's names.

    Args:
        shape: of the model.
        tp: tensor-parallel size of the engine.
        ep: 1 slices every expert over the tp ranks; ep = tp gives each rank whole experts. SGLang supports no others.
    Raises:
        ValueError: the model does not split over tp and ep, or SGLang would not build it as its checkpoint says.
    """
    if ep not in (1, tp):
        raise ValueError(f"the engine's ep must be 1 or its tp={tp}, got {ep}")
    if shape.moe is None and ep > 1:
        raise ValueError(f"the engine's ep must be 1 for {shape.family}, which has no experts, got {ep}")
    if (reason := unsupported_by_engine(shape)) is not None:
        raise ValueError(reason)
    return [tuple(_engine_rank(shape, tp, ep, rank)) for rank in range(tp)]


def _engine_rank(shape: Shape, tp: int, ep: int, rank: int) -> Iterator[Parameter]:
    yield from (_engine_parameter(parameter, shape, tp, rank) for parameter in first_parameters(shape))
    for layer in range(shape.num_layers):
        yield from (_engine_parameter(parameter, shape, tp, rank) for parameter in layer_parameters(shape, layer))
        if shape.has_experts(layer):
            yield from _experts(f"model.layers.{layer}.mlp.", shape, tp, ep, rank)
    # SGLang's tied output head is the embedding itself.
    yield from (_engine_parameter(parameter, shape, tp, rank) for parameter in last_parameters(shape))


def _engine_parameter(parameter: TableParameter, shape: Shape, tp: int, rank: int) -> Parameter:
    """SGLang cuts a parameter as Megatron does, but stacks whole tensors where Megatron interleaves KV heads."""
    name, *_ = parameter.tensors
    rows, columns = matrix_size(parameter.tensors[name])
    match parameter.cut:
        case "whole":
            return Parameter(name, rows, columns, (Block(name, 0, 0, rows, columns, 0, 0),))
        case "vocabulary":
            return _vocabulary(name, shape, tp, rank)
        case "columns":
            return _columns(name, rows, _cut(shape, f"columns of {name}", columns, tp, rank, 1))
        case "rows":
            sizes = {tensor: size[0] for tensor, size in parameter.tensors.items()}
            parts = [(tensor, _cut(shape, f"rows of {tensor}", size, tp, rank, 1)) for tensor, size in sizes.items()]
            return _stacked(_stacked_name(name), parts, columns)
        case "kv_heads":
            queries = _cut(shape, "attention heads", shape.num_heads, tp, rank, shape.head_dim)
            cuts = [queries] + [_kv_cut(shape, tp, rank)] * (len(parameter.tensors) - 1)
            return _stacked(_stacked_name(name), list(zip(parameter.tensors, cuts, strict=True)), columns)
        case _:
            assert_never(parameter.cut)


def _stacked_name(first_tensor: str) -> str:
    """SGLang's name of the parameter that starts with this HF tensor."""
    return first_tensor.replace("q_proj", "qkv_proj").replace("gate_proj", "gate_up_proj")


def _experts(mlp: str, shape: Shape, tp: int, ep: int, rank: int) -> Iterator[Parameter]:
    """A layer's experts in FusedMoE's w13 [experts, gate; up, hidden] and w2 [experts, hidden, ffn]."""
    assert shape.moe is not None
    hidden, count = shape.hidden_size, shape.moe.num_experts
    first, last = _cut(shape, "experts", count, ep, rank, 1) if ep > 1 else (0, count)
    start, stop = _cut(shape, "expert MLP columns", shape.moe.ffn_size, tp // ep, rank % (tp // ep), 1)
    width, w13, w2 = stop - start, [], []
    for index, expert in enumerate(range(first, last)):
        name, at = f"{mlp}experts.{expert}.", 2 * width * index
        w13.append(Block(name + "gate_proj.weight", start, 0, width, hidden, at, 0))
        w13.append(Block(name + "up_proj.weight", start, 0, width, hidden, at + width, 0))
        w2.append(Block(name + "down_proj.weight", 0, start, hidden, width, hidden * index, 0))
    held = last - first
    yield Parameter(mlp + "experts.w13_weight", held * 2 * width, hidden, tuple(w13))
    yield Parameter(mlp + "experts.w2_weight", held * hidden, width, tuple(w2))


def _cut(shape: Shape, what: str, count: int, tp: int, rank: int, size: int) -> tuple[int, int]:
    """(start, stop) of this rank's part of `count` units of `size` rows or columns each."""
    if count % tp:
        raise ValueError(f"{shape.family}: {count} {what} do not split over the engine's tp={tp}")
    return rank * (count // tp) * size, (rank + 1) * (count // tp) * size


def _kv_cut(shape: Shape, tp: int, rank: int) -> tuple[int, int]:
    """(start, stop) rows of this rank's keys. If there are more ranks than heads, neighbouring ranks share a head."""
    if tp <= shape.num_kv_heads:
        return _cut(shape, "key/value heads", shape.num_kv_heads, tp, rank, shape.head_dim)
    if tp % shape.num_kv_heads:
        raise ValueError(
            f"{shape.family}: the engine's tp={tp} must be a multiple of the model's {shape.num_kv_heads} "
            "key/value heads"
        )
    head = rank // (tp // shape.num_kv_heads)
    return head * shape.head_dim, (head + 1) * shape.head_dim


def _stacked(name: str, parts: list[tuple[str, tuple[int, int]]], columns: int) -> Parameter:
    """A parameter that stacks a range of rows of each of several tensors."""
    blocks, at = [], 0
    for tensor, (start, stop) in parts:
        blocks.append(Block(tensor, start, 0, stop - start, columns, at, 0))
        at += stop - start
    return Parameter(name, at, columns, tuple(blocks))


def _columns(name: str, rows: int, cut: tuple[int, int]) -> Parameter:
    """A range of columns of the tensor with the same name."""
    start, stop = cut
    return Parameter(name, rows, stop - start, (Block(name, 0, start, rows, stop - start, 0, 0),))


def _vocabulary(name: str, shape: Shape, tp: int, rank: int) -> Parameter:
    """This rank's rows of the vocabulary, padded to a multiple of 64, or of 64 * tp if that does not split."""
    padded = -(-shape.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    if padded % tp:
        padded = -(-shape.vocab_size // (_VOCABULARY_MULTIPLE * tp)) * _VOCABULARY_MULTIPLE * tp
    rows = padded // tp
    start, stop = (min(shape.vocab_size, row) for row in (rank * rows, (rank + 1) * rows))
    block = Block(name, start, 0, stop - start, shape.hidden_size, 0, 0)
    return Parameter(name, rows, shape.hidden_size, (block,), rows - (stop - start))
