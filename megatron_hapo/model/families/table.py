"""The table from Megatron parameters to HF tensors, for any tensor- and expert-parallel size.

Every Megatron parameter on a rank is a concatenation, along one axis, of runs of rows (or columns) of HF tensors. The
table gives those runs; whoever moves weights only follows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron_hapo.model.families.shape import Shape, padded_vocab_size

Cut = Literal["whole", "rows", "columns", "kv_heads", "vocabulary"]
"""How tensor parallelism cuts: not at all; each tensor's rows (columns) evenly; whole KV heads, each with its queries;
rows of the padded vocabulary."""


@dataclass(frozen=True)
class Run:
    """Rows (axis 0) or columns (axis 1) start..stop of an HF tensor."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class Placement:
    """A local Megatron parameter: these runs, one after the other along `axis`; the rest of it is padding.

    axis None: the whole HF tensor, held by every tensor-parallel rank.
    """

    axis: int | None
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class FusedExpert:
    """Where an expert's tensor lies in a checkpoint that stacks a layer's experts: tensor[expert, start:stop]."""

    tensor: str
    shape: tuple[int, ...]
    expert: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Row:
    """One line of the table."""

    megatron: tuple[str, ...]
    """Megatron's names: local spec, and Transformer Engine's where it fuses modules."""
    hf: dict[str, tuple[str, ...]]
    """HF tensors in the order in which they lie, with their sizes (keys of `_sizes`)."""
    cut: Cut
    when: Callable[[Shape, int], bool] = lambda shape, layer: True
    """Whether a layer has it."""


def _dense(shape: Shape, layer: int) -> bool:
    return not shape.has_experts(layer)


_MODEL_ROWS = (
    _Row(("embedding.word_embeddings.weight",), {"model.embed_tokens.weight": ("vocab", "hidden")}, "vocabulary"),
    _Row(("decoder.final_layernorm.weight",), {"model.norm.weight": ("hidden",)}, "whole"),
    _Row(("output_layer.weight",), {"lm_head.weight": ("vocab", "hidden")}, "vocabulary"),
)

# Names below decoder.layers.N and model.layers.N.
_LAYER_ROWS = (
    _Row(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        {"input_layernorm.weight": ("hidden",)},
        "whole",
    ),
    _Row(
        ("self_attention.linear_qkv.weight",),
        {
            "self_attn.q_proj.weight": ("q", "hidden"),
            "self_attn.k_proj.weight": ("kv", "hidden"),
            "self_attn.v_proj.weight": ("kv", "hidden"),
        },
        "kv_heads",
    ),
    _Row(
        ("self_attention.linear_qkv.bias",),
        {"self_attn.q_proj.bias": ("q",), "self_attn.k_proj.bias": ("kv",), "self_attn.v_proj.bias": ("kv",)},
        "kv_heads",
        lambda shape, layer: shape.qkv_bias,
    ),
    _Row(
        ("self_attention.q_layernorm.weight",),
        {"self_attn.q_norm.weight": ("head",)},
        "whole",
        lambda shape, layer: shape.qk_norm,
    ),
    _Row(
        ("self_attention.k_layernorm.weight",),
        {"self_attn.k_norm.weight": ("head",)},
        "whole",
        lambda shape, layer: shape.qk_norm,
    ),
    _Row(("self_attention.linear_proj.weight",), {"self_attn.o_proj.weight": ("hidden", "q")}, "columns"),
    _Row(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        {"post_attention_layernorm.weight": ("hidden",)},
        "whole",
    ),
    _Row(
        ("mlp.linear_fc1.weight",),
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
        "rows",
        _dense,
    ),
    _Row(("mlp.linear_fc2.weight",), {"mlp.down_proj.weight": ("hidden", "ffn")}, "columns", _dense),
    _Row(("mlp.router.weight",), {"mlp.gate.weight": ("experts", "hidden")}, "whole", Shape.has_experts),
)

# {} is the expert: its local number in Megatron's names, its global number in HF's.
_EXPERT_ROWS = (
    _Row(
        ("mlp.experts.local_experts.{}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{}"),
        {
            "mlp.experts.{}.gate_proj.weight": ("expert_ffn", "hidden"),
            "mlp.experts.{}.up_proj.weight": ("expert_ffn", "hidden"),
        },
        "rows",
        Shape.has_experts,
    ),
    _Row(
        ("mlp.experts.local_experts.{}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{}"),
        {"mlp.experts.{}.down_proj.weight": ("hidden", "expert_ffn")},
        "columns",
        Shape.has_experts,
    ),
)

_MODEL_BY_NAME = {name: row for row in _MODEL_ROWS for name in row.megatron}
_LAYER_BY_NAME = {name: row for row in (*_LAYER_ROWS, *_EXPERT_ROWS) for name in row.megatron}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_MEGATRON_EXPERT = re.compile(r"(?<=local_experts\.)\d+|(?<=mlp\.experts\.linear_fc\d\.weight)\d+")
_HF_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def is_expert(name: str) -> bool:
    """Whether a Megatron parameter belongs to an expert: dealt out over ep, and cut over etp in the place of tp."""
    return ".mlp.experts." in name


def is_hf_expert(tensor: str) -> bool:
    """The same of an HF tensor."""
    return _HF_EXPERT.fullmatch(tensor) is not None


def placement(
    name: str,
    shape: Shape,
    *,
    first_layer: int,
    tp_rank: int,
    tp_size: int,
    ep_rank: int = 0,
    ep_size: int = 1,
    etp_rank: int = 0,
    etp_size: int = 1,
) -> Placement:
    """Where the local parameter `name` comes from.

    Args:
        name: Megatron's parameter name on the rank, e.g. decoder.layers.0.mlp.linear_fc1.weight.
        first_layer: global index of the model chunk's layer 0.
        ep_rank, ep_size: expert-parallel rank e of n holds the e-th of n equal ranges of experts.
        etp_rank, etp_size: of the ranks over which each expert is cut, as all else is over the tp ranks.
    Raises:
        KeyError: a parameter that the table does not know, or that this model has not.
        ValueError: the model does not split over the layout.
    """
    row, hf = _find(name, shape, first_layer=first_layer, ep_rank=ep_rank, ep_size=ep_size)
    axis = {"whole": None, "columns": 1}.get(row.cut, 0)
    rank, size, over = (etp_rank, etp_size, "etp") if is_expert(name) else (tp_rank, tp_size, "tp")
    return Placement(axis, tuple(_runs(row.cut, hf, shape, rank, size, over)))


def hf_tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the HF checkpoint, in checkpoint order; experts one by one."""
    return dict(_hf_tensor_shapes(shape))


def fused_expert(tensor: str, shape: Shape) -> FusedExpert | None:
    """Where a checkpoint with stacked experts (transformers 5) keeps this expert tensor; None for any other tensor."""
    match = _HF_EXPERT.fullmatch(tensor)
    if match is None:
        return None
    assert shape.moe is not None, tensor
    num_experts, ffn, hidden = shape.moe.num_experts, shape.moe.ffn_size, shape.hidden_size
    if match[3] == "down":
        return FusedExpert(f"{match[1]}.down_proj", (num_experts, hidden, ffn), int(match[2]), 0, hidden)
    start = 0 if match[3] == "gate" else ffn
    return FusedExpert(f"{match[1]}.gate_up_proj", (num_experts, 2 * ffn, hidden), int(match[2]), start, start + ffn)


def _find(
    name: str, shape: Shape, *, first_layer: int, ep_rank: int, ep_size: int
) -> tuple[_Row, dict[str, tuple[int, ...]]]:
    """The parameter's row, and its HF tensors with their shapes."""
    match = _LAYER.fullmatch(name)
    if match is None:
        row, hf = _MODEL_BY_NAME[name], _resolve(_MODEL_BY_NAME[name], shape)
        if name == "output_layer.weight" and shape.tied_embeddings:
            hf = {"model.embed_tokens.weight": hf["lm_head.weight"]}
        return row, hf
    layer, inner = first_layer + int(match[1]), match[2]
    expert = _MEGATRON_EXPERT.search(inner)
    row = _LAYER_BY_NAME[_MEGATRON_EXPERT.sub("{}", inner)]
    if not row.when(shape, layer):
        raise KeyError(f"{name}: layer {layer} of this {shape.family} model has no such parameter")
    if expert is None:
        return row, _resolve(row, shape, layer)
    assert shape.moe is not None
    if shape.moe.num_experts % ep_size:
        raise ValueError(f"{name}: {shape.moe.num_experts} experts do not split over ep={ep_size}")
    return row, _resolve(row, shape, layer, ep_rank * (shape.moe.num_experts // ep_size) + int(expert[0]))


def _resolve(
    row: _Row, shape: Shape, layer: int | None = None, expert: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The row's HF tensors under their full names, with their shapes."""
    prefix = "" if layer is None else f"model.layers.{layer}."
    sizes = _sizes(shape)
    return {prefix + name.format(expert): tuple(sizes[size] for size in dims) for name, dims in row.hf.items()}


@lru_cache(maxsize=8)
def _sizes(shape: Shape) -> dict[str, int]:
    sizes = {
        "vocab": shape.vocab_size,
        "hidden": shape.hidden_size,
        "q": shape.num_heads * shape.head_dim,
        "kv": shape.num_kv_heads * shape.head_dim,
        "head": shape.head_dim,
        "ffn": shape.ffn_size,
    }
    if shape.moe is not None:
        sizes |= {"experts": shape.moe.num_experts, "expert_ffn": shape.moe.ffn_size}
    return sizes


def _runs(cut: Cut, hf: dict[str, tuple[int, ...]], shape: Shape, rank: int, ranks: int, over: str) -> Iterator[Run]:
    """The part of rank `rank` of so many; `over` names the size in an error."""

    def part_of(name: str, size: int) -> tuple[int, int]:
        if size % ranks:
            raise ValueError(f"{name}: size {size} does not split over {over}={ranks}")
        return rank * size // ranks, (rank + 1) * size // ranks

    match cut:
        case "whole":
            (name,) = hf
            yield Run(name, 0, -1)
        case "rows":
            for name, dims in hf.items():
                yield Run(name, *part_of(name, dims[0]))
        case "columns":
            for name, dims in hf.items():
                yield Run(name, *part_of(name, dims[1]))
        case "kv_heads":
            # Megatron keeps each KV head's queries, its key and its value together.
            for head in range(*part_of(f"KV heads of {next(iter(hf))}", shape.num_kv_heads)):
                for name, dims in hf.items():
                    rows = dims[0] // shape.num_kv_heads
                    yield Run(name, head * rows, (head + 1) * rows)
        case "vocabulary":
            ((name, (vocab_size, _)),) = hf.items()
            start, stop = part_of(name, padded_vocab_size(vocab_size, ranks))
            yield Run(name, min(start, vocab_size), min(stop, vocab_size))


def _hf_tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    embedding, norm, head = (_resolve(row, shape) for row in _MODEL_ROWS)
    yield from embedding.items()
    for layer in range(shape.num_layers):
        for row in _LAYER_ROWS:
            if row.when(shape, layer):
                yield from _resolve(row, shape, layer).items()
        for expert in range(shape.moe.num_experts if shape.moe and shape.has_experts(layer) else 0):
            for row in _EXPERT_ROWS:
                yield from _resolve(row, shape, layer, expert).items()
    yield from norm.items()
    if not shape.tied_embeddings:
        yield from head.items()


def num_parameters(shape: Shape) -> int:
    """Elements of the whole model; a tied output head counts once."""
    return sum(math.prod(size) for size in hf_tensor_shapes(shape).values())
