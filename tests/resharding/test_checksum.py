"""Checksums of weights and the slices that engine ranks hold."""

from __future__ import annotations

import pytest
import torch

from megatron_hapo.resharding import checksum
from megatron_hapo.resharding.checksum import add_checksums, block_checksum, engine_slices, tensor_checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_equals_a_slow_reference_whatever_the_chunks_and_strides(monkeypatch, dtype):
    tensor = torch.arange(60).sub(30).to(dtype).reshape(5, 12)
    bits_type = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    expected = 0
    for i, bits in enumerate(tensor.flatten().view(bits_type).tolist()):
        expected += (bits + 1) * ((i * 0x9E3779B97F4A7C15 % 2**64) | 1)
    expected = (expected + 2**63) % 2**64 - 2**63
    for chunk in (1 << 20, 7, 1):
        monkeypatch.setattr(checksum, "_CHUNK", chunk)
        assert tensor_checksum(tensor) == expected
        assert tensor_checksum(tensor.t().contiguous().t()) == expected


def test_a_changed_bit_a_swap_and_a_longer_tensor_show():
    tensor = torch.randn(64, 64)
    sums = {tensor_checksum(tensor), tensor_checksum(tensor.t()), tensor_checksum(tensor.flip(0))}
    changed = tensor.clone()
    changed[63, 63] = torch.nextafter(changed[63, 63], torch.tensor(1e9))
    sums |= {tensor_checksum(changed), tensor_checksum(torch.zeros(8)), tensor_checksum(torch.zeros(9))}
    assert len(sums) == 6


@pytest.mark.parametrize("chunk", [1 << 20, 3])
def test_blocks_add_up_to_the_whole(monkeypatch, chunk):
    monkeypatch.setattr(checksum, "_CHUNK", chunk)
    matrix = torch.randn(9, 11).to(torch.bfloat16)
    places = [(0, 0, 9, 4), (0, 4, 5, 7), (5, 4, 4, 7)]
    sums = [block_checksum(matrix[r : r + h, c : c + w], row=r, column=c, columns=11) for r, c, h, w in places]
    assert add_checksums(sums) == tensor_checksum(matrix)
    assert add_checksums(sums[:2]) != tensor_checksum(matrix)


def test_slices_rejoin_to_the_whole():
    for name, dim in (("q_proj", 0), ("k_proj", 0), ("gate_proj", 0), ("o_proj", 1), ("down_proj", 1)):
        tensor = torch.randn(16, 24)
        parts = engine_slices(f"model.layers.0.x.{name}.weight", tensor, tp=4, num_heads=8, num_kv_heads=4)
        assert torch.equal(torch.cat(parts, dim), tensor), name


def test_key_value_heads_are_replicated_and_norms_are_whole():
    tensor = torch.randn(8, 3)
    parts = engine_slices("model.layers.0.self_attn.v_proj.weight", tensor, tp=4, num_heads=8, num_kv_heads=2)
    assert [torch.equal(p, tensor[:4]) for p in parts] == [True, True, False, False]
    assert all(p is tensor for p in engine_slices("model.norm.weight", tensor, tp=4, num_heads=8, num_kv_heads=2))


@pytest.mark.parametrize(("vocab", "tp", "rows"), [(262, 2, [160, 102]), (320, 2, [160, 160]), (262, 3, [128, 128, 6])])
def test_vocabulary_is_cut_after_padding(vocab, tp, rows):
    parts = engine_slices("lm_head.weight", torch.zeros(vocab, 1), tp=tp, num_heads=6, num_kv_heads=6)
    assert [len(p) for p in parts] == rows


def test_what_does_not_split_is_named():
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_proj.weight: attention heads over tp: 8 .* over 3"):
        engine_slices("model.layers.0.self_attn.k_proj.weight", torch.zeros(8, 3), tp=3, num_heads=9, num_kv_heads=8)


def test_whole_experts_lie_on_one_rank_and_cut_ones_on_all():
    tensor = torch.randn(8, 6)
    name = "model.layers.0.mlp.experts.5.gate_proj.weight"
    whole = engine_slices(name, tensor, tp=4, num_heads=4, num_kv_heads=4, ep=4, num_experts=8)
    assert [len(part) for part in whole] == [0, 0, 8, 0]
    assert tensor_checksum(whole[0]) == 0
    cut = engine_slices(name, tensor, tp=4, num_heads=4, num_kv_heads=4, ep=1, num_experts=8)
    assert torch.equal(torch.cat(cut), tensor)
    with pytest.raises(ValueError, match=r"experts over ep: 6 does not split over 4"):
        engine_slices(name, tensor, tp=4, num_heads=4, num_kv_heads=4, ep=4, num_experts=6)
