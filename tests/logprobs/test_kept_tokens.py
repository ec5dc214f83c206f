"""Log-probs among the tokens that top-p and top-k kept, against float64 autograd, in both heads and on two ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_hapo.logprobs import vocab_parallel_log_probs_and_entropy
from megatron_hapo.logprobs.fused_head import fused_log_probs_and_entropy, fused_scores
from megatron_hapo.logprobs.kept_tokens import Kept
from tests.distributed import run_ranks
from tests.logprobs.test_fused_head import make_case
from tests.logprobs.test_logprobs import relative_error

MAX_ERROR = {torch.bfloat16: 2e-3, torch.float32: 2e-6, torch.float64: 1e-12}
CPU = torch.device("cpu")


def make_kept(targets_N: torch.Tensor, vocab: int, *, most: int = 5) -> Kept:
    """The target and up to `most` - 1 other tokens of each row, in random order."""
    generator = np.random.default_rng(0)
    sets = []
    for target in targets_N.tolist():
        others = generator.choice(vocab, size=int(generator.integers(0, most)), replace=False)
        sets.append(generator.permutation(list({target, *others.tolist()})))
    return Kept.of(np.concatenate(sets), np.array([len(kept) for kept in sets]), device=CPU)


def by_autograd(logits_NV, targets_N, temperature, kept, weights_2N):
    """Log-probs among the kept tokens, entropies over all, and the logits' gradient, in float64."""
    logits_NV = logits_NV.detach().double().clone().requires_grad_()
    scaled_NV = logits_NV / torch.as_tensor(temperature, dtype=torch.float64).expand(len(targets_N))[:, None]
    allowed_NV = torch.zeros(logits_NV.shape, dtype=torch.bool)
    allowed_NV[kept.rows, kept.columns] = True
    log_probs_N = scaled_NV.masked_fill(~allowed_NV, -torch.inf).log_softmax(-1).gather(1, targets_N[:, None])[:, 0]
    log_p_NV = scaled_NV.log_softmax(-1)
    entropies_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    (log_probs_N * weights_2N[0] + entropies_N * weights_2N[1]).sum().backward()
    return log_probs_N.detach(), entropies_N.detach(), logits_NV.grad


def test_the_log_prob_is_that_among_the_kept_tokens_and_the_entropy_that_of_all():
    """By hand: of odds 1 : 2 : 3 : 4 the tokens 1 and 3 are kept; at temperature 1/2 their odds are 4 : 16."""
    logits_NV = torch.tensor([[1.0, 2, 3, 4]]).log()
    kept = Kept.of(np.array([3, 1]), np.array([2]), device=CPU)
    log_prob, entropy = vocab_parallel_log_probs_and_entropy(logits_NV, torch.tensor([1]), kept=kept)
    assert float(log_prob) == pytest.approx(math.log(2 / 6))
    assert float(entropy) == pytest.approx(-sum(i / 10 * math.log(i / 10) for i in (1, 2, 3, 4)))
    log_prob, _ = vocab_parallel_log_probs_and_entropy(logits_NV, torch.tensor([3]), kept=kept, temperature=0.5)
    assert float(log_prob) == pytest.approx(math.log(16 / 20))


@pytest.mark.parametrize("dtype", MAX_ERROR)
@pytest.mark.parametrize("temperature", [1.0, "per token"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 1, 7])
def test_values_and_gradients_equal_float64(dtype, temperature, entropy_gradient, chunk_rows):
    """`chunk_rows` None is the head that holds all logits, a number the fused one."""
    rows, vocab = 33, 300
    hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N = make_case(rows, vocab, 16, dtype)
    weights_2N[1] *= entropy_gradient
    given, kept = temperatures_N if temperature == "per token" else temperature, make_kept(targets_N, vocab)
    # The logits have the dtype of the hidden states, as the head's have.
    log_probs_N, entropies_N, gradient_NV = by_autograd(hidden_NH @ weight_VH.t(), targets_N, given, kept, weights_2N)
    gradient_NV = gradient_NV.to(dtype).double()
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_()
    if chunk_rows is None:
        got = vocab_parallel_log_probs_and_entropy(hidden_NH @ weight_VH.t(), targets_N, temperature=given, kept=kept)
    else:
        chunk = chunk_rows * vocab * dtype.itemsize
        got = fused_log_probs_and_entropy(
            hidden_NH, weight_VH, targets_N, temperature=given, kept=kept, chunk_bytes=chunk
        )
        with torch.no_grad():
            [scores] = fused_scores(hidden_NH, weight_VH, targets_N, temperatures=[given], kept=kept, chunk_bytes=chunk)
        torch.testing.assert_close(scores, tuple(value.detach() for value in got), rtol=0, atol=0)
    loss = (got[0] * weights_2N[0]).sum()
    (loss + (got[1] * weights_2N[1]).sum() if entropy_gradient else loss).backward()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 4e-6}
    torch.testing.assert_close(got[0].detach().double(), log_probs_N, **tolerance)
    torch.testing.assert_close(got[1].detach().double(), entropies_N, **tolerance)
    for leaf, gradient in (
        (hidden_NH, gradient_NV @ weight_VH.double()),
        (weight_VH, gradient_NV.t() @ hidden_NH.double()),
    ):
        assert leaf.grad is not None
        rounded = relative_error(gradient.detach().to(dtype), gradient.detach())
        assert relative_error(leaf.grad, gradient.detach()) < MAX_ERROR[dtype] + 2 * rounded


def test_keeping_every_token_is_the_log_prob_over_the_vocabulary():
    hidden_NH, weight_VH, targets_N, *_ = make_case(6, 40, 8, torch.float64)
    everything = Kept.of(np.tile(np.arange(40), 6), np.full(6, 40), device=CPU)
    logits_NV = hidden_NH @ weight_VH.t()
    torch.testing.assert_close(
        vocab_parallel_log_probs_and_entropy(logits_NV, targets_N, kept=everything),
        vocab_parallel_log_probs_and_entropy(logits_NV, targets_N),
        rtol=1e-12, atol=1e-12,
    )  # fmt: skip


def test_kept_tokens_that_have_become_unlikely_keep_finite_log_probs():
    """After an update all kept tokens may be far below the maximum: exp of their distance to it would be 0."""
    logits_NV = torch.tensor([[0.0, -300, -301]], requires_grad=True)
    kept = Kept.of(np.array([1, 2]), np.array([2]), device=CPU)
    log_prob, _ = vocab_parallel_log_probs_and_entropy(logits_NV, torch.tensor([2]), kept=kept)
    assert float(log_prob.detach()) == pytest.approx(-1 - math.log1p(math.exp(-1)), abs=1e-4)  # float32 has 3e-5 at 300
    log_prob.sum().backward()
    p = 1 / (1 + math.e)
    torch.testing.assert_close(logits_NV.grad, torch.tensor([[0.0, p - 1, 1 - p]]), atol=1e-4, rtol=0)


def test_kept_tokens_of_another_number_of_rows_are_refused():
    kept = Kept.of(np.array([1, 2]), np.array([1, 1]), device=CPU)
    with pytest.raises(ValueError, match="a length for each of the 3 tokens, got 2"):
        vocab_parallel_log_probs_and_entropy(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), kept=kept)


def _on_two_ranks(rank: int) -> None:
    group = dist.group.WORLD
    hidden_NH, weight_VH, targets_N, temperatures_N, weights_2N = make_case(21, 90, 8, torch.float64)
    targets_N %= 83
    kept = make_kept(targets_N, 83)
    whole_NV = (hidden_NH @ weight_VH.t())[:, :83]
    want = by_autograd(whole_NV, targets_N, temperatures_N, kept, weights_2N)
    own_VH = weight_VH[rank * 45 : (rank + 1) * 45].clone().requires_grad_()
    for fused in (False, True):
        hidden = hidden_NH.clone().requires_grad_()
        own_VH.grad = None
        arguments = dict(tp_group=group, vocab_size=83, temperature=temperatures_N, kept=kept)
        if fused:
            got = fused_log_probs_and_entropy(hidden, own_VH, targets_N, chunk_bytes=4 * 45 * 8, **arguments)
        else:
            got = vocab_parallel_log_probs_and_entropy(hidden @ own_VH.t(), targets_N, **arguments)
        (got[0] * weights_2N[0] + got[1] * weights_2N[1]).sum().backward()
        torch.testing.assert_close(got[0].detach(), want[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[1].detach(), want[1], rtol=1e-12, atol=1e-12)
        gradient_VH = torch.nn.functional.pad(want[2], (0, 7)).t() @ hidden_NH
        torch.testing.assert_close(own_VH.grad, gradient_VH[rank * 45 : (rank + 1) * 45], rtol=1e-11, atol=1e-12)
        if fused:
            torch.testing.assert_close(hidden.grad, want[2] @ weight_VH[:83], rtol=1e-11, atol=1e-12)


def test_two_ranks_that_share_the_vocabulary_agree_with_one():
    run_ranks(2, _on_two_ranks)
