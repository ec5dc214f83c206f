"""The family table: every element of every tensor is placed exactly once, at any tensor-parallel size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_hapo.config import ParallelSizes
from megatron_hapo.errors import ConfigError
from megatron_hapo.model.families import (
    MoeShape,
    Spec,
    hf_tensor_shapes,
    padded_vocab_size,
    placement,
    read_shape,
    table,
    table_parameters,
)
from megatron_hapo.resharding.layouts import engine_parameters, matrix_sizes
from megatron_hapo.resharding.plan import make_plan
from megatron_hapo.sizing.parameters import Layout, stage_parameters
from tests.resharding.planned_grid import trainer_shards
from tests.shapes import TINY

SHAPE = replace(TINY, num_layers=2, hidden_size=48, ffn_size=96, head_dim=16)
LAYER_PARAMETERS = {
    "local": ["input_layernorm.weight", "pre_mlp_layernorm.weight"],
    "te": ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"],
}
COMMON = [
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
]


def parameters(spec: str) -> list[str]:
    layers = [f"decoder.layers.{i}.{name}" for i in range(2) for name in LAYER_PARAMETERS[spec] + COMMON]
    return ["embedding.word_embeddings.weight", *layers, "decoder.final_layernorm.weight", "output_layer.weight"]


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_element_is_placed_once(spec: str, tp_size: int) -> None:
    counts = {name: np.zeros(shape, dtype=int) for name, shape in hf_tensor_shapes(SHAPE).items()}
    for name in parameters(spec):
        for tp_rank in range(tp_size):
            place = placement(name, SHAPE, first_layer=0, tp_rank=tp_rank, tp_size=tp_size)
            for run in place.runs:
                if place.axis is None:
                    counts[run.tensor] += tp_rank == 0  # replicated
                elif place.axis == 0:
                    counts[run.tensor][run.start : run.stop] += 1
                else:
                    counts[run.tensor][:, run.start : run.stop] += 1
    for name, count in counts.items():
        assert (count == 1).all(), name


@pytest.mark.parametrize("spec", ["local", "te"])
def test_the_table_lists_the_parameters_of_a_stage(spec: Spec) -> None:
    whole = [parameter.name(spec) for parameter in table_parameters(SHAPE, range(2), first=True, last=True)]
    assert sorted(whole) == sorted(parameters(spec))
    layers = [parameter.name(spec) for parameter in table_parameters(SHAPE, [1], first=False, last=False)]
    assert sorted(layers) == sorted(name for name in whole if ".layers.1." in name)
    tied = replace(SHAPE, tied_embeddings=True)
    last = [parameter.name(spec) for parameter in table_parameters(tied, [], first=False, last=True)]
    assert last == ["decoder.final_layernorm.weight"]


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("spec", ["local", "te"])
def test_listed_parameters_have_a_place_of_their_size(spec: Spec, ep: int) -> None:
    """One layer with experts and one without; norms are fused into the linear layers of the latter only."""
    moe = MoeShape(num_experts=8, ffn_size=24, top_k=2, normalize_top_k=True, dense_layers=frozenset({1}))
    shape, sizes = replace(SHAPE, moe=moe), hf_tensor_shapes(SHAPE) | hf_tensor_shapes(replace(SHAPE, moe=moe))
    listed = list(table_parameters(shape, range(2), first=True, last=True, ep=ep))
    assert sum(".experts." in parameter.local_name for parameter in listed) == 2 * 8 // ep
    for parameter in listed:
        place = placement(
            parameter.name(spec), shape, first_layer=0, tp_rank=1, tp_size=2, ep_size=ep, etp_rank=1, etp_size=2
        )
        elements = 0
        for run in place.runs:
            size = sizes[run.tensor]
            rows = size[place.axis or 0] if place.axis is None else run.stop - run.start
            elements += rows * math.prod(size) // size[place.axis or 0]
        padding = SHAPE.hidden_size if parameter.cut == "vocabulary" else 0  # 101 rows become 102
        assert parameter.num_local_elements(2) == elements + padding, parameter


def test_a_new_row_reaches_all_that_is_derived_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that docs/families.md is right: besides the table, a new parameter touches only shape.py and build.py or
    layers.py."""
    name, tensor = "self_attention.linear_proj.bias", "model.layers.1.self_attn.o_proj.bias"
    row = table._Row((name,), {"self_attn.o_proj.bias": ("hidden",)}, "whole")
    monkeypatch.setattr(table, "_LAYER_ROWS", (*table._LAYER_ROWS, row))
    monkeypatch.setitem(table._LAYER_BY_NAME, name, [row])
    shape = replace(SHAPE, family="new")  # not in a cache
    assert hf_tensor_shapes(shape).keys() - hf_tensor_shapes(SHAPE).keys() >= {tensor}
    added = 2 * SHAPE.hidden_size
    for stage in range(2):
        counts = [stage_parameters(s, Layout(sizes=ParallelSizes(tp=2, pp=2)), stage).total for s in (SHAPE, shape)]
        assert counts[1] - counts[0] == added // 2
    engine = engine_parameters(shape, 2)
    assert all(tensor in {parameter.name for parameter in parameters} for parameters in engine)
    shards = trainer_shards(shape, ParallelSizes(tp=2), spec="local")
    assert all(f"decoder.layers.1.{name}" in {parameter.name for parameter in shard.parameters} for shard in shards)
    make_plan(
        shards, engine, matrix_sizes(shape), engines=1, itemsize=4, max_copy_bytes=4096
    )  # every element has a source


def test_layers_count_from_the_pipeline_stage() -> None:
    place = placement("decoder.layers.1.mlp.linear_fc2.weight", SHAPE, first_layer=7, tp_rank=0, tp_size=1)
    assert place.runs[0].tensor == "model.layers.8.mlp.down_proj.weight"


def test_qkv_keeps_each_kv_head_with_its_queries() -> None:
    place = placement("decoder.layers.0.self_attention.linear_qkv.weight", SHAPE, first_layer=0, tp_rank=1, tp_size=2)
    assert [(run.tensor.split(".")[-2], run.start, run.stop) for run in place.runs[:3]] == [
        ("q_proj", 64, 96),
        ("k_proj", 32, 48),
        ("v_proj", 32, 48),
    ]


def test_vocabulary_padding_is_part_of_no_tensor() -> None:
    assert padded_vocab_size(101, 4) == 104
    last = placement("output_layer.weight", SHAPE, first_layer=0, tp_rank=3, tp_size=4)
    assert (last.runs[0].start, last.runs[0].stop) == (78, 101)


def test_a_parameter_missing_from_the_table_is_rejected() -> None:
    with pytest.raises(KeyError):
        placement("decoder.layers.0.mlp.experts.weight", SHAPE, first_layer=0, tp_rank=0, tp_size=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"use_sliding_window": True}, "sliding-window attention"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"model_type": "mistral", "sliding_window": 1024}, "sliding-window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_unsupported_features_are_named(
    tiny_qwen3: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = json.loads((tiny_qwen3 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=message):
        read_shape(tmp_path)


def test_mistral_with_a_window_as_long_as_its_positions_is_accepted(tiny_qwen3: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_qwen3 / "config.json").read_text()) | {"model_type": "mistral"}
    for window in (None, config["max_position_embeddings"]):
        (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
        assert read_shape(tmp_path).family == "mistral"


def test_each_expert_is_on_one_expert_parallel_rank() -> None:
    moe = MoeShape(num_experts=8, ffn_size=24, top_k=2, normalize_top_k=True, dense_layers=frozenset({1}))
    shape = replace(SHAPE, moe=moe)

    def place(name: str, layer: int = 0, **sizes: int):
        return placement(f"decoder.layers.{layer}.mlp.{name}", shape, first_layer=0, tp_rank=1, tp_size=2, **sizes)

    for name in ("experts.local_experts.3.linear_fc1.weight", "experts.linear_fc1.weight3"):
        assert [
            (run.tensor.split("mlp.")[1], run.start, run.stop) for run in place(name, ep_rank=1, ep_size=2).runs
        ] == [
            ("experts.7.gate_proj.weight", 0, 24),
            ("experts.7.up_proj.weight", 0, 24),
        ]
    assert place("linear_fc2.weight", layer=1).runs[0].stop == 96
    with pytest.raises(KeyError, match="layer 0 of this qwen3 model has no such parameter"):
        place("linear_fc2.weight")
    with pytest.raises(ValueError, match="8 experts do not split over ep=3"):
        place("experts.local_experts.0.linear_fc2.weight", ep_size=3)


def test_old_and_new_rope_settings_give_the_same_shape(tiny_qwen3: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_qwen3 / "config.json").read_text())
    config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5, "rope_scaling": None}))
    assert read_shape(tmp_path).rope_base == 5e5
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    )
    assert read_shape(tmp_path).rope_base == 5e5
