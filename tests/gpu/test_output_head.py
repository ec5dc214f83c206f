"""The output heads on a GPU: the Triton kernel, and matrix products that accumulate into a float32 buffer."""

from __future__ import annotations

import pytest
import torch

from megatron_hapo.logprobs import vocab_parallel_log_probs_and_entropy
from megatron_hapo.logprobs.fused_head import fused_log_probs_and_entropy
from tests.logprobs.test_fused_head import MAX_GRADIENT_ERROR, in_buffer, make_case
from tests.logprobs.test_logprobs import relative_error
from tests.logprobs.test_row_statistics import (
    compare_entropy_with_twin,
    compare_gradient_with_twin,
    compare_with_twin,
)


def test_the_kernels_equal_their_torch_references() -> None:
    compare_with_twin("cuda")
    compare_gradient_with_twin("cuda")
    compare_entropy_with_twin("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fused_head_agrees_with_the_function_on_logits(dtype: torch.dtype) -> None:
    case = make_case(777, 151_936 // 8, 256, dtype)
    hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N = (tensor.cuda() for tensor in case)
    results = []
    for fused in (True, False):
        hidden, weight = hidden_NH.clone().requires_grad_(), in_buffer(weight_VH.clone())
        if fused:
            outputs = fused_log_probs_and_entropy(
                hidden, weight, targets_N, temperature=temperatures_N, chunk_bytes=100 * len(weight) * dtype.itemsize
            )
        else:
            outputs = vocab_parallel_log_probs_and_entropy(hidden @ weight.t(), targets_N, temperature=temperatures_N)
        (outputs[0] * weights_2N[0] + outputs[1] * weights_2N[1]).sum().backward()
        results.append((*outputs, hidden.grad, weight.main_grad if fused else weight.grad))
    for mine, other in zip(*results, strict=True):
        # The two round the gradients of the weight and of the logits independently.
        assert relative_error(mine.detach(), other.detach().double()) < 2 * MAX_GRADIENT_ERROR[dtype]


def test_the_fused_head_needs_the_memory_of_one_chunk() -> None:
    hidden_NH, weight_VH, targets_N, *_ = (tensor.cuda() for tensor in make_case(4096, 32_768, 256, torch.bfloat16))
    hidden_NH, weight, chunk_bytes = hidden_NH.requires_grad_(), in_buffer(weight_VH), 16 << 20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    given = torch.cuda.memory_allocated()
    log_probs_N, entropies_N = fused_log_probs_and_entropy(hidden_NH, weight, targets_N, chunk_bytes=chunk_bytes)
    (log_probs_N.sum() + entropies_N.sum()).backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - given
    # There are sixteen chunks. cuBLAS allocates its own work space at its first call.
    assert extra < 1.5 * chunk_bytes + hidden_NH.numel() * 2 + 256 * len(hidden_NH) + (64 << 20)
