"""Log-probs and entropies against float64 autograd, on one rank and on two, and the memory that they need."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hapo.logprobs import sharded as logprobs
from megatron_hapo.logprobs import vocab_parallel_log_probs_and_entropy
from tests.distributed import run_ranks
from tests.storage import PeakStorage

MAX_BYTES = {torch.bfloat16: 2.75, torch.float32: 4.75}
MAX_GRADIENT_ERROR = {torch.bfloat16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-12}


def make_case(rows: int, vocab: int, *, scale: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Logits with forbidden tokens, targets, temperatures, and weights of both outputs; float64."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale
    logits_NV[torch.rand(rows, vocab, generator=generator) < 0.1] = -torch.inf
    targets_N = torch.randint(0, vocab, (rows,), generator=generator)
    logits_NV[torch.arange(rows), targets_N] = torch.randn(rows, generator=generator, dtype=torch.float64) * scale
    if rows > 1:  # one possible token only
        logits_NV[0, :] = -torch.inf
        logits_NV[0, targets_N[0]] = 5.0
    temperatures_N = torch.rand(rows, generator=generator) + 0.5
    weights_2N = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    return logits_NV, targets_N, temperatures_N, weights_2N


def by_autograd(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float | torch.Tensor,
    weights_2N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropies and the logits' gradient in float64."""
    logits_NV = logits_NV.detach().double().clone().requires_grad_()
    divisor = torch.as_tensor(temperature, dtype=torch.float64).expand(len(targets_N))[:, None]
    log_p_NV = torch.log_softmax(logits_NV / divisor, -1)
    # A forbidden token is left out of the entropy, whose derivative there would be 0 * inf.
    finite_NV = log_p_NV.masked_fill(log_p_NV.isneginf(), 0)
    log_probs_N = log_p_NV.gather(1, targets_N[:, None])[:, 0]
    entropies_N = -(log_p_NV.exp() * finite_NV).sum(-1)
    (log_probs_N * weights_2N[0] + entropies_N * weights_2N[1]).sum().backward()
    assert logits_NV.grad is not None
    return log_probs_N.detach(), entropies_N.detach(), logits_NV.grad


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


# ----- one rank


@pytest.mark.parametrize("dtype", MAX_GRADIENT_ERROR)
@pytest.mark.parametrize(("rows", "vocab"), [(64, 1000), (5, 4097), (1, 300_000), (33, 7)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "per token"])
def test_values_and_gradients_equal_float64_autograd(rows, vocab, dtype, temperature):
    """Small cases whose tiles are rows, and (one row) parts of rows; the gradient lies where the logits were."""
    logits_NV, targets_N, temperatures_N, weights_2N = make_case(rows, vocab)
    given = temperatures_N if temperature == "per token" else temperature
    leaf_NV = logits_NV.to(dtype, copy=True)
    log_probs, entropies, gradient = by_autograd(leaf_NV, targets_N, given, weights_2N)
    leaf_NV.requires_grad_()
    address = leaf_NV.data_ptr()
    got, entropy = vocab_parallel_log_probs_and_entropy(leaf_NV, targets_N, temperature=given)
    assert got.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (got * weights_2N[0] + entropy * weights_2N[1]).sum().backward()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 4e-6}
    torch.testing.assert_close(got.detach().double(), log_probs, **tolerance)
    torch.testing.assert_close(entropy.detach().double(), entropies, **tolerance)
    assert leaf_NV.grad is not None
    assert leaf_NV.grad.data_ptr() == address
    assert leaf_NV.grad.dtype == dtype
    # One row's gradient is nearly all in its target, where a single rounding to bfloat16 can be 3.9e-3.
    rounding = relative_error(gradient.to(dtype), gradient) if rows == 1 else 0
    assert relative_error(leaf_NV.grad, gradient) < max(MAX_GRADIENT_ERROR[dtype], 1.01 * rounding)
    if rows > 1:
        assert (leaf_NV.grad[0] == 0).all()  # the row with one possible token


@pytest.mark.parametrize("which", ["log-probs", "entropies"])
def test_each_output_alone_has_its_gradient(which):
    logits_NV, targets_N, _, weights_2N = make_case(9, 50)
    weights_2N[int(which == "log-probs")] = 0
    *_, want = by_autograd(logits_NV, targets_N, 1.0, weights_2N)
    leaf_NV = logits_NV.requires_grad_()
    outputs = vocab_parallel_log_probs_and_entropy(leaf_NV, targets_N)
    (outputs[int(which == "entropies")] * weights_2N.sum(0)).sum().backward()
    torch.testing.assert_close(leaf_NV.grad, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("padding", [0.0, 1e30, math.inf, math.nan])
def test_padded_columns_do_not_count_whatever_they_hold(padding):
    logits_NV, targets_N, _, weights_2N = make_case(6, 40)
    want = by_autograd(logits_NV, targets_N, 1.0, weights_2N)
    padded_NV = torch.cat([logits_NV, torch.full((6, 24), padding, dtype=torch.float64)], 1)
    padded_NV.requires_grad_()
    got, entropy = vocab_parallel_log_probs_and_entropy(padded_NV, targets_N, vocab_size=40)
    (got * weights_2N[0] + entropy * weights_2N[1]).sum().backward()
    assert padded_NV.grad is not None
    for mine, other in zip((got.detach(), entropy.detach(), padded_NV.grad[:, :40]), want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    assert (padded_NV.grad[:, 40:] == 0).all()


def test_a_forbidden_target_has_minus_infinity_and_a_finite_gradient():
    logits_NV = torch.tensor([[0.0, -torch.inf, 0.0, 0.0]]).requires_grad_()
    log_probs, entropies = vocab_parallel_log_probs_and_entropy(logits_NV, torch.tensor([1]))
    assert log_probs.item() == -math.inf
    assert entropies.item() == pytest.approx(math.log(3))
    (log_probs + entropies).sum().backward()
    third = 1 / 3
    torch.testing.assert_close(logits_NV.grad, torch.tensor([[-third, 1.0, -third, -third]]))


def test_extreme_logits_stay_exact():
    """Catches an overflow in exp, and an entropy that rounds to below zero."""
    logits_NV = torch.tensor([[1e4, 1e4, -1e4], [3e38, -3e38, 0.0], [-1e30, -1e30, -1e30]])
    log_probs, entropies = vocab_parallel_log_probs_and_entropy(logits_NV, torch.tensor([0, 0, 2]))
    torch.testing.assert_close(log_probs, torch.tensor([-math.log(2), 0.0, -math.log(3)]))
    torch.testing.assert_close(entropies, torch.tensor([math.log(2), 0.0, math.log(3)]))
    assert (entropies >= 0).all()


def test_no_tokens_give_empty_results():
    logits_NV = torch.zeros(0, 5, requires_grad=True)
    log_probs, entropies = vocab_parallel_log_probs_and_entropy(logits_NV, torch.zeros(0, dtype=torch.long))
    assert log_probs.shape == entropies.shape == (0,)
    (log_probs.sum() + entropies.sum()).backward()


def test_logits_stay_as_they_are_without_a_backward():
    logits_NV, targets_N, *_ = make_case(6, 40)
    kept_NV = logits_NV.clone()
    with torch.no_grad():
        vocab_parallel_log_probs_and_entropy(logits_NV, targets_N)
        vocab_parallel_log_probs_and_entropy(logits_NV, targets_N, temperature=2.0)
    assert torch.equal(logits_NV, kept_NV)


def test_a_second_backward_is_refused_also_through_another_call():
    """The second gradient would be computed from the first one instead of from the logits."""
    logits_NV, targets_N, *_ = make_case(6, 40)
    logits_NV.requires_grad_()
    first, _ = vocab_parallel_log_probs_and_entropy(logits_NV, targets_N)
    second, _ = vocab_parallel_log_probs_and_entropy(logits_NV, targets_N, temperature=2.0)
    first.sum().backward(retain_graph=True)
    for output in (first, second):
        with pytest.raises(RuntimeError, match="only one backward"):
            output.sum().backward()


# ----- memory


@pytest.mark.parametrize("dtype", MAX_BYTES)
@pytest.mark.parametrize(("rows", "vocab"), [(64, 8192), (1, 65_536), (7, 9999)])
@pytest.mark.parametrize("chunk_size", [None, 1, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_peak_memory(rows, vocab, dtype, chunk_size, temperature):
    """Bytes per logits element with the logits, over forward and backward with the entropy's gradient."""
    logits_NV = torch.randn(rows, vocab).to(dtype).requires_grad_()
    with PeakStorage() as storage:
        storage.include(logits_NV)
        log_probs, entropies = vocab_parallel_log_probs_and_entropy(
            logits_NV, torch.zeros(rows, dtype=torch.long), temperature=temperature, chunk_size=chunk_size
        )
        held = storage.live_bytes
        (log_probs.sum() + entropies.sum()).backward()
    assert storage.peak_bytes / logits_NV.numel() <= MAX_BYTES[dtype]
    # Between forward and backward: the logits, and a few numbers of each row.
    assert held - logits_NV.numel() * dtype.itemsize <= 64 * rows + 64


def test_the_tracker_sees_what_the_naive_version_needs():
    logits_NV = torch.randn(16, 1000).bfloat16().requires_grad_()
    with PeakStorage() as storage:
        storage.include(logits_NV)
        torch.log_softmax(logits_NV.float(), -1).sum().backward()
    assert storage.peak_bytes / logits_NV.numel() >= 10


# ----- bad input


def test_bad_arguments_are_refused():
    logits_NV, targets_N = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)
    call: Any = vocab_parallel_log_probs_and_entropy
    for arguments, options, message in (
        ((logits_NV, targets_N[:2]), {}, r"got \(3, 5\) and \(2,\)"),
        ((logits_NV[0], targets_N), {}, r"got \(5,\) and \(3,\)"),
        ((logits_NV.long(), targets_N), {}, "must be floating point, got torch.int64"),
        ((logits_NV, targets_N), {"temperature": 0.0}, "positive and finite, got 0.0"),
        ((logits_NV, targets_N), {"temperature": math.nan}, "positive and finite, got nan"),
        ((logits_NV, targets_N), {"temperature": torch.tensor([1.0, 1.0, -2.0])}, "got -2.0 for token 2"),
        ((logits_NV, targets_N), {"temperature": torch.ones(2)}, r"shape \[3\] as the tokens, got \(2,\)"),
        ((logits_NV, targets_N), {"vocab_size": 6}, r"1\.\.5 .* got 6"),
        ((logits_NV, targets_N), {"vocab_size": 0}, r"1\.\.5 .* got 0"),
        ((logits_NV, targets_N), {"chunk_size": 0}, "at least 1, got 0"),
        ((logits_NV, targets_N + 4), {"vocab_size": 4}, r"\[0, 4\), got 4 for token 0"),
        ((logits_NV, targets_N - 1), {}, r"\[0, 5\), got -1 for token 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments, **options)


@pytest.mark.parametrize(("value", "name"), [(math.nan, "NaN"), (math.inf, r"\+inf")])
def test_bad_logits_are_named(value, name):
    logits_NV = torch.zeros(5, 7)
    logits_NV[3, 6] = value
    with pytest.raises(ValueError, match=f"logits of token 3 are {name} at vocabulary id 6 on rank 0"):
        vocab_parallel_log_probs_and_entropy(logits_NV, torch.zeros(5, dtype=torch.long))
    logits_NV[3] = -torch.inf
    with pytest.raises(ValueError, match=r"logits of token 3 are all -inf on ranks \[0\]"):
        vocab_parallel_log_probs_and_entropy(logits_NV, torch.zeros(5, dtype=torch.long))


# ----- two ranks


def count_all_reduces(counted: list[int], all_reduce: Any):
    def counting(*args: Any, **kwargs: Any) -> Any:
        counted.append(args[0].numel())
        return all_reduce(*args, **kwargs)

    return counting


def check_sharded(rank: int) -> None:
    """Shards of logits give the whole logits' results and gradients; both ranks report the same fault."""
    group, all_reduce, counted = dist.group.WORLD, dist.all_reduce, []
    assert group is not None
    logprobs.dist.all_reduce = count_all_reduces(counted, all_reduce)  # type: ignore[attr-defined]
    # Real size, columns per rank: no padding; padding on rank 1; rank 1 has padding only.
    for vocab, columns in ((24, 12), (300, 160), (10, 10), (9, 10)):
        for dtype, temperature, chunk_size in (
            (torch.float64, "per token", None),
            (torch.float32, 0.7, 4),
            (torch.bfloat16, 1.0, 1),
        ):
            logits_NV, targets_N, temperatures_N, weights_2N = make_case(13, vocab)
            logits_NV[1, : min(vocab, columns)] = -torch.inf  # all that rank 0 holds
            logits_NV[1, targets_N[1]] = 0.5
            logits_NV = logits_NV.to(dtype)
            given = temperatures_N if temperature == "per token" else temperature
            want = by_autograd(logits_NV, targets_N, given, weights_2N)
            padded_NV = torch.full((13, 2 * columns), torch.nan, dtype=dtype)
            padded_NV[:, :vocab] = logits_NV
            shard_NV = padded_NV[:, rank * columns : (rank + 1) * columns].clone().requires_grad_()
            counted.clear()
            log_probs, entropies = vocab_parallel_log_probs_and_entropy(
                shard_NV,
                targets_N,
                tp_group=group,
                vocab_size=vocab,
                temperature=given,
                chunk_size=chunk_size,
            )
            assert len(counted) == 2 * math.ceil(13 / (chunk_size or 13))
            (log_probs * weights_2N[0] + entropies * weights_2N[1]).sum().backward()
            assert len(counted) == 2 * math.ceil(13 / (chunk_size or 13)), "no collective in the backward"
            tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 4e-6}
            torch.testing.assert_close(log_probs.detach().double(), want[0], **tolerance)
            torch.testing.assert_close(entropies.detach().double(), want[1], **tolerance)
            pieces = [torch.empty_like(shard_NV) for _ in range(2)]
            assert shard_NV.grad is not None
            assert shard_NV.grad.data_ptr() == shard_NV.data_ptr()
            dist.all_gather(pieces, shard_NV.grad, group=group)
            whole_NV = torch.cat(pieces, 1)
            assert relative_error(whole_NV[:, :vocab], want[2]) < MAX_GRADIENT_ERROR[dtype]
            assert (whole_NV[:, vocab:] == 0).all()
            both = [torch.empty(2, 13, dtype=log_probs.dtype) for _ in range(2)]
            dist.all_gather(both, torch.stack([log_probs, entropies]).detach(), group=group)
            assert torch.equal(*both), "the ranks' results differ"

    for bad_rank, value, name in ((0, math.nan, "NaN"), (1, math.nan, "NaN"), (1, math.inf, r"\+inf")):
        shard_NV = torch.zeros(5, 7)
        if rank == bad_rank:
            shard_NV[2, 3] = value
        message = f"logits of token 2 are {name} at vocabulary id {3 + 7 * bad_rank} on rank {bad_rank}"
        with pytest.raises(ValueError, match=message):
            vocab_parallel_log_probs_and_entropy(shard_NV, torch.zeros(5, dtype=torch.long), tp_group=group)

    logits_NV = torch.randn(8, 20_000).bfloat16().requires_grad_()
    with PeakStorage() as storage:
        storage.include(logits_NV)
        log_probs, entropies = vocab_parallel_log_probs_and_entropy(
            logits_NV, torch.arange(8), tp_group=group, vocab_size=39_000
        )
        (log_probs.sum() + entropies.sum()).backward()
    assert storage.peak_bytes / logits_NV.numel() <= MAX_BYTES[torch.bfloat16]


def test_two_ranks_equal_one():
    run_ranks(2, check_sharded, timeout_seconds=120)
