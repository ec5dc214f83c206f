"""The sizes and switches of a model, read from its HF config.json; unsupported features are rejected by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_hapo.config import ParallelSizes
from megatron_hapo.errors import ConfigError
from megatron_hapo.model.families.config_json import ModelConfig, read_model_config
from megatron_hapo.types import RouteFormat

# Several times what the largest known models have: beyond them a number is a typing error, and would cost memory and
# time wherever layers and experts are listed.
_MAX_LAYERS = 1024
_MAX_WIDTH = 1 << 24
_MAX_HEADS = 1 << 14
_MAX_HEAD_DIM = 1 << 12
_MAX_POSITIONS = (1 << 31) - 1
_MAX_EXPERTS = 1 << 12
_MAX_EXPERTS_OF_ALL_LAYERS = 1 << 17


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

    @property
    def routes(self) -> RouteFormat | None:
        """How the experts of its tokens are stored; None without experts."""
        if self.moe is None:
            return None
        layers = tuple(layer for layer in range(self.num_layers) if self.has_experts(layer))
        return RouteFormat(
            num_layers=self.num_layers, expert_layers=layers, num_experts=self.moe.num_experts, top_k=self.moe.top_k
        )


def read_shape(model_path: Path) -> Shape:
    """The shape in a model folder's config.json.

    Raises:
        ConfigError: there is no such folder or no config.json in it, a key is missing, or the model has a feature that
            this project cannot train, which the error names.
    """
    path = model_path / "config.json"
    try:
        found = path.is_file()
    except (OSError, ValueError):  # e.g. no permission to look into the folder
        found = False
    if not found:
        raise ConfigError([f"model.path: no config.json in {model_path}; it must be a Hugging Face model folder"])
    return shape_of(read_model_config(path))


def shape_of(config: ModelConfig) -> Shape:
    """The shape that a config.json describes.

    Raises:
        ConfigError: a key is missing or its value invalid, or the model has a feature that this project cannot train.
    """
    family = config.text("model_type", "none")
    if family not in FAMILIES:
        given = family if config.has("model_type") else None
        raise ConfigError([f"model.path: model_type {given!r} is not supported; supported: {', '.join(FAMILIES)}"])
    if faults := [config.fault(fault).faults[0] for fault in _unsupported(config)]:
        raise ConfigError(faults)
    return FAMILIES[family](config)


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


def _unsupported(config: ModelConfig) -> Iterator[str]:
    """Features that the config asks for and this project does not support."""
    if _slides(config):
        yield "sliding-window attention (sliding_window, use_sliding_window, layer_types) is not supported"
    if (activation := config.text("hidden_act", "silu")) not in ("silu", "swish"):
        yield f"hidden_act {activation!r} is not supported (silu is)"
    if config.number("attention_dropout", 0.0, low=0, high=1):
        yield "attention_dropout is not supported"
    for switch in ("attention_bias", "mlp_bias"):
        if config.flag(switch, default=False):
            yield f"{switch} is not supported"
    for key in ("dtype", "torch_dtype"):  # the engine and transformers read them
        config.text(key, "float32")
    if config.section("quantization_config"):
        yield "quantization_config: quantized weights cannot be trained; use the original checkpoint"
    rope, kind = _rope(config)
    if kind not in ("default", "llama3"):
        yield f"rope type {kind!r} is not supported (default and llama3 are)"
    of_model = config.number("partial_rotary_factor", 1.0, low=0, high=1)
    if rope.number("partial_rotary_factor", of_model, low=0, high=1) != 1.0:
        yield "partial_rotary_factor is not supported"


def _slides(config: ModelConfig) -> bool:
    """Whether some layer attends to less than the whole sequence."""
    if any(kind != "full_attention" for kind in config.strings("layer_types")):
        return True
    if config.text("model_type") != "mistral":
        return config.flag("use_sliding_window", default=False)
    config = config.with_default("sliding_window", 4096)  # transformers' default if the key is missing
    if not config.has("sliding_window"):
        return False
    return config.integer("sliding_window", high=_MAX_POSITIONS) < _max_positions(config)


def _max_positions(config: ModelConfig) -> int:
    return config.integer("max_position_embeddings", high=_MAX_POSITIONS)


def _rope(config: ModelConfig) -> tuple[ModelConfig, str]:
    """rope_parameters (transformers 5) or rope_scaling (older configs), and the rope type; without either, the config
    itself, which then has no rope type."""
    section = config.section("rope_parameters") or config.section("rope_scaling")
    if section is None:
        return config, "default"
    return section, section.text("rope_type", section.text("type", "default"))


def _rope_base(config: ModelConfig) -> float:
    """The base of the rotary frequencies: from the section, else from the config itself."""
    of_model = config.number("rope_theta", 10000.0, low=1, high=1e12)
    return _rope(config)[0].number("rope_theta", of_model, low=1, high=1e12)


def _rope_scaling(config: ModelConfig) -> RopeScaling | None:
    rope, kind = _rope(config)
    if kind != "llama3":
        return None
    scaling = RopeScaling(
        factor=rope.number("factor", low=1, high=1e6),
        low_freq_factor=rope.number("low_freq_factor", low=1e-6, high=1e6),
        high_freq_factor=rope.number("high_freq_factor", low=1e-6, high=1e6),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", high=_MAX_POSITIONS),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise rope.fault(
            f"low_freq_factor must be less than high_freq_factor={scaling.high_freq_factor:g}, "
            f"got {scaling.low_freq_factor:g}"
        )
    return scaling


def _decoder(config: ModelConfig, *, qk_norm: bool = False, qkv_bias: bool = False) -> Shape:
    """The architecture that all families share: pre-norm RMSNorm, rotary grouped-query attention, gated SiLU MLP."""
    hidden_size = config.integer("hidden_size", high=_MAX_WIDTH)
    num_heads = config.integer("num_attention_heads", high=_MAX_HEADS)
    num_kv_heads = config.integer("num_key_value_heads", num_heads, high=_MAX_HEADS)
    if num_heads % num_kv_heads:
        raise config.fault(f"num_key_value_heads must divide num_attention_heads={num_heads}, got {num_kv_heads}")
    if not config.has("head_dim") and hidden_size % num_heads:
        raise config.fault(f"num_attention_heads must divide hidden_size={hidden_size}, got {num_heads}")
    head_dim = config.integer("head_dim", hidden_size // num_heads, high=_MAX_HEAD_DIM)
    if head_dim % 2:
        raise config.fault(f"head_dim must be even for rotary embeddings, got {head_dim}")
    return Shape(
        family=config.text("model_type"),
        num_layers=config.integer("num_hidden_layers", high=_MAX_LAYERS),
        hidden_size=hidden_size,
        ffn_size=config.integer("intermediate_size", high=_MAX_WIDTH),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=config.integer("vocab_size", high=_MAX_WIDTH),
        tied_embeddings=config.flag("tie_word_embeddings", default=False),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        norm_eps=config.number("rms_norm_eps", low=0, high=1),
        rope_base=_rope_base(config),
        max_positions=_max_positions(config),
        rope_scaling=_rope_scaling(config),
    )


def _qwen2(config: ModelConfig) -> Shape:
    return _decoder(config, qkv_bias=True)


def _qwen3(config: ModelConfig) -> Shape:
    # transformers' default is 128, not hidden_size / num_heads
    return _decoder(config.with_default("head_dim", 128), qk_norm=True)


def _qwen3_moe(config: ModelConfig) -> Shape:
    shape = _decoder(config, qk_norm=True)
    # transformers 5 writes num_local_experts for num_experts
    num_experts = config.integer("num_experts" if config.has("num_experts") else "num_local_experts", high=_MAX_EXPERTS)
    if num_experts * shape.num_layers > _MAX_EXPERTS_OF_ALL_LAYERS:
        raise config.fault(
            f"num_hidden_layers * experts must be at most {_MAX_EXPERTS_OF_ALL_LAYERS}, "
            f"got {shape.num_layers} * {num_experts}"
        )
    step = config.integer("decoder_sparse_step", 1, high=_MAX_LAYERS)
    dense = config.integers("mlp_only_layers", low=0, high=_MAX_LAYERS)
    moe = MoeShape(
        num_experts=num_experts,
        ffn_size=config.integer("moe_intermediate_size", high=_MAX_WIDTH),
        top_k=config.integer("num_experts_per_tok", high=num_experts),
        normalize_top_k=config.flag("norm_topk_prob", default=False),
        dense_layers=frozenset(i for i in range(shape.num_layers) if i in dense or (i + 1) % step),
    )
    return Shape(**{**vars(shape), "moe": moe})


FAMILIES: dict[str, Callable[[ModelConfig], Shape]] = {
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "llama": _decoder,
    "mistral": _decoder,
}
"""The reader of a config.json, by its model_type."""
