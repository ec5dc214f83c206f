"""Log-probs of given tokens and entropies from vocabulary-sharded logits: exact, differentiable, in little memory.

Nothing of size [N, V] exists besides the logits, and the backward pass overwrites the logits with their gradient. The
formulas are in `row_statistics`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hapo.logprobs.kept_tokens import Kept
from megatron_hapo.logprobs.row_statistics import (
    RowStatistics,
    VocabShard,
    check_kept,
    check_results,
    combine,
    local_kept_statistics,
    local_statistics,
    overwrite_with_gradient,
    row_gradient,
    temperature_of_rows,
)


def vocab_parallel_log_probs_and_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    kept: Kept | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row, of softmax(logits / temperature) over the whole vocabulary.

    The backward pass writes the gradient into the storage of `logits_NV`: the caller must not use the logits
    afterwards, and only one backward pass is possible. Without gradient the logits stay unchanged.

    Two all-reduces per chunk, first of the maxima, then of the packed sums; every rank of the group must call. The
    results are checked once (on a GPU one synchronisation).

    Args:
        logits_NV: [N, V] float32, bfloat16, float16 or float64, this rank's columns: rank r holds [r V, (r + 1) V).
            -inf marks a forbidden token.
        targets_N: [N] int64, global token ids in [0, vocab_size). A forbidden target has log-prob -inf.
        tp_group: ranks that share the vocabulary; all of them call this with the same N. None: not sharded.
        vocab_size: real size; columns from there on are padding and are ignored, whatever they hold.
        temperature: a positive number or [N].
        kept: token ids among which each row's log-prob is normalised, the target one of them. Entropies are those of
            the whole vocabulary all the same. None: the whole vocabulary.
        chunk_size: rows that share two all-reduces, at least 1; all by default. Does not change the memory needed.
    Returns:
        log_probs [N] and entropies [N] (nats, at least 0), equal on all ranks of the group; both differentiable.
        float32; float64 for float64 logits.
    Raises:
        ValueError: shapes do not match, a temperature is not positive, a target is outside the vocabulary, or logits
            are NaN, +inf or all -inf; the message names the first such token, and for logits the rank.
    """
    if logits_NV.dim() != 2 or targets_N.shape != logits_NV.shape[:1]:
        raise ValueError(
            f"logits must be [N, V] and targets [N], got {tuple(logits_NV.shape)} and {tuple(targets_N.shape)}"
        )
    if not logits_NV.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits_NV.dtype}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    shard = VocabShard.of(logits_NV.shape[1], tp_group=tp_group, vocab_size=vocab_size)
    check_kept(kept, len(logits_NV))
    temperature_N = temperature_of_rows(temperature, logits_NV)
    log_probs_N, entropies_N = _LogProbsAndEntropy.apply(logits_NV, targets_N, temperature_N, shard, kept, chunk_size)  # type: ignore[misc]
    check_results(targets_N, temperature_N, entropies_N, shard, lambda token: logits_NV[token, : shard.real_columns])
    return log_probs_N, entropies_N


class _LogProbsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits_NV: Tensor,
        targets_N: Tensor,
        temperature_N: Tensor | None,
        shard: VocabShard,
        kept: Kept | None,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        local_targets_N = targets_N - shard.first_column
        real_NV = logits_NV[:, : shard.real_columns]
        local_4N = local_statistics(real_NV, local_targets_N, temperature_N)
        local_kept = None if kept is None else kept.on_shard(shard.first_column)
        kept_2N = None if local_kept is None else local_kept_statistics(real_NV, local_kept, temperature_N)
        statistics = combine(
            local_4N, local_targets_N, temperature_N, shard, local_kept_2N=kept_2N, chunk_size=chunk_size
        )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(local_targets_N, temperature_N, *statistics.tensors)
            ctx.local_kept = local_kept
            # Not saved through autograd, whose version check would reject the in-place backward; we check ourselves.
            ctx.logits_NV, ctx.version, ctx.shard = logits_NV.detach(), logits_NV._version, shard
        ctx.set_materialize_grads(False)
        return statistics.log_probs, statistics.entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_probs_N: Tensor | None, grad_entropies_N: Tensor | None):  # type: ignore[override]
        logits_NV, ctx.logits_NV = ctx.logits_NV, None
        if logits_NV is None or logits_NV._version != ctx.version:
            raise RuntimeError(
                "the logits were changed after the forward pass, probably overwritten by their gradient: "
                "only one backward pass through them is possible"
            )
        local_targets_N, temperature_N, *statistics = ctx.saved_tensors
        gradient = row_gradient(RowStatistics(*statistics), temperature_N, grad_log_probs_N, grad_entropies_N)
        real_columns = ctx.shard.real_columns
        overwrite_with_gradient(logits_NV[:, :real_columns], local_targets_N, gradient, ctx.local_kept)
        logits_NV[:, real_columns:] = 0
        return logits_NV, None, None, None, None, None
