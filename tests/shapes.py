"""Shapes of models without weights."""

from __future__ import annotations

from pathlib import Path

from megatron_hapo.model.families import Shape
from megatron_hapo.sizing.command import shape_at

TINY = Shape(
    family="qwen3",
    num_layers=4,
    hidden_size=24,
    ffn_size=48,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    vocab_size=101,
    tied_embeddings=False,
    qk_norm=True,
    qkv_bias=False,
    norm_eps=1e-6,
    rope_base=1e6,
    max_positions=512,
)
QWEN3_8B = shape_at(Path(__file__).parent / "fixtures/hf_configs/Qwen--Qwen3-8B.json")
