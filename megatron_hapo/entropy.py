"""Entropy statistics, the modulation h and the adaptive temperature: pure functions of tensors.

Source: HAPO, arXiv:2509.16591, "adaptive temperature sampling" and its entropy normalisation; where the released code
and the text disagree, `sign` chooses. Entropies are in nats. `N` tokens, `R` rows of a sampling batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Sign = Literal["signed", "reference"]


_SQUARES_PER_UNIT = 1 << 24
"""Squares are summed as integers of this resolution, whose sum does not depend on the order."""
_TOKENS_AT_ONCE = 1 << 18
"""Whose squares stay in the processor's cache."""


@dataclass(frozen=True)
class EntropyStats:
    """Order statistics of log entropy over all response tokens of a step."""

    pivot: float
    """Pivot quantile of log entropy."""
    log_max: float
    """Largest log entropy, or its high quantile."""
    log_min: float
    """Smallest log entropy, or its low quantile."""
    rms: float
    """Root mean square of log entropy about the pivot; not used by the modulation, exported for the z-score of the
    paper's temperature formula."""
    num_tokens: int


def entropy_stats(
    entropy_N: Tensor, *, pivot: float = 0.8, floor: float = 1e-6, scale_quantile: float = 0.0
) -> EntropyStats:
    """Statistics of log entropy over these tokens, bit-identical for every order of them.

    The pivot is the k-th smallest log entropy, k = round_half_even(pivot (N - 1)), without interpolation. The released
    code computes the same, and calls the pivot `median` and the rms `std`.

    Args:
        entropy_N: nats, all valid response tokens of the step (global, not one rank's). float64 stays float64.
        pivot: in (0, 1).
        floor: entropies are raised to this many nats before the logarithm.
        scale_quantile: in [0, 0.5); with q > 0 log_max and log_min are the quantiles 1 - q and q (never on the other
            side of the pivot), so that single tokens do not stretch the scale of h; tokens beyond get h = 1 or -1.
    Raises:
        ValueError: no tokens, an entropy that is not finite, a pivot outside (0, 1), a scale_quantile outside [0, 0.5).
    """
    if not 0 < pivot < 1:
        raise ValueError(f"pivot must lie in (0, 1), got {pivot}")
    log_N = _log_entropy(entropy_N, floor).flatten()
    num_tokens = log_N.numel()
    if num_tokens == 0:
        raise ValueError("entropy statistics need at least one token, got none")
    if not 0 <= scale_quantile < 0.5:
        raise ValueError(f"scale_quantile must lie in [0, 0.5), got {scale_quantile}")

    def order_statistic(share: float) -> Tensor:
        # Python rounds half to even, as the reference does
        return log_N.kthvalue(round(share * (num_tokens - 1)) + 1).values

    quantile = order_statistic(pivot)
    if scale_quantile:
        log_max = torch.maximum(order_statistic(1 - scale_quantile), quantile)
        log_min = torch.minimum(order_statistic(scale_quantile), quantile)
    else:
        log_min, log_max = log_N.aminmax()
    total = 0
    for part in log_N.split(_TOKENS_AT_ONCE):
        squares = part.double().sub_(quantile.double()).square_()
        total += int(squares.mul_(_SQUARES_PER_UNIT).round_().long().sum())
    rms = math.sqrt(total / _SQUARES_PER_UNIT / num_tokens)
    return EntropyStats(float(quantile), float(log_max), float(log_min), rms, num_tokens)


def entropy_modulation(entropy_N: Tensor, stats: EntropyStats, *, sign: Sign = "signed", floor: float = 1e-6) -> Tensor:
    """Where each token's log entropy lies between the pivot (0) and the extremes, in [-1, 1].

    Above the pivot h = (log H - q) / (max - q); below, `signed` gives -(q - log H) / (q - min), `reference` (the
    authors' released code) the same without the minus. Tokens outside the statistics' range are clamped, which the
    released code does in the sampler only.

    Args:
        entropy_N: nats. float64 stays float64.
    Returns:
        h in the shape of the entropies, float32 unless they are float64; no gradient.
    Raises:
        ValueError: an entropy that is not finite, an unknown sign.
    """
    if sign not in ("signed", "reference"):
        raise ValueError(f"sign must be 'signed' or 'reference', got {sign!r}")
    distance_N = _log_entropy(entropy_N, floor) - stats.pivot
    # Guards as in the reference: a side without any spread gives 0, never 0 / 0.
    above_N = distance_N / max(stats.log_max - stats.pivot, 1e-12)
    below_N = distance_N / max(stats.pivot - stats.log_min, 1e-12)
    h_N = torch.where(distance_N > 0, above_N, below_N).clamp(-1, 1)
    return h_N.abs() if sign == "reference" else h_N


def adaptive_temperature(
    entropy_R: Tensor,
    base_R: Tensor | float,
    stats: EntropyStats,
    *,
    tau: float,
    sign: Sign = "signed",
    floor: float = 1e-6,
) -> Tensor:
    """T_t = T (1 + tau h), the temperature at which each row is sampled. [R]

    Args:
        entropy_R: [R], nats, of the row's logits divided by its base temperature.
        base_R: [R] or a number, base temperature.
        tau: in [0, 1); 0 gives the base temperature.
    Raises:
        ValueError: tau outside [0, 1), a base temperature for another number of rows, an entropy that is not finite.
    """
    if not 0 <= tau < 1:
        raise ValueError(f"tau must lie in [0, 1), got {tau}")
    if not isinstance(base_R, int | float) and base_R.dim() and base_R.shape != entropy_R.shape:
        raise ValueError(
            f"base temperature must be a number or have the entropies' shape {tuple(entropy_R.shape)}, "
            f"got {tuple(base_R.shape)}"
        )
    return base_R * (1 + tau * entropy_modulation(entropy_R, stats, sign=sign, floor=floor))


def entropy_from_logits(logits_RV: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, float32, clamped at 0: the unsharded reference. [R]"""
    log_probs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
    # exp(-inf) * -inf is NaN; a forbidden token adds nothing.
    terms_RV = torch.where(log_probs_RV.isneginf(), 0.0, log_probs_RV.exp() * log_probs_RV)
    return (-terms_RV.sum(-1)).clamp_min(0)


def _log_entropy(entropy_N: Tensor, floor: float) -> Tensor:
    """log(max(H, floor)) in float32, or float64 of float64; refuses NaN and infinity."""
    if not floor > 0:
        raise ValueError(f"floor must be positive, got {floor}")
    entropy_N = entropy_N.detach()
    finite_N = entropy_N.isfinite().flatten()
    if not bool(finite_N.all()):
        token = int((~finite_N).nonzero()[0])
        raise ValueError(f"entropy of token {token} is {float(entropy_N.flatten()[token])}; it must be finite")
    dtype = torch.float64 if entropy_N.dtype == torch.float64 else torch.float32
    return entropy_N.to(dtype).clamp_min(floor).log()
