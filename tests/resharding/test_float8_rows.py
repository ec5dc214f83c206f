"""Float8 with a scale a row: its bits, and parameters that are quantized while their pieces arrive."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hapo.model.families import hf_tensor_shapes, linear_tensors
from megatron_hapo.resharding import float8_rows
from megatron_hapo.resharding.channel_ends import ChannelId
from megatron_hapo.resharding.checksum import tensor_checksum
from megatron_hapo.resharding.expected import float8_checksums
from megatron_hapo.resharding.float8_rows import Float8Rows, empty_rows, quantize_rows
from megatron_hapo.resharding.plan import Piece
from megatron_hapo.resharding.staging import STAGED_BYTES, StagedMatrices
from megatron_hapo.resharding.weight_buckets import engine_cut
from megatron_hapo.sizing import memory
from tests.resharding.test_plan import MOE_SHAPE, SHAPE, random_tensors
from tests.resharding.test_transfer import Sides, make_transfer

LINEAR = ("qkv_proj.weight", "gate_up_proj.weight", "o_proj.weight", "down_proj.weight")


def float8_by_search(value: float) -> float:
    """The nearest of all e4m3 numbers; of two equally near ones the one with the even pattern."""
    patterns = torch.arange(256, dtype=torch.uint8)
    numbers = patterns.view(torch.float8_e4m3fn).double()
    distance = (numbers - value).abs().nan_to_num(float("inf"))
    nearest = [int(i) for i in (distance == distance.min()).nonzero()]
    return float(numbers[min(nearest, key=lambda pattern: pattern % 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_value_is_the_nearest_float8_number_on_its_rows_scale(dtype: torch.dtype) -> None:
    matrix = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix[1] *= 1e-6
    matrix[2] *= 1e6
    weight, scale = quantize_rows(matrix)
    assert (weight.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (6, 1))
    for row in range(6):
        largest = matrix[row].abs().max().float()
        assert scale[row, 0] == largest / 448
        assert weight[row].float().abs().max() == 448
        scaled = (matrix[row].float() / scale[row]).tolist()
        assert weight[row].float().tolist() == [float8_by_search(value) for value in scaled]


def test_zeros_and_the_extremes_of_bfloat16_stay_finite() -> None:
    largest, smallest = torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).tiny
    rows = [[0.0, -0.0, 0.0], [largest, -largest, 0.0], [smallest, -smallest, 0.0], [9.2e-41, 0.0, 0.0]]
    matrix = torch.tensor(rows).bfloat16()
    weight, scale = quantize_rows(matrix)
    assert scale[0] == 1
    assert weight[0].float().abs().max() == 0
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert weight.float().isfinite().all()
    assert weight[1].float().tolist() == [448, -448, 0]
    assert (weight[2].float() * scale[2]).tolist() == pytest.approx([smallest, -smallest, 0], rel=0.07)


def test_rows_do_not_depend_on_each_other_nor_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(50, 24).bfloat16()
    whole = quantize_rows(matrix)
    part = quantize_rows(matrix[7:31])
    assert_same_bits(part, Float8Rows(whole.weight[7:31], whole.scale[7:31]))
    monkeypatch.setattr(float8_rows, "_CHUNK_ELEMENTS", 5 * 24)
    assert_same_bits(quantize_rows(matrix), whole)


def test_the_result_can_be_written_where_an_engine_holds_it_transposed() -> None:
    matrix = torch.randn(10, 16)
    held, scale = torch.empty(10, 16, dtype=torch.float8_e4m3fn).t(), torch.empty(10, 1)
    quantize_rows(matrix, out=Float8Rows(held.t(), scale))
    assert_same_bits(Float8Rows(held.t(), scale), quantize_rows(matrix))


def assert_same_bits(got: Float8Rows, want: Float8Rows) -> None:
    assert torch.equal(got.weight.view(torch.uint8), want.weight.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)


def test_router_embedding_head_norms_and_biases_are_not_linear_weights() -> None:
    names = {name for name in hf_tensor_shapes(SHAPE) if not name.endswith("_proj.weight")}
    assert linear_tensors(SHAPE) == hf_tensor_shapes(SHAPE).keys() - names
    assert {name for name in linear_tensors(MOE_SHAPE) if ".mlp.gate." in name} == set()
    assert len([name for name in linear_tensors(MOE_SHAPE) if ".experts." in name]) == 3 * 8 * MOE_SHAPE.num_layers


# ----- parameters whose pieces arrive


def test_a_parameter_is_quantized_with_its_last_piece_and_staged_no_longer() -> None:
    source = torch.randn(6, 8).bfloat16()
    held = empty_rows((6, 8), torch.device("cpu"))
    matrices = StagedMatrices({"norm": torch.zeros(3, 1), "weight": held}, torch.bfloat16)
    pieces = [Piece("weight", *place) for place in ((0, 0, 3, 8), (3, 0, 3, 5), (3, 5, 3, 3))]
    for piece in pieces:
        assert matrices.staged_bytes == (0 if piece is pieces[0] else source.nbytes)
        block = (slice(piece.row, piece.row + piece.rows), slice(piece.column, piece.column + piece.columns))
        matrices["weight"][block] = source[block]
        matrices.written(piece)
    assert (matrices.staged_bytes, matrices.peak_bytes) == (0, source.nbytes)
    assert_same_bits(held, quantize_rows(source))
    assert list(matrices) == ["norm", "weight"]
    assert matrices.device_of("norm").type == "cpu"


def served(sides: Sides, *, limit_bytes: int) -> dict[tuple[int, int], dict[str, Tensor | Float8Rows]]:
    """Replaces the engine ranks' targets by staged ones; returns what they serve."""
    held: dict[tuple[int, int], dict[str, Tensor | Float8Rows]] = {}
    for key, targets in sides.targets.items():
        held[key] = {
            name: empty_rows((matrix.shape[0], matrix.shape[1]), matrix.device) if name.endswith(LINEAR) else matrix
            for name, matrix in targets.items()
        }
        sides.targets[key] = StagedMatrices(held[key], torch.bfloat16, limit_bytes=limit_bytes)  # type: ignore[assignment]
    return held


def assert_served(sides: Sides, held: Mapping[tuple[int, int], Mapping[str, Tensor | Float8Rows]]) -> None:
    for key, parameters in held.items():
        for name, want in sides.expected[key[1]].items():
            value = parameters[name]
            if isinstance(value, Tensor):
                assert torch.equal(value, want), name
            else:
                assert_same_bits(value, quantize_rows(want))


CASES = [
    {"tp": 1, "pp": 1, "dp": 1, "engine_tp": 1, "engines": 1},
    {"tp": 2, "pp": 2, "dp": 1, "engine_tp": 1, "engines": 1},
    {"tp": 1, "pp": 2, "dp": 2, "engine_tp": 2, "engines": 2},
    {"tp": 4, "pp": 1, "dp": 2, "engine_tp": 2, "engines": 1},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit_bytes", [0, STAGED_BYTES])
def test_engines_serve_float8_rows_and_their_checksums_match(
    tmp_path: Path, case: dict[str, int], limit_bytes: int
) -> None:
    sides = Sides(SHAPE, **case, dtype=torch.float32)  # type: ignore[arg-type]
    held = served(sides, limit_bytes=limit_bytes)
    sides.run(make_transfer(tmp_path))
    assert not sides.errors
    assert_served(sides, held)
    # The trainer's checksums of a down projection cut by columns and of queries, by hand.
    tensors = {
        name: torch.tensor(value).float().view(hf_tensor_shapes(SHAPE)[name])
        for name, value in random_tensors(SHAPE).items()
    }
    tp = case["engine_tp"]
    sums = float8_checksums(
        tensors.items(), linear=linear_tensors(SHAPE), cut=engine_cut(SHAPE, tp=tp, ep=1), dtype=torch.bfloat16
    )
    mlp, attention = "model.layers.0.mlp.", "model.layers.0.self_attn."
    for rank in range(tp):
        down, stacked = held[0, rank][f"{mlp}down_proj.weight"], held[0, rank][f"{attention}qkv_proj.weight"]
        assert isinstance(down, Float8Rows)
        assert isinstance(stacked, Float8Rows)
        queries = SHAPE.num_heads * SHAPE.head_dim // tp
        assert sums[f"{mlp}down_proj.weight"][rank] == tensor_checksum(down.weight)
        assert sums[f"{mlp}down_proj.weight_scale"][rank] == tensor_checksum(down.scale)
        assert sums[f"{attention}q_proj.weight"][rank] == tensor_checksum(stacked.weight[:queries])
        assert sums[f"{attention}q_proj.weight_scale"][rank] == tensor_checksum(stacked.scale[:queries])


def test_a_channel_that_runs_ahead_waits_so_that_little_is_staged(tmp_path: Path) -> None:
    """Rank 1 sends nothing until rank 0's channel can make no progress; without a limit, all would be staged."""
    peaks = []
    for limit_bytes in (STAGED_BYTES, 0):
        sides = Sides(SHAPE, tp=2, pp=1, dp=1, engine_tp=1, engines=1, dtype=torch.float32)
        held = served(sides, limit_bytes=limit_bytes)
        received, quiet = itertools.count(), threading.Event()

        def wait(channel: ChannelId, number: int, data: Tensor, quiet: threading.Event = quiet) -> None:
            if channel.source_rank == 1 and number == 0:
                quiet.wait(1.0)  # seconds in which rank 0 sends as much as it may

        sides.on_send, sides.on_receive = wait, lambda *_, received=received: next(received)
        sides.run(make_transfer(tmp_path))
        assert not sides.errors
        assert_served(sides, held)
        peaks.append(sides.targets[0, 0].peak_bytes)  # type: ignore[attr-defined]
    largest = 2 * max(value.weight.numel() for value in held[0, 0].values() if isinstance(value, Float8Rows))
    assert peaks[1] <= largest + 700 < peaks[0]  # one parameter, and a bucket of others


def test_the_planner_counts_what_is_staged() -> None:
    assert memory.ENGINE_STAGED_BYTES == STAGED_BYTES
