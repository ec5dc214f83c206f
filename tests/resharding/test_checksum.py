"""Checksums of weights, and the slices of them that engine ranks hold."""

from __future__ import annotations

import pytest
import torch

from megatron_hapo.resharding.checksum import add_checksums, block_checksum, engine_slices, tensor_checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_checksum_equals_a_slow_reference_for_any_chunk_size_and_strides(dtype):
    tensor = torch.arange(60).sub(30).to(dtype).reshape(5, 12)
    bits_type = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    expected = 0
    for i, bits in enumerate(tensor.flatten().view(bits_type).tolist()):
        expected += (bits + 1) * ((i * 0x9E3779B97F4A7C15 % 2**64) | 1)
    expected = (expected + 2**63) % 2**64 - 2**63
    for chunk in (1 << 20, 7, 1):
        assert tensor_checksum(tensor, chunk_elements=chunk) == expected
        assert tensor_checksum(tensor.t().contiguous().t(), chunk_elements=chunk) == expected


def test_a_changed_bit_a_permutation_and_a_longer_tensor_change_the_checksum():
    tensor = torch.randn(64, 64)
    sums = {tensor_checksum(tensor), tensor_checksum(tensor.t()), tensor_checksum(tensor.flip(0))}
    changed = tensor.clone()
    changed[63, 63] = torch.nextafter(changed[63, 63], torch.tensor(1e9))
    sums |= {tensor_checksum(changed), tensor_checksum(torch.zeros(8)), tensor_checksum(torch.zeros(9))}
    assert len(sums) == 6


@pytest.mark.parametrize("chunk", [1 << 20, 3])
def test_checksums_of_blocks_add_up_to_that_of_the_matrix(chunk):
    matrix = torch.randn(9, 11).to(torch.bfloat16)
    places = [(0, 0, 9, 4), (0, 4, 5, 7), (5, 4, 4, 7)]
    sums = [
        block_checksum(matrix[r : r + h, c : c + w], row=r, column=c, columns=11, chunk_elements=chunk)
        for r, c, h, w in places
    ]
    assert add_checksums(sums) == tensor_checksum(matrix)
    assert add_checksums(sums[:2]) != tensor_checksum(matrix)


def test_slices_concatenate_to_the_whole_tensor():
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
def test_the_vocabulary_is_sliced_after_padding(vocab, tp, rows):
    parts = engine_slices("lm_head.weight", torch.zeros(vocab, 1), tp=tp, num_heads=6, num_kv_heads=6)
    assert [len(p) for p in parts] == rows


def test_a_size_that_does_not_split_is_named():
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_proj.weight: 8 key/value heads do not split over tp=3"):
        engine_slices("model.layers.0.self_attn.k_proj.weight", torch.zeros(8, 3), tp=3, num_heads=9, num_kv_heads=8)


def test_whole_experts_are_on_one_rank_and_sliced_ones_on_all():
    tensor = torch.randn(8, 6)
    name = "model.layers.0.mlp.experts.5.gate_proj.weight"
    whole = engine_slices(name, tensor, tp=4, num_heads=4, num_kv_heads=4, ep=4, num_experts=8)
    assert [len(part) for part in whole] == [0, 0, 8, 0]
    assert tensor_checksum(whole[0]) == 0
    cut = engine_slices(name, tensor, tp=4, num_heads=4, num_kv_heads=4, ep=1, num_experts=8)
    assert torch.equal(torch.cat(cut), tensor)
    with pytest.raises(ValueError, match=r"6 experts do not split over ep=4"):
        engine_slices(name, tensor, tp=4, num_heads=4, num_kv_heads=4, ep=4, num_experts=6)
