"""What a model family is: one table from Megatron parameters to HF tensors, for import, export and resharding.

Every Megatron parameter on a rank is a concatenation, along one axis, of runs of rows (or columns) of HF tensors. The
table gives those runs for any tensor-parallel size; whoever moves weights only follows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hapo.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its parameter layout depends on, and what its forward pass needs, from HF's config."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    norm_eps: float
    rope_base: float
    max_positions: int


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


def read_shape(model_path: Path) -> Shape:
    """The shape in a model folder's config.json.

    Raises:
        ConfigError: no such folder, no config.json, or a model that this project cannot train, by name.
    """
    path = model_path / "config.json"
    if not path.is_file():
        raise ConfigError([f"model.path: no config.json in {model_path}; it must be a Hugging Face model folder"])
    config = json.loads(path.read_text())
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError([f"model.path: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}"])
    faults = [f"model.path: {path}: {fault}" for fault in _unsupported(config)]
    if faults:
        raise ConfigError(faults)
    return FAMILIES[family](config)


def _unsupported(config: dict[str, Any]) -> list[str]:
    faults = []
    if config.get("use_sliding_window"):
        faults.append("use_sliding_window is not supported")
    if config.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act {config['hidden_act']!r} is not supported (silu is)")
    if config.get("attention_dropout"):
        faults.append("attention_dropout is not supported")
    rope_type = _rope(config).get("rope_type", "default")
    if rope_type != "default":
        faults.append(f"rope type {rope_type!r} is not supported (default is)")
    return faults


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters (transformers 5), or rope_theta with rope_scaling (older configs)."""
    scaling = config.get("rope_scaling") or {}
    old = {"rope_theta": config.get("rope_theta", 10000.0), **scaling}
    if "type" in old:
        old["rope_type"] = old.pop("type")
    return config.get("rope_parameters") or old


def _qwen3(config: dict[str, Any]) -> Shape:
    return Shape(
        family="qwen3",
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        tied_embeddings=config.get("tie_word_embeddings", False),
        qk_norm=True,
        qkv_bias=config.get("attention_bias", False),
        norm_eps=config["rms_norm_eps"],
        rope_base=float(_rope(config)["rope_theta"]),
        max_positions=config["max_position_embeddings"],
    )


FAMILIES: dict[str, Callable[[dict[str, Any]], Shape]] = {"qwen3": _qwen3}
"""HF model_type to the reader of its config."""


# One row for each parameter of a layer: Megatron's name (both layer specs), HF's name or names, how they lie.
_LAYER_TABLE: dict[str, tuple[str | tuple[str, ...], str]] = {
    "input_layernorm.weight": ("input_layernorm.weight", "whole"),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight", "whole"),
    "self_attention.linear_qkv.weight": (
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
    ),
    "self_attention.linear_qkv.bias": (
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "qkv",
    ),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", "whole"),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", "whole"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", "attention_columns"),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", "whole"),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight", "whole"),
    "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight", "ffn_columns"),
}

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def placement(name: str, shape: Shape, *, first_layer: int, tp_rank: int, tp_size: int) -> Placement:
    """Where the local parameter `name` comes from.

    Args:
        name: Megatron's parameter name on the rank, e.g. decoder.layers.0.mlp.linear_fc1.weight.
        first_layer: global index of the model chunk's layer 0.
    Raises:
        KeyError: a parameter that the table does not know.
    """
    match = _LAYER.fullmatch(name)
    if match:
        hf_names, layout = _LAYER_TABLE[match[2]]
        prefix = f"model.layers.{first_layer + int(match[1])}."
        hf = tuple(prefix + hf_name for hf_name in ((hf_names,) if isinstance(hf_names, str) else hf_names))
    else:
        head = "model.embed_tokens.weight" if shape.tied_embeddings else "lm_head.weight"
        hf_name, layout = {
            "embedding.word_embeddings.weight": ("model.embed_tokens.weight", "vocabulary"),
            "output_layer.weight": (head, "vocabulary"),
            "decoder.final_layernorm.weight": ("model.norm.weight", "whole"),
        }[name]
        hf = (hf_name,)
    axis = {"whole": None, "attention_columns": 1, "ffn_columns": 1}.get(layout, 0)
    return Placement(axis, _runs(layout, hf, shape, tp_rank, tp_size))


def _runs(layout: str, hf: tuple[str, ...], shape: Shape, tp_rank: int, tp_size: int) -> tuple[Run, ...]:
    def slice_of(size: int) -> tuple[int, int]:
        if size % tp_size:
            raise ValueError(f"{hf[0]}: size {size} does not split over tp={tp_size}")
        return tp_rank * size // tp_size, (tp_rank + 1) * size // tp_size

    match layout:
        case "whole":
            return (Run(hf[0], 0, -1),)
        case "qkv":
            # Megatron keeps each KV head's queries, its key and its value together.
            first, last = slice_of(shape.num_kv_heads)
            q_rows = shape.num_heads // shape.num_kv_heads * shape.head_dim
            runs = []
            for group in range(first, last):
                for tensor, rows in zip(hf, (q_rows, shape.head_dim, shape.head_dim), strict=True):
                    runs.append(Run(tensor, group * rows, (group + 1) * rows))
            return tuple(runs)
        case "gate_up":
            return tuple(Run(tensor, *slice_of(shape.ffn_size)) for tensor in hf)
        case "attention_columns":
            return (Run(hf[0], *slice_of(shape.num_heads * shape.head_dim)),)
        case "ffn_columns":
            return (Run(hf[0], *slice_of(shape.ffn_size)),)
        case "vocabulary":
            start, stop = slice_of(padded_vocab_size(shape.vocab_size, tp_size))
            return (Run(hf[0], min(start, shape.vocab_size), min(stop, shape.vocab_size)),)
    raise AssertionError(f"unknown layout {layout}")


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary rounded up to a multiple of tp."""
    return -(-vocab_size // tp_size) * tp_size


def hf_tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the HF checkpoint, in checkpoint order."""
    hidden, q_size, kv_size = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        layer_shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_size, hidden),
            "self_attn.k_proj.weight": (kv_size, hidden),
            "self_attn.v_proj.weight": (kv_size, hidden),
            "self_attn.o_proj.weight": (hidden, q_size),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (shape.ffn_size, hidden),
            "mlp.up_proj.weight": (shape.ffn_size, hidden),
            "mlp.down_proj.weight": (hidden, shape.ffn_size),
        }
        if shape.qk_norm:
            layer_shapes |= {"self_attn.q_norm.weight": (shape.head_dim,), "self_attn.k_norm.weight": (shape.head_dim,)}
        if shape.qkv_bias:
            for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
                layer_shapes[f"self_attn.{name}_proj.bias"] = (size,)
        shapes |= {prefix + name: size for name, size in layer_shapes.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not shape.tied_embeddings:
        shapes["lm_head.weight"] = (shape.vocab_size, hidden)
    return shapes
