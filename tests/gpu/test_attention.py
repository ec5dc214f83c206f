"""torch's attention for sequences of different lengths against its twin on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hapo.algorithm.microbatches import zigzag
from megatron_hapo.model.packed_attention import packed_params
from tests.model.test_packed_attention import SHARED_LENGTHS, SHARED_PREFIXES, lengths_for

pytestmark = pytest.mark.needs("megatron.core")


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_equals_its_twin(cp_size: int, head_dim: int) -> None:
    """The slices of context-parallel ranks."""
    lengths = lengths_for(cp_size)
    for rank in range(cp_size):
        own = torch.from_numpy(zigzag(lengths, cp_size=cp_size, cp_rank=rank))
        compare_with_twin(own, lengths, head_dim=head_dim, cp_size=cp_size, cp_rank=rank)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_equals_its_twin_where_sequences_share_a_prefix(head_dim: int) -> None:
    own = torch.arange(sum(SHARED_LENGTHS))
    compare_with_twin(own, SHARED_LENGTHS, head_dim=head_dim, prefixes=SHARED_PREFIXES)


def compare_with_twin(own: Tensor, lengths: list[int], *, head_dim: int, **packing: Any) -> None:
    """Outputs and gradients, in 16 bits against float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    host = [torch.randn(sum(lengths), heads, head_dim, generator=generator).bfloat16() for heads in (8, 2, 2)]
    weight, results = torch.randn(len(own), 8, head_dim, generator=generator), []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        query, key, value = (x.to(device, dtype).requires_grad_() for x in host)
        params = packed_params(lengths, torch.device(device), packed_format="varlen", **packing)
        attended = params.sequences.attend(query[own.to(device)], key, value, scale=None)
        (attended.float() * weight.to(device)).sum().backward()
        results.append([attended.detach(), *(x.grad for x in (query, key, value))])
    for mine, twin in zip(*results, strict=True):
        assert mine is not None
        error = (mine.float().cpu() - twin).norm() / twin.norm()
        assert float(error) < 0.02, packing


def test_preparing_a_micro_batch_never_waits_for_the_gpu() -> None:
    torch.zeros(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for packed_format in ("varlen", "rectangles", "thd"):
            packed_params(lengths_for(2), torch.device("cuda"), packed_format=packed_format, cp_size=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
