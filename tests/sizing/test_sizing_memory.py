"""Compares the memory model with real Megatron ranks: their state, and the peak of a forward and backward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_hapo.config import ParallelSizes, parse_bytes
from megatron_hapo.model.families import read_shape
from megatron_hapo.resharding.layouts import engine_parameters
from megatron_hapo.sizing.memory import (
    ENGINE_RESTING_BYTES,
    ENGINE_STAGED_BYTES,
    GIB,
    GRAPH_BYTES_PER_LAYER,
    _attention_bytes,
    activation_bytes,
    decode_graph_bytes,
    engine_memory,
    head_bytes,
    kv_bytes_per_token,
    microbatches_in_flight,
    optimizer_bytes_per_element,
    optimizer_elements,
    trainer_memory,
    turns_on_shared_gpu,
)
from megatron_hapo.sizing.parameters import Layout, Recompute, model_parameters, stage_parameters
from tests.distributed import run_ranks
from tests.shapes import QWEN3_8B
from tests.tiny_families import write_family
from tests.tiny_model import write_tiny_qwen3
from tests.trainer.test_trainer import make_batch, make_config, make_grid

SIZES: dict[str, Any] = {"hidden": 256, "heads": 6, "kv_heads": 2, "head_dim": 32, "intermediate": 768}
"""The query heads are narrower than the hidden size, so that confusing the two in a formula fails a test."""
HELD = [
    {"tp": 2, "dtype": "bfloat16"},
    {"pp": 2, "dtype": "float32"},
    {"pp": 2, "vpp": 2, "model": "tied", "dtype": "bfloat16"},
    {"pp": 2, "first_stage_layers": 1, "dtype": "float32"},
    {"dp": 2, "dtype": "bfloat16"},
    {"dp": 2, "dtype": "bfloat16", "distributed_optimizer": False},
    {"dp": 2, "dtype": "float32"},
    {"tp": 2, "etp": 2, "model": "experts", "dtype": "bfloat16"},
    {"tp": 2, "ep": 2, "model": "experts", "dtype": "bfloat16"},
    {"tp": 2, "model": "experts", "dtype": "float32"},
]
"""Layouts of two ranks, with the model (default: dense and untied) and its dtype."""
EXPERTS = {"hidden_size": 256, "moe_intermediate_size": 96, "vocab_size": 1021}
SEQUENCE, SEQUENCES = 250, 4


def layout_of(case: dict[str, Any]) -> Layout:
    settings = {name: value for name, value in case.items() if name not in ("model", "dtype")}
    return layout_with(**settings, bytes_per_parameter=2 if case["dtype"] == "bfloat16" else 4)


def layout_with(**settings: Any) -> Layout:
    """A layout from its settings and its sizes, all as keywords."""
    sizes = {name: settings.pop(name) for name in ParallelSizes.model_fields if name in settings}
    return Layout(sizes=ParallelSizes(**sizes), **settings)


def bytes_held(rank: int, models: Path, cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Weights, gradients and optimizer state of this rank's real trainer after one update, for each layout."""
    from megatron.core import parallel_state

    from megatron_hapo.trainer.trainer_rank import TrainerRank

    def size(storages: dict[int, int]) -> int:
        return sum(storages.values())

    def storages(tensors: Any) -> dict[int, int]:
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    found = []
    for case in cases:
        layout = {name: value for name, value in case.items() if name not in ("model", "dtype")}
        config = make_config(models / case.get("model", "dense"), layout)
        config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"dtype": case["dtype"]})})
        trainer = TrainerRank(config, make_grid(config))
        batch = make_batch()
        trainer.update(
            replace(
                batch,
                old_log_probs=batch.rollout_log_probs - 5,
                token_data={"modulation": batch.rollout_log_probs},
            ),
            step=1,
        )
        parameters: list[Any] = [parameter for chunk in trainer.model for parameter in chunk.parameters()]
        weights = storages(p.data for p in parameters)
        gradients = storages(p.main_grad for p in parameters)
        optimizer = storages(_optimizer_tensors(trainer._optimizer))
        for key in (*weights, *gradients):
            optimizer.pop(key, None)
        found.append({"weights": size(weights), "gradients": size(gradients), "optimizer": size(optimizer)})
        parallel_state.destroy_model_parallel()
    return found


def _optimizer_tensors(optimizer: Any) -> Any:
    """Adam's moments and the master weights, wherever Megatron keeps them."""
    import torch

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        torch_optimizer = part.optimizer
        for group in torch_optimizer.param_groups:
            yield from (p.data for p in group["params"])
        for state in torch_optimizer.state.values():
            yield from (t for t in state.values() if isinstance(t, torch.Tensor) and t.numel() > 1)


def test_a_rank_holds_what_the_model_says(tmp_path: Path) -> None:
    for name, tied in (("dense", False), ("tied", True)):
        write_tiny_qwen3(tmp_path / name, layers=4, vocab_size=1021, tied=tied, **SIZES)
    write_family(tmp_path / "experts", "qwen3_moe", **EXPERTS)
    ranks = run_ranks(2, bytes_held, tmp_path, HELD, timeout_seconds=400)
    for number, case in enumerate(HELD):
        shape, layout = read_shape(tmp_path / case.get("model", "dense")), layout_of(case)
        for rank in range(2):
            stage = rank if layout.sizes.pp == 2 else 0
            parameters = stage_parameters(shape, layout, stage).total
            expected = {
                "weights": layout.bytes_per_parameter * parameters,
                "gradients": 4 * parameters,
                "optimizer": optimizer_bytes_per_element(layout) * optimizer_elements(shape, layout, stage),
            }
            assert ranks[rank][number] == pytest.approx(expected, rel=0.02), (case, rank)


def activation_peaks(rank: int, model_path: Path, cases: list[tuple[str, Recompute]]) -> list[float]:
    """Peak bytes of a forward and backward pass, besides parameters, gradients and logits."""
    import torch

    from megatron_hapo.model import parallel_layout
    from megatron_hapo.model.build import build_model
    from megatron_hapo.model.packed_attention import packed_params
    from tests.storage import PeakStorage

    grid = parallel_layout.initialize(ParallelSizes(), device=torch.device("cpu"), seed=0, timeout_seconds=60)
    shape, peaks = read_shape(model_path), []
    for dtype, recompute in cases:
        chunks: list[Any] = build_model(shape, grid, dtype=getattr(torch, dtype), recompute=recompute, spec="local")
        model = chunks[0].to(getattr(torch, dtype)).train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.05)
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.randint(0, shape.vocab_size, (1, SEQUENCE * SEQUENCES))
        positions = torch.arange(SEQUENCE).repeat(SEQUENCES)[None]
        boundaries = packed_params([SEQUENCE] * SEQUENCES, torch.device("cpu"), packed_format="rectangles")
        with PeakStorage() as peak:
            peak.include(*model.parameters(), *(parameter.grad for parameter in model.parameters()))
            held = peak.live_bytes
            logits = model(ids, positions, None, packed_seq_params=boundaries)
            logits_bytes = logits.nbytes
            logits.sum().backward()
        peaks.append(peak.peak_bytes - held - logits_bytes)
    return peaks


@pytest.mark.parametrize("layers", [1, 3])
def test_activations_are_what_the_model_says(tmp_path: Path, layers: int) -> None:
    path = write_tiny_qwen3(tmp_path, layers=layers, vocab_size=300, **SIZES)
    choices = get_args(Recompute)
    cases: list[tuple[str, Recompute]] = [(dtype, choice) for dtype in ("float32", "bfloat16") for choice in choices]
    for (dtype, recompute), measured in zip(cases, run_ranks(1, activation_peaks, path, cases)[0], strict=True):
        layout = Layout(
            recompute=recompute,
            tokens_per_microbatch=SEQUENCE * SEQUENCES,
            bytes_per_parameter=4 if dtype == "float32" else 2,
        )
        expected = activation_bytes(read_shape(path), layout, 0, in_flight=1, spec="local_cpu")
        assert measured == pytest.approx(expected, rel=0.15), (layers, dtype, recompute)


def test_qwen3_8b_has_its_published_size() -> None:
    """Qwen3-8B's model card: 8.2 billion parameters, 6.95 billion without embeddings."""
    assert model_parameters(QWEN3_8B) == 8_190_735_360
    without = model_parameters(QWEN3_8B) - 2 * 151936 * 4096
    assert round(without / 1e9, 2) == 6.95


@pytest.mark.parametrize(
    "layout", [layout_with(tp=4, pp=2), layout_with(tp=8), layout_with(pp=4), layout_with(tp=2, pp=9, dp=3)]
)
def test_the_ranks_of_a_layout_hold_the_whole_model(layout: Layout) -> None:
    """Norms are replicated on every tensor-parallel rank."""
    held = sum(stage_parameters(QWEN3_8B, layout, stage).total for stage in range(layout.sizes.pp)) * layout.sizes.tp
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    assert held - (layout.sizes.tp - 1) * norms == model_parameters(QWEN3_8B)


def test_tied_embeddings_are_copied_to_the_last_stage() -> None:
    shape = replace(QWEN3_8B, tied_embeddings=True)
    one = model_parameters(shape)
    two = sum(stage_parameters(shape, layout_with(pp=2), stage).total for stage in (0, 1))
    assert two - one == 151936 * 4096


def test_logits_take_two_and_three_quarter_bytes_per_element() -> None:
    layout = Layout(tokens_per_microbatch=16384)
    rows, hidden, vocabulary = 16384, 4096, 151936
    around = 2 * 2 * rows * hidden + 2 * vocabulary * hidden
    assert head_bytes(QWEN3_8B, layout, rows=rows) - around == pytest.approx(2.75 * rows * vocabulary)


def test_the_fused_head_takes_one_chunk_for_any_number_of_tokens() -> None:
    from megatron_hapo.logprobs.fused_head import CHUNK_BYTES

    layout = Layout(tokens_per_microbatch=131_072, output_head="fused")
    around = 2 * 2 * 131_072 * 4096
    assert head_bytes(QWEN3_8B, layout, rows=131_072) - around == pytest.approx(1.25 * CHUNK_BYTES)


def test_float32_logits_take_two_more_bytes_and_no_gradient_of_the_weight() -> None:
    from megatron_hapo.logprobs.fused_head import CHUNK_BYTES
    from megatron_hapo.logprobs.head_products import GRADIENT_CHUNK_BYTES

    rows, vocabulary = 16384, 151936
    around = 2 * 2 * rows * 4096
    layout = Layout(tokens_per_microbatch=rows, float32_logits=True)
    assert head_bytes(QWEN3_8B, layout, rows=rows) - around == pytest.approx(4.75 * rows * vocabulary)
    fused = replace(layout, output_head="fused")
    assert head_bytes(QWEN3_8B, fused, rows=rows) - around == pytest.approx(1.5 * CHUNK_BYTES)
    few = head_bytes(QWEN3_8B, layout, rows=512) - 2 * 2 * 512 * 4096
    assert few == pytest.approx(4 * 512 * vocabulary + GRADIENT_CHUNK_BYTES // 2)
    in_float32 = replace(layout, float32_logits=False, bytes_per_parameter=4)
    assert head_bytes(QWEN3_8B, replace(in_float32, float32_logits=True), rows=rows) == head_bytes(
        QWEN3_8B, in_float32, rows=rows
    )


def test_each_size_reduces_its_part() -> None:
    def parts(**settings: Any) -> Any:
        return trainer_memory(QWEN3_8B, layout_with(**settings), gpu_bytes=80 * GIB)

    whole = parts()
    assert parts(tp=2).weights == pytest.approx(whole.weights / 2, rel=0.001)
    assert parts(tp=2).activations < 0.6 * whole.activations
    assert parts(cp=2).activations == pytest.approx(whole.activations / 2, rel=0.001)
    assert parts(cp=2).optimizer == pytest.approx(whole.optimizer / 2, rel=0.001)
    assert parts(dp=8).optimizer == pytest.approx(whole.optimizer / 8, rel=0.001)
    assert parts(dp=8, distributed_optimizer=False).optimizer == whole.optimizer
    assert parts(recompute="full").activations < 0.1 * whole.activations
    none, selective, full = (parts(recompute=recompute).activations for recompute in ("none", "selective", "full"))
    assert full < selective < 0.7 * none
    # The first stage holds as many micro-batches as there are stages, so it saves no memory without recomputation.
    first = activation_bytes(QWEN3_8B, layout_with(pp=4), 0, in_flight=4, spec="te")
    assert first == pytest.approx(whole.activations, rel=0.05)


def test_an_interleaved_pipeline_holds_more() -> None:
    """Narayanan et al. (arXiv:2104.04473), section 2.2: 1 + (pp - 1) / (pp vpp) times as much on the first stage."""
    plain = [microbatches_in_flight(layout_with(pp=4), stage) for stage in range(4)]
    assert plain == [4, 3, 2, 1]
    interleaved = [microbatches_in_flight(layout_with(pp=4, vpp=2), stage) for stage in range(4)]
    assert interleaved == [5.5, 4.5, 3.5, 2.5]
    assert interleaved[0] / plain[0] == 1 + 3 / (4 * 2)
    assert microbatches_in_flight(layout_with(pp=4, vpp=2), 0, 4) == 4


def test_transformer_engine_saves_less_than_torch() -> None:
    activations = [
        trainer_memory(QWEN3_8B, Layout(), gpu_bytes=80 * GIB, spec=spec).activations
        for spec in ("te", "local", "local_cpu")
    ]
    assert activations == sorted(activations)


def test_an_engine_that_cannot_hold_the_weights_has_no_room() -> None:
    small = engine_memory(
        QWEN3_8B, tp=1, gpu_bytes=16 * GIB, memory_fraction=0.8, num_parameters=model_parameters(QWEN3_8B)
    )
    assert small.kv_tokens < 0
    assert small.kv_cache == 0
    large = engine_memory(
        QWEN3_8B, tp=2, gpu_bytes=80 * GIB, memory_fraction=0.8, num_parameters=model_parameters(QWEN3_8B)
    )
    assert large.total == 80 * GIB
    # 2 (keys and values) x 36 layers x 4 heads x 128 x 2 bytes
    assert large.kv_tokens == large.kv_cache // 73728


@pytest.mark.parametrize("tp", [1, 2])
def test_an_engine_in_float8_holds_a_byte_a_linear_weight_and_a_float32_a_row(tp: int) -> None:
    """Against the tensors of an engine rank, which follow from SGLang's rules; and what it saves is cache."""
    sizes = {"tp": tp, "gpu_bytes": 80 * GIB, "memory_fraction": 0.5, "num_parameters": model_parameters(QWEN3_8B)}
    plain, quantized = engine_memory(QWEN3_8B, **sizes), engine_memory(QWEN3_8B, **sizes, quantization="fp8")
    expected = 0
    for parameter in engine_parameters(QWEN3_8B, tp)[0]:
        elements = (parameter.rows - parameter.padding_rows) * parameter.columns
        in_float8 = parameter.name.endswith("_proj.weight")
        expected += elements + 4 * parameter.rows if in_float8 else 2 * elements
    # Norms, which every rank holds whole, are counted as if they were cut.
    assert quantized.weights == pytest.approx(expected, rel=1e-4)
    assert plain.kv_cache + plain.weights == quantized.kv_cache + quantized.weights
    assert quantized.kv_tokens == quantized.kv_cache // kv_bytes_per_token(QWEN3_8B, tp=tp)
    assert (plain.staged, plain.runtime) == (0, quantized.runtime)


def test_what_an_engine_stages_counts_in_the_turn_of_the_sync() -> None:
    """At most the limit and one matrix more, which for Qwen3-8B is gate and up; a small model is staged as a whole."""
    sizes = {"tp": 2, "gpu_bytes": 80 * GIB, "memory_fraction": 0.4, "num_parameters": model_parameters(QWEN3_8B)}
    plain, quantized = engine_memory(QWEN3_8B, **sizes), engine_memory(QWEN3_8B, **sizes, quantization="fp8")
    assert quantized.staged == ENGINE_STAGED_BYTES + 2 * 2 * 12_288 * 4096 // 2
    trainer = trainer_memory(QWEN3_8B, layout_with(tp=2), gpu_bytes=80 * GIB)
    turns, float8_turns = turns_on_shared_gpu(trainer, plain), turns_on_shared_gpu(trainer, quantized)
    saved = plain.weights - quantized.weights
    assert float8_turns["weight sync"] == turns["weight sync"] + quantized.staged - saved
    assert float8_turns["training"] == turns["training"]
    small = replace(QWEN3_8B, num_layers=1)
    linear = 4096 * (2 * 4096 + 2 * 1024 + 3 * 12_288)
    one = engine_memory(
        small, tp=1, gpu_bytes=80 * GIB, memory_fraction=0.4, num_parameters=model_parameters(small), quantization="fp8"
    )
    assert one.staged == 2 * linear


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 << 30), ("141GB", 141 * 10**9), ("1024", 1024), ("1.5 KiB", 1536), ("7B", 7)]
)
def test_memory_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80 gigs", "", "-1GiB", "GiB"])
def test_invalid_memory_sizes_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="80GiB or 141GB"):
        parse_bytes(text)


def test_local_attention_keeps_the_keys_that_a_ranks_queries_see() -> None:
    """At cp 2 rank 0's pieces see 1 and 4 of 4 chunks, rank 1's 2 and 3: 5 chunks for 2 chunks of queries."""
    w, q, k = 2, 32 * 128, 8 * 128

    def bytes_of(cp: int) -> float:
        return _attention_bytes(QWEN3_8B, layout_with(cp=cp), spec="local")

    assert bytes_of(1) == w * (2 * q + 2 * k)
    assert bytes_of(2) == w * (3 * q + 2 * k * 5 / 2)
    assert _attention_bytes(QWEN3_8B, layout_with(cp=2), spec="te") == w * (2 * q + 2 * k)


def test_decoding_graphs_count_in_what_a_resting_engine_holds() -> None:
    """36 sizes up to 256 requests, of 36 layers; and one pool with 256 rows of logits."""
    expected = 36 * 36 * GRAPH_BYTES_PER_LAYER + 256 * 151_936 * 6
    assert decode_graph_bytes(QWEN3_8B, tp=1, max_running_requests=1000) == expected
    assert decode_graph_bytes(QWEN3_8B, tp=1, max_running_requests=16) == (
        6 * 36 * GRAPH_BYTES_PER_LAYER + 16 * 151_936 * 6
    )
    engine = engine_memory(QWEN3_8B, tp=1, gpu_bytes=80 * GIB, memory_fraction=0.5, num_parameters=8 * 10**9)
    assert engine.resting() == ENGINE_RESTING_BYTES + expected
