"""Logits of bfloat16 weights in float32: both heads against exact products, their gradients, memory, two ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hapo.logprobs import head_products
from megatron_hapo.logprobs.output_head import FusedHead, LogitsHead, OutputHead, ScoredTokens
from tests.distributed import run_ranks
from tests.logprobs.test_fused_head import by_float64, in_buffer, make_case
from tests.logprobs.test_logprobs import relative_error
from tests.storage import PeakStorage

HEADS = (LogitsHead, FusedHead)


def large_case(rows: int = 37, vocab: int = 1000, hidden: int = 64) -> tuple[Tensor, ...]:
    """A case in bfloat16 with logits of standard deviation 9, many of them above 16, as trained models have."""
    hidden_NH, weight_VH, *rest = make_case(rows, vocab, hidden, torch.bfloat16)
    return hidden_NH, 3 * weight_VH, *rest


def make_head(kind: type[OutputHead], **settings: Any) -> OutputHead:
    return kind(entropy_gradient=True, **{"tp_group": None, "vocab_size": 1000, "float32_logits": True, **settings})


def score(head: OutputHead, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperatures_N: Tensor) -> Tensor:
    """Log-probs and entropies. [2, N]"""
    layer = SimpleNamespace(
        sequence_parallel=False, weight=weight_VH, gradient_accumulation_fusion=False, tp_group=dist.group.WORLD
    )
    tokens = ScoredTokens(torch.arange(len(hidden_NH)), targets_N, (temperatures_N,))
    (scores,) = head(hidden_states=hidden_NH[:, None], output_layer=layer, output_weight=None, context=tokens)
    return scores


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("buffered", [False, True])
def test_values_are_those_of_exact_products_and_gradients_are_rounded_once(
    kind: type[OutputHead], buffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N = large_case()
    exact = by_float64(hidden_NH.double(), weight_VH.double(), targets_N, temperatures_N, weights_2N)
    rounded = by_float64(
        hidden_NH.double(), weight_VH.double(), targets_N, temperatures_N, weights_2N, rounding=torch.bfloat16
    )
    monkeypatch.setattr(head_products, "GRADIENT_CHUNK_BYTES", 10 * 1000 * 4)  # four parts
    chunks = {"chunk_bytes": 10 * 1000 * 4} if kind is FusedHead else {}
    hidden_NH.requires_grad_()
    weight: Any = in_buffer(weight_VH) if buffered else weight_VH.requires_grad_()
    scores = score(make_head(kind, **chunks), hidden_NH, weight, targets_N, temperatures_N)
    (scores * weights_2N).sum().backward()
    torch.testing.assert_close(scores.detach().double(), torch.stack(exact[:2]), rtol=4e-6, atol=1e-5)
    of_weight = weight.main_grad if buffered else weight.grad
    for got, wanted, nearest in zip((hidden_NH.grad, of_weight), exact[2:], rounded[2:], strict=True):
        assert relative_error(got, wanted) < 1.05 * relative_error(nearest, wanted)


@pytest.mark.parametrize("kind", HEADS)
def test_logits_rounded_to_bfloat16_are_noise_in_log_probs(kind: type[OutputHead]) -> None:
    """What the setting saves: two orders of magnitude and more, at logits of standard deviation 9."""
    hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N = large_case()
    exact = by_float64(hidden_NH.double(), weight_VH.double(), targets_N, temperatures_N, weights_2N)
    errors = [
        (score(make_head(kind, float32_logits=wide), hidden_NH, weight_VH, targets_N, temperatures_N) - exact[0])[0]
        .abs()
        .mean()
        for wide in (False, True)
    ]
    assert errors[0] > 0.01
    assert errors[1] < 1e-4 * errors[0]


@pytest.mark.parametrize("kind", HEADS)
def test_only_the_logits_are_wide(kind: type[OutputHead]) -> None:
    """Beside them a part of their gradient is rounded at a time; a converted weight would be another half of them."""
    rows, vocab, hidden = 64, 8192, 16
    hidden_NH, weight_VH, targets_N, temperatures_N, _ = make_case(rows, vocab, hidden, torch.bfloat16)
    weight, hidden_NH = in_buffer(weight_VH), hidden_NH.requires_grad_()
    chunk_bytes = 4 * vocab * 4
    head = make_head(kind, vocab_size=vocab, **({"chunk_bytes": chunk_bytes} if kind is FusedHead else {}))
    logits_bytes = chunk_bytes if kind is FusedHead else rows * vocab * 4
    with PeakStorage() as storage:
        storage.include(hidden_NH, weight, weight.main_grad, targets_N, temperatures_N)
        given = storage.live_bytes
        score(head, hidden_NH, weight, targets_N, temperatures_N).sum().backward()
    block = 4 * hidden * vocab // head_products.WEIGHT_BLOCKS
    beside = 3 * hidden_NH.numel() * 4 + 256 * rows + 2 * block
    assert storage.peak_bytes - given <= 1.75 * logits_bytes + beside


def check_sharded(rank: int) -> None:
    """Shards of the weight, the last one padded, give the whole weight's results and gradients."""
    group = dist.group.WORLD
    hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N = large_case()
    exact = by_float64(hidden_NH.double(), weight_VH.double(), targets_N, temperatures_N, weights_2N)
    padded_VH = torch.zeros(1024, 64, dtype=torch.bfloat16)
    padded_VH[:1000] = weight_VH
    for kind in HEADS:
        hidden, shard = hidden_NH.clone().requires_grad_(), padded_VH[rank * 512 :][:512].clone().requires_grad_()
        scores = score(make_head(kind, tp_group=group), hidden, shard, targets_N, temperatures_N)
        (scores * weights_2N).sum().backward()
        torch.testing.assert_close(scores.detach().double(), torch.stack(exact[:2]), rtol=4e-6, atol=1e-5)
        assert hidden.grad is not None
        assert shard.grad is not None
        # The logits' gradient, both ranks' parts and their sum are rounded.
        assert relative_error(hidden.grad, exact[2]) < 4e-3
        real = max(0, min(512, 1000 - rank * 512))
        assert relative_error(shard.grad[:real], exact[3][rank * 512 :][:real]) < 4e-3
        assert not shard.grad[real:].any()


def test_two_ranks_equal_one() -> None:
    run_ranks(2, check_sharded)
