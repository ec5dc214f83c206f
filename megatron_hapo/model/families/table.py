"""The table that maps Megatron parameters to HF tensors, at any tensor- and expert-parallel size.

Every Megatron parameter on a rank is a concatenation, along one axis, of runs of rows (or columns) of HF tensors. The
table defines those runs. Import, export, resharding, the engines' layout and the sizing all iterate over it, so that a
parameter is described here and nowhere else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, assert_never

from megatron_hapo.model.families.shape import Shape, padded_vocab_size

Cut = Literal["whole", "rows", "columns", "kv_heads", "vocabulary"]
"""How tensor parallelism cuts a parameter: not at all; each HF tensor's rows (columns) evenly; whole KV heads with
their queries; rows of the padded vocabulary."""

Spec = Literal["te", "local"]
"""Whose layers the model has: Transformer Engine's, which fuse the norms into the linear layers, or our own."""


@dataclass(frozen=True)
class Run:
    """Rows (axis 0) or columns (axis 1) start..stop of an HF tensor."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class Placement:
    """A local Megatron parameter: these runs, one after the other along `axis`; the rest of it is padding."""

    axis: int | None
    """None: the whole HF tensor, on every tensor-parallel rank."""
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class FusedExpert:
    """Where a checkpoint that stacks a layer's experts stores one expert's tensor: tensor[expert, start:stop]."""

    tensor: str
    shape: tuple[int, ...]
    expert: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Row:
    """One row of the table."""

    megatron: tuple[str, ...]
    """Megatron's name: in the local spec, and in Transformer Engine's where that differs."""
    hf: dict[str, tuple[str, ...]]
    """The HF tensors in the order in which the parameter concatenates them, with their sizes (keys of `_sizes`)."""
    cut: Cut
    when: Callable[[Shape, int], bool] = lambda shape, layer: True
    """Whether a layer has the parameter."""


@dataclass(frozen=True)
class TableParameter:
    """A row of the table, applied to a model: one Megatron parameter before any parallelism cuts it."""

    local_name: str
    """Megatron's name in the local spec."""
    te_name: str
    """Megatron's name in Transformer Engine's spec."""
    tensors: dict[str, tuple[int, ...]]
    """Names and shapes of its HF tensors, in the order in which the parameter concatenates them."""
    cut: Cut

    def name(self, spec: Spec) -> str:
        """Megatron's name in this spec."""
        return self.te_name if spec == "te" else self.local_name

    @property
    def num_elements(self) -> int:
        """Elements of all its HF tensors, without vocabulary padding."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a linear layer of attention, of a feed-forward block or of an expert.

        That is what engines can hold in float8; router, embedding and output head stay as they are.
        """
        return self.cut in ("rows", "columns", "kv_heads") and all(len(size) == 2 for size in self.tensors.values())

    def num_local_elements(self, num_ranks: int) -> int:
        """Elements on one of the ranks that cut it (tp ranks; etp ranks for an expert), vocabulary padding included."""
        match self.cut:
            case "whole":
                return self.num_elements
            case "vocabulary":
                ((vocab_size, hidden_size),) = self.tensors.values()
                return padded_vocab_size(vocab_size, num_ranks) // num_ranks * hidden_size
            case "rows" | "columns" | "kv_heads":
                return self.num_elements // num_ranks
            case _:
                assert_never(self.cut)


def _dense(shape: Shape, layer: int) -> bool:
    return not shape.has_experts(layer)


_EMBEDDING = _Row(
    ("embedding.word_embeddings.weight",), {"model.embed_tokens.weight": ("vocab", "hidden")}, "vocabulary"
)
_FINAL_NORM = _Row(("decoder.final_layernorm.weight",), {"model.norm.weight": ("hidden",)}, "whole")
_OUTPUT_LAYER = _Row(("output_layer.weight",), {"lm_head.weight": ("vocab", "hidden")}, "vocabulary")

# Names are relative to decoder.layers.N (Megatron) and model.layers.N (HF).
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
        _dense,
    ),
    _Row(
        ("pre_mlp_layernorm.weight",), {"post_attention_layernorm.weight": ("hidden",)}, "whole", Shape.has_experts
    ),  # Transformer Engine fuses no norm into the experts
    _Row(
        ("mlp.linear_fc1.weight",),
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
        "rows",
        _dense,
    ),
    _Row(("mlp.linear_fc2.weight",), {"mlp.down_proj.weight": ("hidden", "ffn")}, "columns", _dense),
    _Row(("mlp.router.weight",), {"mlp.gate.weight": ("experts", "hidden")}, "whole", Shape.has_experts),
)

# {} stands for the expert: its number on the rank in Megatron's names, its number in the model in HF's.
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

_MODEL_BY_NAME = {name: row for row in (_EMBEDDING, _FINAL_NORM, _OUTPUT_LAYER) for name in row.megatron}
_LAYER_BY_NAME: dict[str, list[_Row]] = {}
for _row in (*_LAYER_ROWS, *_EXPERT_ROWS):
    for _name in _row.megatron:
        _LAYER_BY_NAME.setdefault(_name, []).append(_row)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_MEGATRON_EXPERT = re.compile(r"(?<=local_experts\.)\d+|(?<=mlp\.experts\.linear_fc\d\.weight)\d+")
_HF_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def is_expert(name: str) -> bool:
    """Whether a Megatron parameter belongs to an expert: distributed over ep, and cut over etp instead of tp."""
    return ".mlp.experts." in name


def is_hf_expert(tensor: str) -> bool:
    """Whether an HF tensor belongs to an expert."""
    return _HF_EXPERT.fullmatch(tensor) is not None


def first_parameters(shape: Shape) -> tuple[TableParameter, ...]:
    """Parameters that come before the layers, on the first pipeline stage."""
    return (_apply(_EMBEDDING, shape),)


@lru_cache(maxsize=512)  # the sizing asks for each layer again and again
def layer_parameters(shape: Shape, layer: int) -> tuple[TableParameter, ...]:
    """Parameters of a layer (numbered in the whole model), without those of its experts; in the order of the table."""
    return tuple(_apply(row, shape, layer) for row in _LAYER_ROWS if row.when(shape, layer))


def expert_parameters(shape: Shape, layer: int, *, expert: int, local_expert: int) -> tuple[TableParameter, ...]:
    """Parameters of one expert of a layer; none in a layer without experts.

    Args:
        expert: its number in the model.
        local_expert: its number on the rank that holds it, which Megatron's names contain.
    """
    return tuple(_apply(row, shape, layer, expert, local_expert) for row in _EXPERT_ROWS if row.when(shape, layer))


def last_parameters(shape: Shape) -> tuple[TableParameter, ...]:
    """Parameters that come after the layers, on the last pipeline stage; a tied output head is not repeated."""
    rows = (_FINAL_NORM,) if shape.tied_embeddings else (_FINAL_NORM, _OUTPUT_LAYER)
    return tuple(_apply(row, shape) for row in rows)


def table_parameters(
    shape: Shape, layers: Sequence[int], *, first: bool, last: bool, ep: int = 1
) -> Iterator[TableParameter]:
    """Parameters that a rank of a pipeline stage holds, its layers numbered in the whole model.

    Args:
        first, last: whether it is the first and the last stage.
        ep: expert-parallel size. The experts are those of expert-parallel rank 0; Megatron's names are the same on all.
    """
    yield from first_parameters(shape) if first else ()
    for layer in layers:
        yield from layer_parameters(shape, layer)
        num_experts = shape.moe.num_experts // ep if shape.moe is not None and shape.has_experts(layer) else 0
        for expert in range(num_experts):
            yield from expert_parameters(shape, layer, expert=expert, local_expert=expert)
    yield from last_parameters(shape) if last else ()


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
    """Which runs of which HF tensors the local parameter `name` consists of.

    Args:
        name: Megatron's parameter name on the rank, e.g. decoder.layers.0.mlp.linear_fc1.weight.
        first_layer: number in the whole model of the model chunk's layer 0.
        ep_rank, ep_size: expert-parallel rank r of n holds the r-th of n equal ranges of experts.
        etp_rank, etp_size: rank and number of the ranks over which each expert is cut, as all else is over tp.
    Raises:
        KeyError: the table does not contain the parameter, or this model does not have it.
        ValueError: the model does not split over the layout.
    """
    row, hf = _find(name, shape, first_layer=first_layer, ep_rank=ep_rank, ep_size=ep_size)
    axis = {"whole": None, "columns": 1}.get(row.cut, 0)
    rank, size, size_name = (etp_rank, etp_size, "etp") if is_expert(name) else (tp_rank, tp_size, "tp")
    return Placement(axis, tuple(_runs(row.cut, hf, shape, rank, size, size_name)))


def hf_tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the HF checkpoint, in checkpoint order; each expert has its own tensors."""
    return dict(_hf_tensor_shapes(shape))


@lru_cache(maxsize=8)
def linear_tensors(shape: Shape) -> frozenset[str]:
    """Names of the HF tensors of all parameters that are `TableParameter.is_linear`."""
    parameters = table_parameters(shape, range(shape.num_layers), first=True, last=True)
    return frozenset(name for parameter in parameters if parameter.is_linear for name in parameter.tensors)


def num_parameters(shape: Shape) -> int:
    """Elements of the whole model, without vocabulary padding; a tied output head counts once."""
    return sum(math.prod(size) for size in hf_tensor_shapes(shape).values())


def fused_expert(tensor: str, shape: Shape) -> FusedExpert | None:
    """Where a checkpoint with stacked experts (transformers 5) stores this expert tensor; None for any other tensor."""
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
    rows = _LAYER_BY_NAME[_MEGATRON_EXPERT.sub("{}", inner)]
    row = next((row for row in rows if row.when(shape, layer)), None)
    if row is None:
        raise KeyError(f"{name}: layer {layer} of this {shape.family} model has no such parameter")
    if expert is None:
        return row, _resolve(row, shape, layer)
    assert shape.moe is not None
    if shape.moe.num_experts % ep_size:
        raise ValueError(f"{name}: {shape.moe.num_experts} experts do not split over ep={ep_size}")
    return row, _resolve(row, shape, layer, ep_rank * (shape.moe.num_experts // ep_size) + int(expert[0]))


def _apply(
    row: _Row, shape: Shape, layer: int | None = None, expert: int | None = None, local_expert: int | None = None
) -> TableParameter:
    prefix = "" if layer is None else f"decoder.layers.{layer}."
    local_name, te_name = (prefix + row.megatron[index].format(local_expert) for index in (0, -1))
    return TableParameter(local_name, te_name, _resolve(row, shape, layer, expert), row.cut)


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


def _runs(
    cut: Cut, hf: dict[str, tuple[int, ...]], shape: Shape, rank: int, num_ranks: int, size_name: str
) -> Iterator[Run]:
    """The runs that one of `num_ranks` ranks holds; `size_name` (tp or etp) appears in errors."""

    def part_of(name: str, size: int) -> tuple[int, int]:
        if size % num_ranks:
            raise ValueError(f"{name}: size {size} does not split over {size_name}={num_ranks}")
        return rank * size // num_ranks, (rank + 1) * size // num_ranks

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
            start, stop = part_of(name, padded_vocab_size(vocab_size, num_ranks))
            yield Run(name, min(start, vocab_size), min(stop, vocab_size))
        case _:
            assert_never(cut)


def _hf_tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    for parameter in table_parameters(shape, range(shape.num_layers), first=True, last=True):
        yield from parameter.tensors.items()
