"""Log-probs of chosen tokens and entropies from vocabulary-sharded logits, exact, with gradient, in little memory.

`N` tokens, `V` this rank's vocabulary columns. One pass over chunks of rows holds float32 only for a chunk; the
backward overwrites the logits with their gradient. Two all-reduces a chunk: the maximum, and the packed sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DEFAULT_CHUNK_SIZE = 1024
"""Rows whose float32 copies exist together; with fewer rows a sixteenth of them, so that the peak stays bounded."""


def vocab_parallel_log_probs_and_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row, of softmax(logits / temperature) over the whole vocabulary.

    The backward writes the gradient into the storage of `logits_NV`: the caller must not use the logits afterwards, and
    can go backward once.

    Args:
        logits_NV: [N, V] float32 or bfloat16, this rank's columns: rank r holds [r V, (r + 1) V).
        targets_N: [N] int64, global token ids.
        tp_group: ranks that share the vocabulary; all of them call this with the same N. None: not sharded.
        vocab_size: real size; columns from there on are padding and are left out, whatever they hold.
        temperature: a number or [N] float32.
        chunk_size: rows at a time.
    Returns:
        log_probs [N] and entropies [N] (nats, at least 0), float32, equal on all ranks of the group; differentiable.
    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive.
    """
    if logits_NV.dim() != 2 or targets_N.shape != logits_NV.shape[:1]:
        raise ValueError(
            f"logits must be [N, V] and targets [N], got {tuple(logits_NV.shape)} and {tuple(targets_N.shape)}"
        )
    temperature_N = torch.as_tensor(temperature, dtype=torch.float32, device=logits_NV.device).expand(len(targets_N))
    if bool((temperature_N <= 0).any()):
        raise ValueError("temperature must be positive; score greedy samples at 1")
    columns, rank = logits_NV.shape[1], 0 if tp_group is None else tp_group.rank()
    total = columns * (1 if tp_group is None else tp_group.size())
    real = total if vocab_size is None else vocab_size
    if not 0 < real <= total:
        raise ValueError(f"vocab_size must lie in 1..{total} (the ranks' columns together), got {vocab_size}")
    rows = chunk_size or min(DEFAULT_CHUNK_SIZE, max(1, -(-len(targets_N) // 16)))
    return _LogProbsAndEntropy.apply(logits_NV, targets_N, temperature_N, tp_group, rank * columns, real, rows)  # type: ignore[return-value]


class _LogProbsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits_NV: Tensor,
        targets_N: Tensor,
        temperature_N: Tensor,
        tp_group: dist.ProcessGroup | None,
        first_column: int,
        vocab_size: int,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        num_tokens = len(targets_N)
        log_probs_N, entropies_N, log_z_N = (logits_NV.new_empty(num_tokens, dtype=torch.float32) for _ in range(3))
        local_N = targets_N - first_column
        real_columns = max(0, min(logits_NV.shape[1], vocab_size - first_column))
        for start in range(0, num_tokens, rows):
            part = slice(start, start + rows)
            scaled = _scaled(logits_NV[part], temperature_N[part], real_columns)
            if real_columns:
                maximum = scaled.amax(-1)
            else:
                maximum = scaled.new_full(scaled.shape[:1], float("-inf"))
            if tp_group is not None:
                dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
            scaled -= maximum[:, None]
            here = (local_N[part] >= 0) & (local_N[part] < real_columns)
            # Sums over the rank's columns: of exp(z), of z exp(z), and z of the target where this rank holds it.
            sums = scaled.new_zeros(3, scaled.shape[0])
            if real_columns:
                target = scaled.gather(1, local_N[part, None].clamp(0, real_columns - 1))[:, 0]
                sums[2] = target.where(here, 0)
            exponentials = scaled.exp()
            sums[0] = exponentials.sum(-1)
            # A forbidden token (-inf) has no part in the entropy; 0 * -inf would be NaN.
            sums[1] = exponentials.mul_(scaled.clamp_min_(-1e30)).sum(-1)
            if tp_group is not None:
                dist.all_reduce(sums, group=tp_group)
            log_sum = sums[0].log()
            log_probs_N[part] = sums[2] - log_sum
            entropies_N[part] = log_sum - sums[1] / sums[0]
            log_z_N[part] = log_sum + maximum
        # Rounding can leave a certain token's entropy slightly below zero.
        entropies_N.clamp_min_(0)
        ctx.save_for_backward(targets_N, temperature_N, log_z_N, entropies_N)
        # Not saved through autograd, whose version check would refuse the in-place backward.
        ctx.logits_NV = logits_NV.detach()
        ctx.first_column, ctx.real_columns, ctx.rows = first_column, real_columns, rows
        ctx.set_materialize_grads(False)
        return log_probs_N, entropies_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_probs_N: Tensor | None, grad_entropies_N: Tensor | None):  # type: ignore[override]
        if ctx.logits_NV is None:
            raise RuntimeError("the logits were overwritten by their gradient; this function goes backward only once")
        targets_N, temperature_N, log_z_N, entropies_N = ctx.saved_tensors
        logits_NV, ctx.logits_NV = ctx.logits_NV, None
        local_N = targets_N - ctx.first_column
        for start in range(0, len(targets_N), ctx.rows):
            part = slice(start, start + ctx.rows)
            log_p = _scaled(logits_NV[part], temperature_N[part], ctx.real_columns).sub_(log_z_N[part, None])
            p = log_p.exp()
            # d log p_target / dz_j = [j = target] - p_j ;  dH / dz_j = -p_j (log p_j + H)
            coefficient = torch.zeros_like(temperature_N[part])
            if grad_log_probs_N is not None:
                coefficient = coefficient - grad_log_probs_N[part]
            if grad_entropies_N is not None:
                weight = grad_entropies_N[part]
                grad = log_p.clamp_min_(-1e30).add_(entropies_N[part, None]).mul_(-weight[:, None])
                grad.add_(coefficient[:, None]).mul_(p)
            else:
                grad = p.mul_(coefficient[:, None])
            if grad_log_probs_N is not None and ctx.real_columns:
                here = (local_N[part] >= 0) & (local_N[part] < ctx.real_columns)
                column = local_N[part, None].clamp(0, ctx.real_columns - 1)
                grad.scatter_add_(1, column, grad_log_probs_N[part].where(here, 0)[:, None])
            grad.div_(temperature_N[part, None])
            logits_NV[part, : ctx.real_columns] = grad.to(logits_NV.dtype)
            logits_NV[part, ctx.real_columns :] = 0
        return logits_NV, None, None, None, None, None, None


def _scaled(logits: Tensor, temperature: Tensor, real_columns: int) -> Tensor:
    """A float32 copy of the real columns, divided by the temperature."""
    return logits[:, :real_columns].to(torch.float32, copy=True).div_(temperature[:, None])
