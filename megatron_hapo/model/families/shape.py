"""The sizes and switches of a model, read from its HF config.json; unsupported features are rejected by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hapo.config import ParallelSizes
from megatron_hapo.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rescaling of the rotary frequencies, under HF's names."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class MoeShape:
    """The mixture-of-experts part of a model."""

    num_experts: int
    ffn_size: int
    """Feed-forward size of one expert."""
    top_k: int
    normalize_top_k: bool
    """Whether the weights of the chosen experts are divided by their sum."""
    dense_layers: frozenset[int]
    """Layers that have an ordinary feed-forward block (of Shape.ffn_size) instead of experts."""


@dataclass(frozen=True)
class Shape:
    """What a model's parameter layout and its forward pass depend on, from HF's config."""

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
    rope_scaling: RopeScaling | None = None
    moe: MoeShape | None = None

    def has_experts(self, layer: int) -> bool:
        """Whether this layer has experts instead of an ordinary feed-forward block."""
        return self.moe is not None and layer not in self.moe.dense_layers


def read_shape(model_path: Path) -> Shape:
    """The shape in a model folder's config.json.

    Raises:
        ConfigError: there is no such folder or no config.json in it, a key is missing, or the model has a feature that
            this project cannot train, which the error names.
    """
    path = model_path / "config.json"
    if not path.is_file():
        raise ConfigError([f"model.path: no config.json in {model_path}; it must be a Hugging Face model folder"])
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError([f"model.path: {path} is not JSON: {error}"]) from error
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise ConfigError([f"model.path: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}"])
    try:
        faults = [f"model.path: {path}: {fault}" for fault in _unsupported(config)]
        if faults:
            raise ConfigError(faults)
        return FAMILIES[family](config)
    except KeyError as error:
        raise ConfigError([f"model.path: {path} has no {error.args[0]}"]) from error


def layout_faults(shape: Shape, sizes: ParallelSizes) -> Iterator[tuple[str, str]]:
    """Why the model does not split over a layout, as (name of the size, message); empty where it does."""
    tp = sizes.tp
    parts = {
        "attention heads": shape.num_heads,
        "key-value heads": shape.num_kv_heads,
        "feed-forward units": shape.ffn_size,
    }
    for what, count in parts.items():
        if count % tp:
            yield "tp", f"{count} {what} do not split over tp={tp}"
    yield from sizes.faults(shape.num_layers)
    for name, size in (("ep", sizes.ep), ("etp", sizes.etp)):
        if shape.moe is None and size > 1:
            yield name, f"{name}={size}, but the model has no experts (model_type {shape.family})"
    if shape.moe is not None and shape.moe.num_experts % sizes.ep:
        yield "ep", f"{shape.moe.num_experts} experts do not split over ep={sizes.ep}"
    if shape.moe is not None and shape.moe.ffn_size % sizes.etp:
        yield "etp", f"{shape.moe.ffn_size} feed-forward units of an expert do not split over etp={sizes.etp}"


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary size, rounded up to a multiple of tp."""
    return -(-vocab_size // tp_size) * tp_size


def _unsupported(config: dict[str, Any]) -> Iterator[str]:
    """Features that the config asks for and this project does not support."""
    if _slides(config):
        yield "sliding-window attention (sliding_window, use_sliding_window, layer_types) is not supported"
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act {config['hidden_act']!r} is not supported (silu is)"
    for switch in ("attention_dropout", "attention_bias", "mlp_bias"):
        if config.get(switch):
            yield f"{switch} is not supported"
    if config.get("quantization_config"):
        yield "quantization_config: quantized weights cannot be trained; use the original checkpoint"
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "llama3"):
        yield f"rope type {rope['rope_type']!r} is not supported (default and llama3 are)"
    if float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        yield "partial_rotary_factor is not supported"


def _slides(config: dict[str, Any]) -> bool:
    """Whether some layer attends to less than the whole sequence."""
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        return True
    if config["model_type"] != "mistral":
        return bool(config.get("use_sliding_window"))
    window = config.get("sliding_window", 4096)  # transformers' default if the key is missing
    return window is not None and window < config["max_position_embeddings"]


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters (transformers 5), or rope_theta and rope_scaling (older configs), under the new names."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def _rope_scaling(config: dict[str, Any]) -> RopeScaling | None:
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=rope["original_max_position_embeddings"],
    )


def _decoder(config: dict[str, Any], *, qk_norm: bool = False, qkv_bias: bool = False) -> Shape:
    """The architecture that all families share: pre-norm RMSNorm, rotary grouped-query attention, gated SiLU MLP."""
    return Shape(
        family=config["model_type"],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        tied_embeddings=config.get("tie_word_embeddings", False),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        norm_eps=config["rms_norm_eps"],
        rope_base=float(_rope(config)["rope_theta"]),
        max_positions=config["max_position_embeddings"],
        rope_scaling=_rope_scaling(config),
    )


def _qwen2(config: dict[str, Any]) -> Shape:
    return _decoder(config, qkv_bias=True)


def _qwen3(config: dict[str, Any]) -> Shape:
    # transformers' default is 128, not hidden_size / num_heads
    return _decoder({"head_dim": 128, **config}, qk_norm=True)


def _qwen3_moe(config: dict[str, Any]) -> Shape:
    shape = _decoder(config, qk_norm=True)
    # transformers 5 writes num_local_experts for num_experts
    num_experts = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    moe = MoeShape(
        num_experts=num_experts,
        ffn_size=config["moe_intermediate_size"],
        top_k=config["num_experts_per_tok"],
        normalize_top_k=config.get("norm_topk_prob", False),
        dense_layers=frozenset(i for i in range(shape.num_layers) if i in dense or (i + 1) % step),
    )
    return Shape(**{**vars(shape), "moe": moe})


FAMILIES: dict[str, Callable[[dict[str, Any]], Shape]] = {
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "llama": _decoder,
    "mistral": _decoder,
}
"""The reader of a config.json, by its model_type."""
