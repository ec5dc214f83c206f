"""Softmax statistics of the rows of vocabulary-sharded logits, and the gradient that follows from them.

`N` tokens, `V` this rank's vocabulary columns. Per row, with m the maximum, x = (logit - m) / T, S = sum exp(x) and
M = sum x exp(x) / S:

    log p_t = x_t - log S          d log p_t / d logit_j = ([j = t] - p_j) / T
    H = log S - M                  d H / d logit_j = -p_j (x_j - M) / T

Where top-p or top-k cut the sampler's choice, log p_t is that of a softmax over the kept tokens (`kept_tokens`); the
entropy stays that of the whole vocabulary, from which the sampler's temperature follows.

Every rank reads its own columns once; two all-reduces of [N] combine the ranks' results. Nothing of size [N, V] exists
besides the logits: torch works on one tile (some rows, or some columns of a row) in two float32 buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hapo.logprobs.kept_tokens import Kept

MAX_TILE_SHARE = 16
"""A tile has at most 1/16 of the logits, so that both float32 buffers together add 2 x 4 / 16 bytes per element."""
CPU_TILE_ELEMENTS = 1 << 17  # two buffers fit into a core's L2 cache
GPU_TILE_ELEMENTS = 1 << 25  # enough to keep the device busy with each kernel
FAR_BELOW = -1e4
"""Lower bound of x, whose exp is 0. A forbidden token has x = -inf, and exp(x) x would be NaN."""


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary."""

    tp_group: dist.ProcessGroup | None
    first_column: int
    """Global token id of this rank's column 0."""
    real_columns: int
    """Columns that are not padding; may be 0."""
    vocab_size: int
    """Real size over all ranks."""

    @staticmethod
    def of(columns: int, *, tp_group: dist.ProcessGroup | None, vocab_size: int | None) -> VocabShard:
        """This rank's part, where rank r of the group holds the token ids [r columns, (r + 1) columns).

        Raises:
            ValueError: vocab_size is not in 1..(columns of all ranks).
        """
        tp_rank, tp_size = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
        total_columns = columns * tp_size
        real_size = total_columns if vocab_size is None else vocab_size
        if not 0 < real_size <= total_columns:
            raise ValueError(f"vocab_size must lie in 1..{total_columns} (all ranks' columns), got {vocab_size}")
        first_column = tp_rank * columns
        return VocabShard(tp_group, first_column, max(0, min(columns, real_size - first_column)), real_size)


@dataclass(frozen=True)
class RowStatistics:
    """Each row's statistics over the whole vocabulary, equal on all ranks of the group. [N], float32 or float64."""

    maximum: Tensor
    """m, maximum of the logits, not divided by the temperature."""
    sum_exp: Tensor
    mean_x: Tensor
    target_x: Tensor
    """x of the target; -inf for a forbidden one."""
    kept_log_sum: Tensor | None = None
    """Log of the sum of exp(x) over the kept tokens; None: all tokens are kept."""

    @property
    def log_probs(self) -> Tensor:
        """Log-prob of each row's target, among the kept tokens. [N]"""
        return self.target_x - (self.sum_exp.log() if self.kept_log_sum is None else self.kept_log_sum)

    @property
    def entropies(self) -> Tensor:
        """Entropy of each row in nats, clamped at 0: rounding can leave that of a certain token slightly below. [N]"""
        return (self.sum_exp.log() - self.mean_x).clamp_min_(0)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """All tensors, in the order of the fields."""
        return self.maximum, self.sum_exp, self.mean_x, self.target_x, self.kept_log_sum


@dataclass(frozen=True)
class RowGradient:
    """d loss / d logit_j = exp(x_j) (slope x_j + offset), plus kept_scale exp(x_j - kept_log_sum) for kept tokens, for
    all columns but the target. [N] each.
    """

    maximum: Tensor
    temperature: Tensor | None
    offset: Tensor
    slope: Tensor | None
    """None if the entropies carry no gradient."""
    target: Tensor
    """The target's gradient."""
    kept_scale: Tensor | None = None
    """None if the log-probs carry no gradient, or if all tokens are kept."""
    kept_log_sum: Tensor | None = None

    def of_rows(self, rows: slice) -> RowGradient:
        """The part of these rows."""
        return RowGradient(
            self.maximum[rows],
            _part(self.temperature, rows),
            self.offset[rows],
            _part(self.slope, rows),
            self.target[rows],
            _part(self.kept_scale, rows),
            _part(self.kept_log_sum, rows),
        )


# ----- forward


def local_statistics(logits_NV: Tensor, local_targets_N: Tensor, temperature_N: Tensor | None) -> Tensor:
    """This rank's maximum, sum of exp(x), sum of x exp(x), and the target's logit or, if another rank has it, 0. [4, N]

    x is relative to this rank's maximum. On a GPU one kernel reads the logits once; elsewhere torch works tile by tile.

    Args:
        logits_NV: [N, V], columns that are not padding; V may be 0.
        local_targets_N: [N] int64, counted from this rank's column 0; outside [0, V) if another rank has the target.
        temperature_N: [N]; None means 1.
    """
    if _has_kernel(logits_NV):
        from megatron_hapo.logprobs import row_statistics_triton

        return row_statistics_triton.local_statistics(logits_NV, local_targets_N, temperature_N)
    return local_statistics_in_tiles(logits_NV, local_targets_N, temperature_N)


def local_statistics_in_tiles(logits_NV: Tensor, local_targets_N: Tensor, temperature_N: Tensor | None) -> Tensor:
    """`local_statistics` in plain torch operators, on any device. [4, N]"""
    x_tile, exp_tile = _buffers(logits_NV)
    result_4N = x_tile.new_zeros(4, len(logits_NV))
    maximum_N, sum_exp_N, sum_x_exp_N, target_logit_N = result_4N
    # Finite even if the rank holds only forbidden tokens or padding: -inf - -inf would be NaN.
    lowest = torch.finfo(x_tile.dtype).min
    maximum_N.fill_(lowest)
    for rows, columns in _tiles(logits_NV):
        if columns.start == 0:
            maximum_N[rows] = logits_NV[rows].amax(-1).to(x_tile.dtype).clamp_min_(lowest)
        logits = logits_NV[rows, columns]
        x = _shifted(logits, maximum_N[rows], _part(temperature_N, rows), out=x_tile)
        exp = torch.exp(x, out=_shaped(exp_tile, logits))
        sum_exp_N[rows] += exp.sum(-1)
        sum_x_exp_N[rows] += exp.mul_(x).sum(-1)
    if logits_NV.shape[1]:
        here_N, targets = _positions(local_targets_N, logits_NV.shape[1])
        target_logit_N.copy_(logits_NV[targets].to(x_tile.dtype).where(here_N, 0))
    return result_4N


def local_kept_statistics(logits_NV: Tensor, kept: Kept, temperature_N: Tensor | None) -> Tensor:
    """Maximum, and sum of exp(x) relative to it, over the kept tokens that this rank holds. [2, N]

    Args:
        logits_NV: [N, V], columns that are not padding; V may be 0.
        kept: its columns counted from this rank's column 0.
        temperature_N: [N]; None means 1.
    """
    here_K, logits_K = kept.gather(logits_NV)
    dtype = statistics_dtype(logits_NV.dtype)
    lowest = torch.finfo(dtype).min
    logits_K = logits_K.to(dtype).where(here_K, lowest).clamp_min_(lowest)
    maximum_N = kept.reduce(logits_K, "max")
    exp_K = _kept_x(logits_K, maximum_N, temperature_N, kept).exp_().where(here_K, 0)
    return torch.stack([maximum_N, kept.reduce(exp_K, "sum")])


def combine(
    local_4N: Tensor,
    local_targets_N: Tensor,
    temperature_N: Tensor | None,
    shard: VocabShard,
    *,
    local_kept_2N: Tensor | None = None,
    chunk_size: int | None = None,
) -> RowStatistics:
    """The ranks' statistics combined: two all-reduces per `chunk_size` rows, which all ranks must call.

    Args:
        local_4N: `local_statistics`.
        local_kept_2N: `local_kept_statistics`; None: all tokens are kept.
    """
    local_maximum_N, local_sum_exp_N, local_sum_x_exp_N, target_logit_N = local_4N
    local_maxima = [local_maximum_N] if local_kept_2N is None else [local_maximum_N, local_kept_2N[0]]
    maxima = torch.stack(local_maxima, dim=1)
    _all_reduce(maxima, dist.ReduceOp.MAX, shard, chunk_size)
    maximum_N = maxima[:, 0].contiguous()
    # From sums relative to this rank's maximum to sums relative to the maximum over all ranks.
    shift_N = _over(local_maximum_N - maximum_N, temperature_N).clamp_min_(FAR_BELOW)
    factor_N = shift_N.exp()
    here_N = (local_targets_N >= 0) & (local_targets_N < shard.real_columns)
    sums = [
        factor_N * local_sum_exp_N,
        factor_N * (local_sum_x_exp_N + shift_N * local_sum_exp_N),
        _over(target_logit_N - maximum_N, temperature_N).where(here_N, 0),
    ]
    if local_kept_2N is not None:
        kept_shift_N = _over(local_kept_2N[0] - maxima[:, 1], temperature_N).clamp_min_(FAR_BELOW)
        sums.append(kept_shift_N.exp() * local_kept_2N[1])
    packed = torch.stack(sums, dim=1)
    _all_reduce(packed, dist.ReduceOp.SUM, shard, chunk_size)
    sum_exp_N, sum_x_exp_N, target_x_N, *kept_sum_N = packed.unbind(1)
    # Relative to their own maximum: after an update the kept tokens may all have become unlikely.
    kept_log_sum_N = [_over(maxima[:, 1] - maximum_N, temperature_N) + sum_N.log() for sum_N in kept_sum_N]
    return RowStatistics(maximum_N, sum_exp_N, sum_x_exp_N / sum_exp_N, target_x_N, *kept_log_sum_N)


def _all_reduce(values_N: Tensor, op: dist.ReduceOp.RedOpType, shard: VocabShard, chunk_size: int | None) -> None:
    if shard.tp_group is not None:
        for chunk in values_N.split(chunk_size or max(1, len(values_N))):
            dist.all_reduce(chunk, op=op, group=shard.tp_group)


# ----- backward


def row_gradient(
    statistics: RowStatistics,
    temperature_N: Tensor | None,
    grad_log_probs_N: Tensor | None,
    grad_entropies_N: Tensor | None,
) -> RowGradient:
    """What the gradient of the logits needs of each row, from the gradients of both outputs. Without collectives."""
    log_probs_N, sum_exp_N, mean_x_N = statistics.log_probs, statistics.sum_exp, statistics.mean_x
    weight_N = torch.ones_like(sum_exp_N) if temperature_N is None else temperature_N.reciprocal()
    offset_N, slope_N, target_N = torch.zeros_like(weight_N), None, torch.zeros_like(weight_N)
    kept_scale_N = None
    if grad_log_probs_N is not None:
        scaled_N = grad_log_probs_N * weight_N
        if statistics.kept_log_sum is None:
            offset_N -= scaled_N
        else:
            kept_scale_N = -scaled_N
        target_N -= scaled_N * torch.expm1(log_probs_N)
    if grad_entropies_N is not None:
        slope_N = -grad_entropies_N * weight_N
        offset_N -= slope_N * mean_x_N
        # A forbidden target has p = 0 and x = -inf.
        p_N = statistics.target_x.exp() / sum_exp_N
        target_N += slope_N * p_N * (statistics.target_x.clamp_min(FAR_BELOW) - mean_x_N)
        slope_N = slope_N / sum_exp_N
    return RowGradient(
        statistics.maximum,
        temperature_N,
        offset_N / sum_exp_N,
        slope_N,
        target_N,
        kept_scale_N,
        None if kept_scale_N is None else statistics.kept_log_sum,
    )


def overwrite_with_gradient(
    logits_NV: Tensor, local_targets_N: Tensor, gradient: RowGradient, kept: Kept | None = None
) -> None:
    """Overwrites the logits [N, V], columns that are not padding, with the gradient of the loss.

    On a GPU one kernel reads and writes each of them once; elsewhere torch works tile by tile.

    Args:
        kept: of these rows, its columns counted from this rank's column 0; None: all tokens are kept.
    """
    values_K = None if kept is None or gradient.kept_scale is None else _kept_gradient(logits_NV, gradient, kept)
    if values_K is not None and gradient.slope is None:
        logits_NV.zero_()
    elif _has_kernel(logits_NV):
        from megatron_hapo.logprobs import row_statistics_triton

        row_statistics_triton.overwrite_with_gradient(logits_NV, local_targets_N, gradient)
    else:
        overwrite_with_gradient_in_tiles(logits_NV, local_targets_N, gradient)
    if kept is not None and values_K is not None:
        kept.add_to(logits_NV, values_K)
        _set_targets(logits_NV, local_targets_N, gradient)


def _set_targets(logits_NV: Tensor, local_targets_N: Tensor, gradient: RowGradient) -> None:
    """Overwrites the targets' elements with their own gradient."""
    if logits_NV.shape[1]:
        # Indices: a mask would synchronise a GPU, and scatter_ would copy all bfloat16 logits.
        here_N, targets = _positions(local_targets_N, logits_NV.shape[1])
        logits_NV[targets] = torch.where(here_N, gradient.target.to(logits_NV.dtype), logits_NV[targets])


def _kept_gradient(logits_NV: Tensor, gradient: RowGradient, kept: Kept) -> Tensor:
    """What the log-probs add to the gradient of the kept tokens' logits, 0 for those of other ranks. [K]"""
    assert gradient.kept_scale is not None
    assert gradient.kept_log_sum is not None
    here_K, logits_K = kept.gather(logits_NV)
    x_K = _kept_x(logits_K.to(gradient.maximum.dtype), gradient.maximum, gradient.temperature, kept)
    values_K = gradient.kept_scale[kept.rows] * (x_K - gradient.kept_log_sum[kept.rows]).exp_()
    return values_K.where(here_K, 0)


def _kept_x(logits_K: Tensor, maximum_N: Tensor, temperature_N: Tensor | None, kept: Kept) -> Tensor:
    """x = (logit - m) / T of the kept tokens; finite. [K]"""
    x_K = logits_K - maximum_N[kept.rows]
    if temperature_N is not None:
        x_K.div_(temperature_N[kept.rows])
    return x_K.clamp_min_(FAR_BELOW)


def overwrite_with_gradient_in_tiles(logits_NV: Tensor, local_targets_N: Tensor, gradient: RowGradient) -> None:
    """`overwrite_with_gradient` without kept tokens in plain torch operators, on any device."""
    x_tile, exp_tile = _buffers(logits_NV)
    for rows, columns in _tiles(logits_NV):
        logits = logits_NV[rows, columns]
        x = _shifted(logits, gradient.maximum[rows], _part(gradient.temperature, rows), out=x_tile)
        p = torch.exp(x, out=_shaped(exp_tile, logits))
        if gradient.slope is None:
            p.mul_(gradient.offset[rows, None])
        else:
            p.mul_(x.mul_(gradient.slope[rows, None]).add_(gradient.offset[rows, None]))
        logits.copy_(p)
    _set_targets(logits_NV, local_targets_N, gradient)


# ----- arguments and results


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of sums and results for logits of this dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def temperature_of_rows(temperature: float | Tensor, like: Tensor) -> Tensor | None:
    """The temperature of each row [N], or None for 1; on the device of `like` [N, ...], in `statistics_dtype`.

    Raises:
        ValueError: a number that is not positive and finite, or a tensor whose shape is not [N].
    """
    dtype = statistics_dtype(like.dtype)
    if isinstance(temperature, int | float):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}; score greedy samples at 1")
        return None if temperature == 1 else like.new_full((len(like),), temperature, dtype=dtype)
    if temperature.dim() and temperature.shape != like.shape[:1]:
        raise ValueError(
            f"temperature must be a number or have shape [{len(like)}] as the tokens, got {tuple(temperature.shape)}"
        )
    return temperature.detach().to(like.device, dtype).expand(len(like))


def check_kept(kept: Kept | None, num_rows: int) -> None:
    """Raises ValueError if there are not kept tokens for each of so many rows."""
    if kept is not None and len(kept.lengths) != num_rows:
        raise ValueError(f"kept must have a length for each of the {num_rows} tokens, got {len(kept.lengths)}")


def check_results(
    targets_N: Tensor,
    temperature_N: Tensor | None,
    entropies_N: Tensor,
    shard: VocabShard,
    logits_of: Callable[[int], Tensor],
) -> None:
    """Checks inputs by their results, with one synchronisation: every fault shows in them, on every rank.

    Args:
        logits_of: returns this rank's columns of one token, without padding.
    Raises:
        ValueError: names the first token with a fault; for logits also the rank and the token id.
    """
    wrong_target_N = (targets_N < 0) | (targets_N >= shard.vocab_size)
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
        raise ValueError(f"targets must lie in [0, {shard.vocab_size}), got {int(targets_N[token])} for token {token}")
    raise ValueError(f"logits of token {token} {_fault(logits_of(token).detach(), shard)}")


def _fault(logits_V: Tensor, shard: VocabShard) -> str:
    """What is wrong with a row, and where; all ranks of the group must call."""
    bad = (logits_V.isnan() | logits_V.isposinf()).nonzero()
    column = int(bad[0]) if len(bad) else -1
    finding = torch.tensor(
        [column + shard.first_column if column >= 0 else -1, int(column >= 0 and bool(logits_V[column].isnan()))],
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


# ----- tiles


def _has_kernel(logits_NV: Tensor) -> bool:
    return logits_NV.device.type == "cuda" and logits_NV.dtype != torch.float64 and logits_NV.numel() > 0


def slices(length: int, step: int) -> Iterator[slice]:
    """Slices of size `step` that cover [0, length); the last one may be shorter."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _buffers(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Two work arrays of a tile's size in `statistics_dtype`."""
    dtype = statistics_dtype(logits_NV.dtype)
    size = min(_tile_elements(logits_NV), logits_NV.numel())
    return logits_NV.new_empty(size, dtype=dtype), logits_NV.new_empty(size, dtype=dtype)


def _tile_elements(logits_NV: Tensor) -> int:
    most = CPU_TILE_ELEMENTS if logits_NV.device.type == "cpu" else GPU_TILE_ELEMENTS
    return max(1, min(most, logits_NV.numel() // MAX_TILE_SHARE))


def _tiles(logits_NV: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile: whole rows, or parts of one row if a row is too large."""
    num_rows, num_columns = logits_NV.shape
    if not num_columns:
        return
    size = _tile_elements(logits_NV)
    # Parts of equal size: a small remainder would cost as many kernels as a full tile.
    width = -(-num_columns // -(-num_columns // size))
    for rows in slices(num_rows, max(1, size // num_columns)):
        for columns in slices(num_columns, width):
            yield rows, columns


def _shifted(logits: Tensor, maximum: Tensor, temperature: Tensor | None, *, out: Tensor) -> Tensor:
    """x = (logit - m) / T of a tile, in the buffer `out`; finite."""
    x = _shaped(out, logits).copy_(logits).sub_(maximum[:, None])
    if temperature is not None:
        x.div_(temperature[:, None])
    return x.clamp_min_(FAR_BELOW)


def _shaped(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer[: like.numel()].view(like.shape)


# ----- rows


def _part(values_N: Tensor | None, rows: slice) -> Tensor | None:
    return None if values_N is None else values_N[rows]


def _over(values_N: Tensor, temperature_N: Tensor | None) -> Tensor:
    return values_N if temperature_N is None else values_N / temperature_N


def _positions(local_targets_N: Tensor, num_columns: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Whether this rank holds each target [N], and its row and column; if it does not, any column of that row."""
    here_N = (local_targets_N >= 0) & (local_targets_N < num_columns)
    rows_N = torch.arange(len(local_targets_N), device=local_targets_N.device)
    return here_N, (rows_N, local_targets_N.clamp(0, num_columns - 1))
