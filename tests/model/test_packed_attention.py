"""Packed attention of one context-parallel rank after another, against plain attention of every sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hapo.algorithm.microbatches import padded_lengths, zigzag
from megatron_hapo.model.packed_attention import PackedFormat, local_format, packed_params
from tests.host_syncs import HostSyncs

CPU = torch.device("cpu")
LOCAL_FORMATS: list[PackedFormat] = ["rectangles", "varlen"]


def lengths_for(cp_size: int) -> list[int]:
    return padded_lengths(np.array([9, 40, 1, 17, 64, 33]), multiple=1, cp_size=cp_size)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention within each sequence, from the definition. [t, heads, d]"""
    repeats, outputs = query.shape[1] // key.shape[1], []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        forbidden = torch.ones(len(q), len(q)).triu(1) > 0
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(forbidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("packed_format", LOCAL_FORMATS)
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_every_slice_attends_as_whole_sequences_do(packed_format: PackedFormat, cp_size: int) -> None:
    """The slices' outputs, and the sum of their gradients."""
    lengths = lengths_for(cp_size)
    generator = torch.Generator().manual_seed(cp_size)
    query, key, value, weight = (
        torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2, 4)
    )
    expected = plain_attention(query, key, value, lengths)
    (expected * weight).sum().backward()
    expected_gradients = [x.grad.clone() for x in (query, key, value) if x.grad is not None]
    query.grad = key.grad = value.grad = None
    for rank in range(cp_size):
        own = torch.from_numpy(zigzag(lengths, cp_size=cp_size, cp_rank=rank))
        params = packed_params(lengths, CPU, packed_format=packed_format, cp_size=cp_size, cp_rank=rank)
        attended = params.sequences.attend(query[own], key, value, scale=None)
        torch.testing.assert_close(attended, expected[own])
        (attended * weight[own]).sum().backward()
    for x, gradient in zip((query, key, value), expected_gradients, strict=True):
        torch.testing.assert_close(x.grad, gradient)


SHARED_LENGTHS = [9, 40, 5, 17, 3, 1, 21, 33, 2]
SHARED_PREFIXES = [-1, -1, 0, 1, 0, 0, 1, -1, -1]


@pytest.mark.parametrize("packed_format", LOCAL_FORMATS)
def test_sequences_that_share_a_prefix_attend_to_it_as_whole_ones_do(packed_format: PackedFormat) -> None:
    """Outputs and gradients: each prefix has the sum of what its whole copies have."""
    starts = np.cumsum(SHARED_LENGTHS) - SHARED_LENGTHS
    whole = [
        [*range(starts[prefix], starts[prefix] + SHARED_LENGTHS[prefix])] * (prefix >= 0)
        + [*range(start, start + length)]
        for start, length, prefix in zip(starts, SHARED_LENGTHS, SHARED_PREFIXES, strict=True)
    ]
    places = torch.tensor([place for sequence in whole for place in sequence])
    ends = np.cumsum([len(sequence) for sequence in whole])
    own = torch.tensor(
        [place for end, length in zip(ends, SHARED_LENGTHS, strict=True) for place in range(end - length, end)]
    )
    generator = torch.Generator().manual_seed(7)
    query, key, value, weight = (
        torch.randn(sum(SHARED_LENGTHS), heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2, 4)
    )
    expected = plain_attention(query[places], key[places], value[places], [len(sequence) for sequence in whole])[own]
    expected_gradients = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    params = packed_params(SHARED_LENGTHS, CPU, packed_format=packed_format, prefixes=SHARED_PREFIXES)
    attended = params.sequences.attend(query, key, value, scale=None)
    torch.testing.assert_close(attended, expected)
    gradients = torch.autograd.grad((attended * weight).sum(), (query, key, value))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)
    positions = [np.arange(len(sequence))[-length:] for sequence, length in zip(whole, SHARED_LENGTHS, strict=True)]
    assert params.positions.tolist() == np.concatenate(positions).tolist()


@pytest.mark.parametrize("cp_size", [1, 2])
def test_tokens_have_their_positions_and_places(cp_size: int) -> None:
    lengths = lengths_for(cp_size)
    positions = torch.cat([torch.arange(length) for length in lengths])
    slices = [torch.from_numpy(zigzag(lengths, cp_size=cp_size, cp_rank=rank)) for rank in range(cp_size)]
    for rank, own in enumerate(slices):
        params = packed_params(lengths, CPU, packed_format="rectangles", cp_size=cp_size, cp_rank=rank)
        assert torch.equal(params.positions, positions[own])
        assert torch.equal(torch.cat(slices)[params.gathered_order], torch.arange(sum(lengths)))
        assert params.cu_seqlens_q.tolist() == [0, *np.cumsum(lengths)]


def test_transformer_engine_gets_boundaries_alone() -> None:
    """Masks of 32k tokens at cp 4 would take half a minute and a gigabyte; it has its own."""
    lengths = [32768]
    params = packed_params(lengths, CPU, packed_format="thd", cp_size=4)
    assert params.qkv_format == "thd"
    assert params.cu_seqlens_q.tolist() == [0, 32768]
    assert not hasattr(params, "sequences")
    assert not hasattr(params, "positions")


@pytest.mark.parametrize("packed_format", LOCAL_FORMATS)
def test_preparing_a_micro_batch_never_waits_for_the_device(packed_format: PackedFormat) -> None:
    with HostSyncs() as syncs:
        for rank in range(2):
            packed_params(lengths_for(2), CPU, packed_format=packed_format, cp_size=2, cp_rank=rank)
        packed_params(SHARED_LENGTHS, CPU, packed_format=packed_format, prefixes=SHARED_PREFIXES)
    assert not syncs.counts


def test_masks_are_made_on_the_device() -> None:
    """On the meta device only sizes exist, so that anything made on the host would be visible."""
    params = packed_params(lengths_for(2), torch.device("meta"), packed_format="rectangles", cp_size=2)
    assert {mask.device.type for mask in params.sequences.masks} == {"meta"}  # type: ignore[attr-defined]


def test_the_kernel_for_sequences_is_used_where_it_takes_the_model() -> None:
    gpu = torch.device("cuda", 0)
    assert local_format(gpu, torch.bfloat16, 128) == "varlen"
    assert local_format(gpu, torch.float32, 128) == "rectangles"
    assert local_format(gpu, torch.bfloat16, 260) == "rectangles"
    assert local_format(gpu, torch.bfloat16, 100) == "rectangles"
    assert local_format(torch.device("cpu"), torch.bfloat16, 128) == "rectangles"


def test_varlen_pieces_hold_each_query_once_and_the_keys_before_it() -> None:
    """A sequence of 8 on rank 0 of 2: queries 0 1 with keys 0 1, and queries 6 7 with keys 0 to 7."""
    params = packed_params([8], CPU, packed_format="varlen", cp_size=2, cp_rank=0)
    pieces = params.sequences
    assert pieces.query_boundaries.tolist() == [0, 2, 4]  # type: ignore[attr-defined]
    assert pieces.key_boundaries.tolist() == [0, 2, 10]  # type: ignore[attr-defined]
    assert pieces.keys.source.tolist() == [0, 1, *range(8)]  # type: ignore[attr-defined]


def test_counting_finds_what_waits() -> None:
    x = torch.arange(4.0)
    with HostSyncs() as syncs:
        float(x.sum())
        x.nonzero()
        x[x > 1]
        x.cpu()
        x.tolist()
        torch.tensor([1], device="cpu")
        x + F.relu(x)
        x[torch.arange(2)]
    assert sum(syncs.counts.values()) == 6
