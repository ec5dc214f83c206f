"""The fused output head against float64 and the function on logits; its memory; two ranks; Megatron's buffers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hapo.logprobs import fused_head, vocab_parallel_log_probs_and_entropy
from megatron_hapo.logprobs.fused_head import fused_log_probs_and_entropy, fused_scores
from tests.distributed import run_ranks
from tests.logprobs.test_logprobs import by_autograd, count_all_reduces, relative_error
from tests.storage import PeakStorage

MAX_GRADIENT_ERROR = {torch.bfloat16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-12}


def make_case(rows: int, vocab: int, hidden: int, dtype: torch.dtype, *, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight (logits of standard deviation 3), targets, temperatures, weights of both outputs."""
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(rows, hidden, generator=generator, dtype=torch.float64).to(dtype)
    weight_VH = (torch.randn(vocab, hidden, generator=generator, dtype=torch.float64) * 3 / hidden**0.5).to(dtype)
    targets_N = torch.randint(0, vocab, (rows,), generator=generator)
    temperatures_N = torch.rand(rows, generator=generator) + 0.5
    weights_2N = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    return hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N


def by_float64(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float | torch.Tensor,
    weights_2N: torch.Tensor,
    *,
    rounding: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies, and the gradients of hidden states and weight, from logits in the dtype of the arguments.

    With `rounding` the gradient of the logits, and both results of the products with it, are rounded to that dtype.
    """
    log_probs, entropies, gradient_NV = by_autograd(hidden_NH @ weight_VH.t(), targets_N, temperature, weights_2N)
    gradient_NV = gradient_NV.to(rounding).double()
    gradients = gradient_NV @ weight_VH.double(), gradient_NV.t() @ hidden_NH.double()
    return log_probs, entropies, *(gradient.to(rounding).double() for gradient in gradients)


# ----- one rank


@pytest.mark.parametrize("dtype", MAX_GRADIENT_ERROR)
@pytest.mark.parametrize(("rows", "vocab"), [(37, 1000), (5, 1000), (1, 300), (33, 7)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "per token"])
@pytest.mark.parametrize("chunk_rows", [1, 10, 1000])
def test_values_and_gradients_equal_float64(rows, vocab, temperature, chunk_rows, dtype):
    hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N = make_case(rows, vocab, 48, dtype)
    given = temperatures_N if temperature == "per token" else temperature
    want = by_float64(hidden_NH, weight_VH, targets_N, given, weights_2N)
    rounded = by_float64(hidden_NH, weight_VH, targets_N, given, weights_2N, rounding=dtype)
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_()
    log_probs, entropies = fused_log_probs_and_entropy(
        hidden_NH, weight_VH, targets_N, temperature=given, chunk_bytes=chunk_rows * vocab * dtype.itemsize
    )
    (log_probs * weights_2N[0] + entropies * weights_2N[1]).sum().backward()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 4e-6}
    torch.testing.assert_close(log_probs.detach().double(), want[0], **tolerance)
    torch.testing.assert_close(entropies.detach().double(), want[1], **tolerance)
    for leaf, gradient, nearest in zip((hidden_NH, weight_VH), want[2:], rounded[2:], strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        # The logits' gradient and the result are both rounded, which alone can exceed the limit in bfloat16.
        assert relative_error(leaf.grad, gradient) < max(
            MAX_GRADIENT_ERROR[dtype], 1.05 * relative_error(nearest, gradient)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_agrees_with_the_function_on_logits(dtype):
    """With log-probs alone, whose gradient takes another branch, and with padding."""
    hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N = make_case(50, 600, 32, dtype)
    targets_N %= 590
    results = []
    for fused in (True, False):
        hidden, weight = hidden_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
        if fused:
            outputs = fused_log_probs_and_entropy(
                hidden, weight, targets_N, temperature=temperatures_N, vocab_size=590, chunk_bytes=8000
            )
        else:
            outputs = vocab_parallel_log_probs_and_entropy(
                hidden @ weight.t(), targets_N, temperature=temperatures_N, vocab_size=590
            )
        (outputs[0] * weights_2N[0]).sum().backward()
        results.append((*outputs, hidden.grad, weight.grad))
    for mine, other in zip(*results, strict=True):
        assert relative_error(mine.detach(), other.detach().double()) < MAX_GRADIENT_ERROR[dtype]


def test_scores_at_several_temperatures_come_from_one_product_per_chunk(monkeypatch):
    product = fused_head.head_product
    hidden_NH, weight_VH, targets_N, temperatures_N, _ = make_case(20, 300, 16, torch.float32)
    products = []
    monkeypatch.setattr(
        fused_head, "head_product", lambda *args, **kwargs: products.append(1) or product(*args, **kwargs)
    )
    scores = fused_scores(hidden_NH, weight_VH, targets_N, temperatures=(1.0, temperatures_N), chunk_bytes=5 * 300 * 4)
    assert len(products) == 4
    for temperature, (log_probs, entropies) in zip((1.0, temperatures_N), scores, strict=True):
        want = vocab_parallel_log_probs_and_entropy(hidden_NH @ weight_VH.t(), targets_N, temperature=temperature)
        torch.testing.assert_close((log_probs, entropies), want)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen):
    hidden_NH, weight_VH, targets_N, *_ = make_case(5, 40, 8, torch.float32)
    leaves = [hidden_NH, weight_VH]
    leaves[1 - frozen].requires_grad_()
    log_probs, _ = fused_log_probs_and_entropy(hidden_NH, weight_VH, targets_N)
    log_probs.sum().backward()
    assert leaves[frozen].grad is None
    assert leaves[1 - frozen].grad is not None


def test_no_tokens_give_empty_results():
    hidden_NH, weight_VH = torch.zeros(0, 8, requires_grad=True), torch.zeros(5, 8, requires_grad=True)
    log_probs, entropies = fused_log_probs_and_entropy(hidden_NH, weight_VH, torch.zeros(0, dtype=torch.long))
    assert log_probs.shape == entropies.shape == (0,)
    (log_probs.sum() + entropies.sum()).backward()
    assert hidden_NH.grad is not None
    assert weight_VH.grad is not None
    assert not weight_VH.grad.any()


def in_buffer(weight_VH: torch.Tensor) -> Any:
    """A parameter as Megatron's DistributedDataParallel leaves it."""
    weight: Any = torch.nn.Parameter(weight_VH)
    weight.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    return weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_weights_gradient_is_added_to_megatrons_buffer(dtype):
    hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N = make_case(37, 500, 32, dtype)
    want = by_float64(hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N)
    weight = in_buffer(weight_VH)
    for _ in range(2):
        log_probs, entropies = fused_log_probs_and_entropy(
            hidden_NH, weight, targets_N, temperature=temperatures_N, chunk_bytes=10_000
        )
        (log_probs * weights_2N[0] + entropies * weights_2N[1]).sum().backward()
    assert weight.grad_added_to_main_grad
    assert relative_error(weight.main_grad, 2 * want[3]) < MAX_GRADIENT_ERROR[dtype]


# ----- memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_chunk_of_logits_exists_at_a_time(dtype):
    """One of sixteen chunks; otherwise only tiles, the gradient of the hidden states, and a few numbers per token."""
    rows, vocab, hidden = 64, 8192, 16
    hidden_NH, weight_VH, targets_N, temperatures_N, _ = make_case(rows, vocab, hidden, dtype)
    weight, hidden_NH = in_buffer(weight_VH), hidden_NH.requires_grad_()
    chunk_bytes = 4 * vocab * dtype.itemsize
    with PeakStorage() as storage:
        storage.include(hidden_NH, weight, weight.main_grad, targets_N, temperatures_N)
        given = storage.live_bytes
        log_probs, entropies = fused_log_probs_and_entropy(
            hidden_NH, weight, targets_N, temperature=temperatures_N, chunk_bytes=chunk_bytes
        )
        held = storage.live_bytes - given
        (log_probs.sum() + entropies.sum()).backward()
    beside = hidden_NH.numel() * dtype.itemsize + 128 * rows
    assert held <= 128 * rows, "no logits are kept for the backward"
    assert storage.peak_bytes - given <= 1.5 * chunk_bytes + beside


# ----- bad input


def test_bad_arguments_are_refused():
    hidden_NH, weight_VH, targets_N = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long)
    call: Any = fused_log_probs_and_entropy
    for arguments, options, message in (
        ((hidden_NH, weight_VH[:, :3], targets_N), {}, r"got \(3, 4\), \(5, 3\) and \(3,\)"),
        ((hidden_NH, weight_VH, targets_N[:2]), {}, r"got \(3, 4\), \(5, 4\) and \(2,\)"),
        ((hidden_NH[0], weight_VH, targets_N), {}, r"got \(4,\), \(5, 4\)"),
        ((hidden_NH, weight_VH.bfloat16(), targets_N), {}, "got torch.float32 and torch.bfloat16"),
        ((hidden_NH, weight_VH, targets_N), {"chunk_bytes": 0}, "chunk_bytes must be at least 1, got 0"),
        ((hidden_NH, weight_VH, targets_N), {"vocab_size": 6}, r"1\.\.5 .* got 6"),
        ((hidden_NH, weight_VH, targets_N), {"temperature": 0.0}, "positive and finite, got 0.0"),
        ((hidden_NH, weight_VH, targets_N), {"temperature": torch.ones(2)}, r"shape \[3\] as the tokens, got \(2,\)"),
        ((hidden_NH, weight_VH, targets_N + 5), {}, r"\[0, 5\), got 5 for token 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments, **options)


def test_bad_logits_are_named():
    hidden_NH, weight_VH, targets_N = torch.ones(5, 4), torch.zeros(7, 4), torch.zeros(5, dtype=torch.long)
    hidden_NH[3, 0] = math.nan
    with pytest.raises(ValueError, match="logits of token 3 are NaN at vocabulary id 0 on rank 0"):
        fused_log_probs_and_entropy(hidden_NH, weight_VH, targets_N)
    weight_VH[6, 1] = math.nan
    with pytest.raises(ValueError, match="logits of token 0 are NaN at vocabulary id 6 on rank 0"):
        fused_scores(hidden_NH[:3], weight_VH, targets_N[:3], temperatures=(1.0,))


# ----- two ranks


def check_sharded(rank: int) -> None:
    """Shards of the weight give the whole weight's results and gradients; both ranks report the same fault."""
    group, all_reduce, counted = dist.group.WORLD, dist.all_reduce, []
    assert group is not None
    fused_head.dist.all_reduce = count_all_reduces(counted, all_reduce)  # type: ignore[attr-defined]
    # Real size, columns per rank: no padding; padding on rank 1; rank 1 has padding only.
    for vocab, columns in ((24, 12), (300, 160), (10, 10), (9, 10)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N = make_case(13, vocab, 32, dtype)
            want = by_float64(hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N)
            padded_VH = torch.full((2 * columns, 32), torch.nan, dtype=dtype)
            padded_VH[:vocab] = weight_VH
            shard_VH = padded_VH[rank * columns : (rank + 1) * columns].clone().requires_grad_()
            hidden_NH.requires_grad_()
            counted.clear()
            log_probs, entropies = fused_log_probs_and_entropy(
                hidden_NH,
                shard_VH,
                targets_N,
                tp_group=group,
                vocab_size=vocab,
                temperature=temperatures_N,
                chunk_bytes=5 * columns * dtype.itemsize,
            )
            assert len(counted) == 2
            (log_probs * weights_2N[0] + entropies * weights_2N[1]).sum().backward()
            assert len(counted) == 2 + 3, "one for each of three chunks"
            tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 4e-6}
            torch.testing.assert_close(log_probs.detach().double(), want[0], **tolerance)
            torch.testing.assert_close(entropies.detach().double(), want[1], **tolerance)
            assert hidden_NH.grad is not None
            assert shard_VH.grad is not None
            # In bfloat16 the logits' gradient, both ranks' parts and their sum are rounded.
            limit = {torch.bfloat16: 4e-3, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
            assert relative_error(hidden_NH.grad, want[2]) < limit
            pieces = [torch.empty_like(shard_VH) for _ in range(2)]
            dist.all_gather(pieces, shard_VH.grad, group=group)
            whole_VH = torch.cat(pieces)
            assert relative_error(whole_VH[:vocab], want[3]) < limit
            assert (whole_VH[vocab:] == 0).all()

    shard_VH = torch.zeros(7, 4)
    shard_VH[3, 2] = math.nan if rank == 1 else 0
    with pytest.raises(ValueError, match="logits of token 0 are NaN at vocabulary id 10 on rank 1"):
        fused_log_probs_and_entropy(torch.ones(5, 4), shard_VH, torch.zeros(5, dtype=torch.long), tp_group=group)


def check_overlapped_reduction(rank: int) -> None:
    """Megatron reduces a bucket when the hooks of its weights have run, and requires that each saw a gradient."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_hapo.config import ParallelSizes
    from megatron_hapo.model import parallel_layout

    parallel_layout.initialize(ParallelSizes(dp=2), device=torch.device("cpu"), seed=0, timeout_seconds=60)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(16, 16, bias=False)
            self.head = torch.nn.Linear(16, 50, bias=False)

        def forward(self, inputs_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
            hidden_NH, weight_VH = self.body(inputs_NH), self.head.weight
            return fused_log_probs_and_entropy(hidden_NH, weight_VH, targets_N, chunk_bytes=5 * 50 * 4)[0]

    torch.manual_seed(0)
    model = Model()
    ddp = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1, calculate_per_token_loss=True),
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True),
        model,
    )
    inputs = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(1))  # rank, micro-batch
    targets_N = torch.arange(8)
    ddp.zero_grad_buffer()
    with ddp.no_sync():
        for inputs_NH in inputs[rank, :2]:
            ddp(inputs_NH, targets_N).sum().backward()
    ddp(inputs[rank, 2], targets_N).sum().backward()
    ddp.finish_grad_sync()
    logits_NV = model.head(model.body(inputs.flatten(0, 2)))
    wanted = torch.log_softmax(logits_NV, -1).gather(1, targets_N.repeat(6)[:, None]).sum()
    parameters = [model.body.weight, model.head.weight]
    for parameter, want in zip(parameters, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(parameter.main_grad, want, rtol=1e-5, atol=1e-6)
        assert parameter.grad is None


def check_two_ranks(rank: int) -> None:
    check_sharded(rank)
    check_overlapped_reduction(rank)


def test_two_ranks_equal_one():
    run_ranks(2, check_two_ranks, timeout_seconds=120)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_the_head_gives_entropies_a_gradient_only_if_the_method_needs_it(entropy_gradient: bool) -> None:
    from megatron_hapo.logprobs.output_head import FusedHead, ScoredTokens

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 1, 4, generator=generator).requires_grad_()
    weight = torch.randn(9, 4, generator=generator)
    head = FusedHead(tp_group=None, vocab_size=9, entropy_gradient=entropy_gradient)
    ((log_probs, entropies),) = head(
        hidden_states=hidden,
        output_layer=SimpleNamespace(sequence_parallel=False, weight=weight),
        output_weight=None,
        context=ScoredTokens(torch.tensor([0, 3]), torch.tensor([2, 8]), (1.0,)),
    )
    assert log_probs.requires_grad
    (log_probs.sum() + entropies.sum()).backward()
    log_p = torch.log_softmax(hidden[[0, 3], 0] @ weight.t(), -1)
    want = log_p[[0, 1], [2, 8]].sum()
    if entropy_gradient:
        want = want - (log_p.exp() * log_p).sum()
    (expected,) = torch.autograd.grad(want, hidden)
    torch.testing.assert_close(hidden.grad, expected)
