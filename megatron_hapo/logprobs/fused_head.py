"""Log-probs and entropies from hidden states and the output weight: logits exist for one chunk of tokens at a time.

`N` tokens, `H` hidden size, `V` this rank's rows of the weight, `C` tokens of a chunk. The forward pass keeps a few
numbers per token; the backward pass recomputes the logits of a chunk, overwrites them with their gradient, and adds the
result to the gradients of hidden states and weight. The formulas are in `row_statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hapo.logprobs.head_products import HeadGradients, head_product
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
    slices,
    statistics_dtype,
    temperature_of_rows,
)

CHUNK_BYTES = 256 << 20
"""Size of the logits of a chunk: 883 tokens of a 151,936-token vocabulary in bfloat16, enough for efficient matmuls."""


def fused_log_probs_and_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    kept: Kept | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    reduce_hidden_gradient: bool = True,
    float32_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """`vocab_parallel_log_probs_and_entropy` of the logits hidden @ weight^T, without storing those logits.

    Logits have the dtype of the hidden states, as those of a linear layer would, unless `float32_logits`. Two
    all-reduces, first of the maxima, then of the packed sums; with `reduce_hidden_gradient` one per chunk in the
    backward pass; every rank of the group must run both passes.

    If Megatron's DistributedDataParallel manages the weight, its gradient is added straight to `main_grad`, in the
    dtype of that buffer, and marked as done; any other weight gets an ordinary gradient.

    Args:
        hidden_NH: [N, H] floating point, equal on all ranks of the group.
        weight_VH: [V, H] of the same dtype: rank r holds the token ids [r V, (r + 1) V).
        targets_N, tp_group, vocab_size, temperature, kept: see `vocab_parallel_log_probs_and_entropy`.
        chunk_bytes: maximum size of the logits of a chunk; a chunk has at least one token.
        reduce_hidden_gradient: sum the ranks' gradients of the hidden states. False if the caller's own gather does it
            (sequence parallelism).
        float32_logits: keep the logits as the product has summed them, in float32. Their gradient is rounded to the
            dtype of the hidden states for its own two products.
    Returns:
        log_probs [N] and entropies [N] (nats), both differentiable in hidden states and weight.
    Raises:
        ValueError: as `vocab_parallel_log_probs_and_entropy`.
    """
    shard = _check_arguments(hidden_NH, weight_VH, targets_N, tp_group, vocab_size, chunk_bytes)
    check_kept(kept, len(hidden_NH))
    temperature_N = temperature_of_rows(temperature, hidden_NH)
    log_probs_N, entropies_N = _FusedHead.apply(  # type: ignore[misc]
        hidden_NH, weight_VH, targets_N, temperature_N, shard, kept, chunk_bytes, reduce_hidden_gradient, float32_logits
    )
    _check_results(hidden_NH, weight_VH, targets_N, temperature_N, entropies_N, shard)
    return log_probs_N, entropies_N


@torch.no_grad()
def fused_scores(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperatures: Sequence[float | Tensor],
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    kept: Kept | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    float32_logits: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Log-probs and entropies [N] at each of several temperatures from the same logits, without gradient.

    Two all-reduces per temperature. Arguments and errors are those of `fused_log_probs_and_entropy`.
    """
    shard = _check_arguments(hidden_NH, weight_VH, targets_N, tp_group, vocab_size, chunk_bytes)
    check_kept(kept, len(hidden_NH))
    of_rows = [temperature_of_rows(temperature, hidden_NH) for temperature in temperatures]
    scores = []
    for temperature_N, statistics in zip(
        of_rows,
        _statistics(hidden_NH, weight_VH, targets_N, of_rows, shard, kept, chunk_bytes, float32_logits),
        strict=True,
    ):
        scores.append((statistics.log_probs, statistics.entropies))
        _check_results(hidden_NH, weight_VH, targets_N, temperature_N, statistics.entropies, shard)
    return scores


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        temperature_N: Tensor | None,
        shard: VocabShard,
        kept: Kept | None,
        chunk_bytes: int,
        reduce_hidden_gradient: bool,
        float32_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        [statistics] = _statistics(
            hidden_NH, weight_VH, targets_N, [temperature_N], shard, kept, chunk_bytes, float32_logits
        )
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, temperature_N, *statistics.tensors)
        ctx.local_kept = None if kept is None else kept.on_shard(shard.first_column)
        ctx.shard, ctx.chunk_bytes, ctx.float32_logits = shard, chunk_bytes, float32_logits
        ctx.reduce_hidden_gradient = reduce_hidden_gradient
        ctx.set_materialize_grads(False)
        return statistics.log_probs, statistics.entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_probs_N: Tensor | None, grad_entropies_N: Tensor | None):  # type: ignore[override]
        hidden_NH, weight_VH, targets_N, temperature_N, *statistics = ctx.saved_tensors
        gradient = row_gradient(RowStatistics(*statistics), temperature_N, grad_log_probs_N, grad_entropies_N)
        shard: VocabShard = ctx.shard
        gradients = HeadGradients(
            hidden_NH,
            weight_VH,
            needs=ctx.needs_input_grad[:2],
            tp_group=shard.tp_group if ctx.reduce_hidden_gradient else None,
        )
        local_targets_N = targets_N - shard.first_column
        buffer_CV, chunks = _chunks(hidden_NH, weight_VH, shard, ctx.chunk_bytes, ctx.float32_logits)
        for rows in chunks:
            logits_CV = head_product(hidden_NH[rows], weight_VH[: shard.real_columns], out=buffer_CV)
            kept = None if ctx.local_kept is None else ctx.local_kept.of_rows(rows)
            overwrite_with_gradient(logits_CV, local_targets_N[rows], gradient.of_rows(rows), kept)
            gradients.add(rows, logits_CV)
        return *gradients.finish(), None, None, None, None, None, None, None


def _statistics(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    temperatures: Sequence[Tensor | None],
    shard: VocabShard,
    kept: Kept | None,
    chunk_bytes: int,
    float32_logits: bool,
) -> list[RowStatistics]:
    """Statistics at each temperature; the logits of a chunk are computed once for all of them."""
    local_targets_N = targets_N - shard.first_column
    local_kept = None if kept is None else kept.on_shard(shard.first_column)
    # Those of the kept tokens follow those of all tokens.
    width = 4 if kept is None else 6
    found = [hidden_NH.new_empty(width, len(hidden_NH), dtype=statistics_dtype(hidden_NH.dtype)) for _ in temperatures]
    buffer_CV, chunks = _chunks(hidden_NH, weight_VH, shard, chunk_bytes, float32_logits)
    for rows in chunks:
        logits_CV = head_product(hidden_NH[rows], weight_VH[: shard.real_columns], out=buffer_CV)
        for local, temperature_N in zip(found, temperatures, strict=True):
            part_C = None if temperature_N is None else temperature_N[rows]
            local[:4, rows] = local_statistics(logits_CV, local_targets_N[rows], part_C)
            if local_kept is not None:
                local[4:, rows] = local_kept_statistics(logits_CV, local_kept.of_rows(rows), part_C)
    return [
        combine(local[:4], local_targets_N, temperature_N, shard, local_kept_2N=None if kept is None else local[4:])
        for local, temperature_N in zip(found, temperatures, strict=True)
    ]


# ----- chunks


def _chunks(
    hidden_NH: Tensor, weight_VH: Tensor, shard: VocabShard, chunk_bytes: int, float32_logits: bool
) -> tuple[Tensor, list[slice]]:
    """A buffer for the logits of the largest chunk, and the chunks: equal on all ranks, and of nearly equal size."""
    dtype = statistics_dtype(hidden_NH.dtype) if float32_logits else hidden_NH.dtype
    most = max(1, chunk_bytes // (len(weight_VH) * dtype.itemsize))
    number = max(1, -(-len(hidden_NH) // most))
    size = -(-len(hidden_NH) // number)
    return hidden_NH.new_empty(size, shard.real_columns, dtype=dtype), list(slices(len(hidden_NH), max(1, size)))


# ----- arguments and results


def _check_arguments(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int | None,
    chunk_bytes: int,
) -> VocabShard:
    shapes = tuple(hidden_NH.shape), tuple(weight_VH.shape), tuple(targets_N.shape)
    if (
        hidden_NH.dim() != 2
        or weight_VH.dim() != 2
        or hidden_NH.shape[1] != weight_VH.shape[1]
        or targets_N.shape != hidden_NH.shape[:1]
    ):
        raise ValueError(
            f"hidden states must be [N, H], the weight [V, H] and targets [N], got {shapes[0]}, {shapes[1]} "
            f"and {shapes[2]}"
        )
    if not hidden_NH.is_floating_point() or hidden_NH.dtype != weight_VH.dtype:
        raise ValueError(
            f"hidden states and weight must have one floating point dtype, got {hidden_NH.dtype} and {weight_VH.dtype}"
        )
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    return VocabShard.of(len(weight_VH), tp_group=tp_group, vocab_size=vocab_size)


def _check_results(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor | None,
    entropies_N: Tensor,
    shard: VocabShard,
) -> None:
    def logits_of(token: int) -> Tensor:
        return torch.mv(weight_VH.detach()[: shard.real_columns], hidden_NH.detach()[token])

    check_results(targets_N, temperature_N, entropies_N, shard, logits_of)
