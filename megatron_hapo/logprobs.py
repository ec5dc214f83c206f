"""Log-probs of chosen tokens and entropies from vocabulary-sharded logits, exact, with gradient, in little memory.

`N` tokens, `V` this rank's vocabulary columns. Nothing of size [N, V] exists beside the logits: a pass works on one
tile (some rows, or some columns of a row) in two float32 buffers, and the backward overwrites the logits with their
gradient. Per row, with m the maximum, x = (logit - m) / T, S = sum exp(x) and M = sum x exp(x) / S:

    log p_t = x_t - log S          d log p_t / d logit_j = ([j = t] - p_j) / T
    H = log S - M                  d H / d logit_j = -p_j (x_j - M) / T
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_TILE_SHARE = 16
"""A tile is at most this part of the logits, so that both float32 buffers together add 2 x 4 / 16 bytes an element."""
CPU_TILE_ELEMENTS = 1 << 17  # two buffers stay in a core's L2 cache
GPU_TILE_ELEMENTS = 1 << 25  # enough to keep the device busy with each kernel
_FAR_BELOW = -1e4
"""exp of it is 0. A forbidden token has x = -inf, and exp(x) x would be NaN."""


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
    can go backward once. Without gradient the logits stay as they are.

    Two all-reduces a chunk, first the maxima, then the packed sums; every rank of the group must call. The results are
    looked at once (on a GPU one synchronisation).

    Args:
        logits_NV: [N, V] float32, bfloat16, float16 or float64, this rank's columns: rank r holds [r V, (r + 1) V).
            -inf is a token that cannot be chosen.
        targets_N: [N] int64, global token ids in [0, vocab_size). A forbidden target has log-prob -inf.
        tp_group: ranks that share the vocabulary; all of them call this with the same N. None: not sharded.
        vocab_size: real size; columns from there on are padding and are left out, whatever they hold.
        temperature: a positive number or [N].
        chunk_size: rows that share two all-reduces, at least 1; by default all. Does not change the memory needed.
    Returns:
        log_probs [N] and entropies [N] (nats, at least 0), equal on all ranks of the group; both differentiable.
        float32; float64 for float64 logits.
    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive, a target outside the vocabulary, logits
            that are NaN or +inf or all -inf; the message names the first such token, and the rank for logits.
    """
    if logits_NV.dim() != 2 or targets_N.shape != logits_NV.shape[:1]:
        raise ValueError(
            f"logits must be [N, V] and targets [N], got {tuple(logits_NV.shape)} and {tuple(targets_N.shape)}"
        )
    if not logits_NV.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits_NV.dtype}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    tp_rank, tp_size = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
    num_tokens, columns = logits_NV.shape
    total_columns = columns * tp_size
    real_size = total_columns if vocab_size is None else vocab_size
    if not 0 < real_size <= total_columns:
        raise ValueError(f"vocab_size must lie in 1..{total_columns} (all ranks' columns), got {vocab_size}")

    first_column = tp_rank * columns
    shard = _Shard(
        tp_group, first_column, max(0, min(columns, real_size - first_column)), chunk_size or max(1, num_tokens)
    )
    temperature_N = _temperature(temperature, logits_NV)
    log_probs_N, entropies_N = _LogProbsAndEntropy.apply(logits_NV, targets_N, temperature_N, shard)  # type: ignore[misc]
    _check(logits_NV, targets_N, temperature_N, entropies_N, shard, real_size)
    return log_probs_N, entropies_N


@dataclass(frozen=True)
class _Shard:
    tp_group: dist.ProcessGroup | None
    first_column: int
    """Global token id of this rank's column 0."""
    real_columns: int
    """Columns that are no padding; may be 0."""
    chunk_size: int
    """Rows of one all-reduce."""


class _LogProbsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, temperature_N: Tensor | None, shard: _Shard
    ) -> tuple[Tensor, Tensor]:
        real_NV = logits_NV[:, : shard.real_columns]
        local_maximum_N, local_sums_2N = _local_sums(real_NV, temperature_N)
        maximum_N = local_maximum_N.clone()
        _all_reduce(maximum_N, dist.ReduceOp.MAX, shard)
        # From sums relative to this rank's maximum to sums relative to the maximum of all.
        shift_N = _over(local_maximum_N - maximum_N, temperature_N).clamp_min_(_FAR_BELOW)
        factor_N = shift_N.exp()
        sum_exp_N, sum_x_exp_N = factor_N * local_sums_2N[0], factor_N * (local_sums_2N[1] + shift_N * local_sums_2N[0])
        target_x_N = _target_x(real_NV, targets_N - shard.first_column, maximum_N, temperature_N)
        packed_N3 = torch.stack([sum_exp_N, sum_x_exp_N, target_x_N], dim=1)
        _all_reduce(packed_N3, dist.ReduceOp.SUM, shard)
        sum_exp_N, sum_x_exp_N, target_x_N = packed_N3.unbind(1)
        log_sum_N, mean_x_N = sum_exp_N.log(), sum_x_exp_N / sum_exp_N
        log_probs_N = target_x_N - log_sum_N
        # Rounding can leave a certain token's entropy slightly below zero.
        entropies_N = (log_sum_N - mean_x_N).clamp_min_(0)

        if ctx.needs_input_grad[0]:
            temperature = () if temperature_N is None else (temperature_N,)
            ctx.save_for_backward(targets_N, maximum_N, sum_exp_N, mean_x_N, target_x_N, log_probs_N, *temperature)
            # Not saved through autograd, whose version check would refuse the in-place backward; the check is ours.
            ctx.logits_NV, ctx.version, ctx.shard = logits_NV.detach(), logits_NV._version, shard
        ctx.set_materialize_grads(False)
        return log_probs_N, entropies_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_probs_N: Tensor | None, grad_entropies_N: Tensor | None):  # type: ignore[override]
        logits_NV, ctx.logits_NV = ctx.logits_NV, None
        if logits_NV is None or logits_NV._version != ctx.version:
            raise RuntimeError(
                "the logits were changed since the forward pass, probably overwritten by their gradient: "
                "only one backward through them is possible"
            )
        targets_N, maximum_N, sum_exp_N, mean_x_N, target_x_N, log_probs_N, *rest = ctx.saved_tensors
        temperature_N = rest[0] if rest else None
        # d loss / d logit_j = p_j (slope x_j + offset), and another term for the target. Coefficients of [N] take in
        # all that is constant in a row.
        weight_N = torch.ones_like(maximum_N) if temperature_N is None else temperature_N.reciprocal()
        offset_N, slope_N, target_grad_N = torch.zeros_like(weight_N), None, torch.zeros_like(weight_N)
        if grad_log_probs_N is not None:
            scaled_N = grad_log_probs_N * weight_N
            offset_N -= scaled_N
            target_grad_N -= scaled_N * torch.expm1(log_probs_N)
        if grad_entropies_N is not None:
            slope_N = -grad_entropies_N * weight_N
            offset_N -= slope_N * mean_x_N
            # A forbidden target has p = 0 and x = -inf.
            target_grad_N += slope_N * log_probs_N.exp() * (target_x_N.clamp_min(_FAR_BELOW) - mean_x_N)
            slope_N = slope_N / sum_exp_N
        offset_N /= sum_exp_N

        shard: _Shard = ctx.shard
        real_NV = logits_NV[:, : shard.real_columns]
        x_tile, exp_tile = _buffers(real_NV)
        for rows, columns in _tiles(real_NV):
            logits = real_NV[rows, columns]
            x = _shifted(logits, maximum_N[rows], _part(temperature_N, rows), out=x_tile)
            p = torch.exp(x, out=_shaped(exp_tile, logits))
            if slope_N is None:
                p.mul_(offset_N[rows, None])
            else:
                p.mul_(x.mul_(slope_N[rows, None]).add_(offset_N[rows, None]))
            logits.copy_(p)
        if shard.real_columns:
            # Indices, not a mask, which would synchronise a GPU; and scatter_ would copy bfloat16 logits as a whole.
            here_N, targets = _positions(targets_N - shard.first_column, shard.real_columns)
            real_NV[targets] = torch.where(here_N, target_grad_N.to(real_NV.dtype), real_NV[targets])
        logits_NV[:, shard.real_columns :] = 0
        return logits_NV, None, None, None


def _local_sums(logits_NV: Tensor, temperature_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """This rank's maximum [N], and sums [2, N] relative to it: of exp(x) and of x exp(x)."""
    x_tile, exp_tile = _buffers(logits_NV)
    # Finite also where the rank holds forbidden tokens or padding only: -inf - -inf would be NaN.
    lowest = torch.finfo(x_tile.dtype).min
    maximum_N = x_tile.new_full((len(logits_NV),), lowest)
    sums_2N = x_tile.new_zeros(2, len(logits_NV))
    for rows, columns in _tiles(logits_NV):
        if columns.start == 0:
            maximum_N[rows] = logits_NV[rows].amax(-1).to(x_tile.dtype).clamp_min_(lowest)
        logits = logits_NV[rows, columns]
        x = _shifted(logits, maximum_N[rows], _part(temperature_N, rows), out=x_tile)
        exp = torch.exp(x, out=_shaped(exp_tile, logits))
        sums_2N[0, rows] += exp.sum(-1)
        sums_2N[1, rows] += exp.mul_(x).sum(-1)
    return maximum_N, sums_2N


def _target_x(logits_NV: Tensor, local_targets_N: Tensor, maximum_N: Tensor, temperature_N: Tensor | None) -> Tensor:
    """x of each target, 0 where another rank holds it. [N]"""
    if not logits_NV.shape[1]:
        return torch.zeros_like(maximum_N)
    here_N, targets = _positions(local_targets_N, logits_NV.shape[1])
    x_N = _over(logits_NV[targets].to(maximum_N) - maximum_N, temperature_N)
    return x_N.where(here_N, 0)


def _all_reduce(values_N: Tensor, op: Any, shard: _Shard) -> None:
    if shard.tp_group is not None:
        for chunk in values_N.split(shard.chunk_size):
            dist.all_reduce(chunk, op=op, group=shard.tp_group)


# ----- tiles


def _buffers(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Two work arrays of a tile's size in the precision of the sums."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    size = min(_tile_elements(logits_NV), logits_NV.numel())
    return logits_NV.new_empty(size, dtype=dtype), logits_NV.new_empty(size, dtype=dtype)


def _tile_elements(logits_NV: Tensor) -> int:
    most = CPU_TILE_ELEMENTS if logits_NV.device.type == "cpu" else GPU_TILE_ELEMENTS
    return max(1, min(most, logits_NV.numel() // MAX_TILE_SHARE))


def _tiles(logits_NV: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile: whole rows, or parts of one row when a row is too large."""
    num_rows, num_columns = logits_NV.shape
    if not num_columns:
        return
    size = _tile_elements(logits_NV)
    # Parts of one size: a small remainder would cost as many kernels as a full tile.
    width = -(-num_columns // -(-num_columns // size))
    for rows in _slices(num_rows, max(1, size // num_columns)):
        for columns in _slices(num_columns, width):
            yield rows, columns


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _shifted(logits: Tensor, maximum: Tensor, temperature: Tensor | None, *, out: Tensor) -> Tensor:
    """x = (logit - m) / T of a tile, in the buffer `out`; finite."""
    x = _shaped(out, logits).copy_(logits).sub_(maximum[:, None])
    if temperature is not None:
        x.div_(temperature[:, None])
    return x.clamp_min_(_FAR_BELOW)


def _shaped(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer[: like.numel()].view(like.shape)


# ----- rows


def _part(values_N: Tensor | None, rows: slice) -> Tensor | None:
    return None if values_N is None else values_N[rows]


def _over(values_N: Tensor, temperature_N: Tensor | None) -> Tensor:
    return values_N if temperature_N is None else values_N / temperature_N


def _positions(local_targets_N: Tensor, num_columns: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Whether this rank holds each target [N], and its row and column; some column of that row where it does not."""
    here_N = (local_targets_N >= 0) & (local_targets_N < num_columns)
    rows_N = torch.arange(len(local_targets_N), device=local_targets_N.device)
    return here_N, (rows_N, local_targets_N.clamp(0, num_columns - 1))


# ----- arguments and results


def _temperature(temperature: float | Tensor, logits_NV: Tensor) -> Tensor | None:
    """[N], or None for 1."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    if isinstance(temperature, int | float):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}; score greedy samples at 1")
        return None if temperature == 1 else logits_NV.new_full((len(logits_NV),), temperature, dtype=dtype)
    if temperature.dim() and temperature.shape != logits_NV.shape[:1]:
        raise ValueError(
            f"temperature must be a number or have shape [{len(logits_NV)}] as the tokens, "
            f"got {tuple(temperature.shape)}"
        )
    return temperature.detach().to(logits_NV.device, dtype).expand(len(logits_NV))


def _check(
    logits_NV: Tensor,
    targets_N: Tensor,
    temperature_N: Tensor | None,
    entropies_N: Tensor,
    shard: _Shard,
    vocab_size: int,
) -> None:
    """Look at the results, for which one synchronisation is enough; any fault shows in them on every rank."""
    wrong_target_N = (targets_N < 0) | (targets_N >= vocab_size)
    wrong_N = wrong_target_N | ~entropies_N.detach().isfinite()
    if temperature_N is not None:
        wrong_N = wrong_N | ~((temperature_N > 0) & temperature_N.isfinite())
    if not bool(wrong_N.any()):
        return
    token = int(wrong_N.nonzero()[0])
    if temperature_N is not None and not 0 < float(temperature_N[token]) < math.inf:
        raise ValueError(
            f"temperature must be positive and finite, got {float(temperature_N[token])} for token {token}; "
            "score greedy samples at 1"
        )
    if bool(wrong_target_N[token]):
        raise ValueError(f"targets must lie in [0, {vocab_size}), got {int(targets_N[token])} for token {token}")
    raise ValueError(f"logits of token {token} {_fault(logits_NV.detach()[token], shard)}")


def _fault(logits_V: Tensor, shard: _Shard) -> str:
    """What is wrong with a row, and where; all ranks of the group call together."""
    real_V = logits_V[: shard.real_columns]
    bad = (real_V.isnan() | real_V.isposinf()).nonzero()
    column = int(bad[0]) if len(bad) else -1
    finding = torch.tensor(
        [column + shard.first_column if column >= 0 else -1, int(column >= 0 and bool(real_V[column].isnan()))],
        device=logits_V.device,
    )
    if shard.tp_group is None:
        findings, ranks = [finding], [dist.get_rank() if dist.is_initialized() else 0]
    else:
        findings = [torch.empty_like(finding) for _ in range(shard.tp_group.size())]
        dist.all_gather(findings, finding, group=shard.tp_group)
        ranks = dist.get_process_group_ranks(shard.tp_group)
    for rank, (token_id, is_nan) in zip(ranks, (f.tolist() for f in findings), strict=True):
        if token_id >= 0:
            return f"are {'NaN' if is_nan else '+inf'} at vocabulary id {token_id} on rank {rank}; must be below +inf"
    return f"are all -inf on ranks {ranks}; at least one token must be possible"
