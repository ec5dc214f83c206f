"""Entropy statistics, the modulation h and the adaptive temperature: pure functions of tensors.

Source: HAPO, arXiv:2509.16591, "adaptive temperature sampling" and its entropy normalisation. Where the released code
and the text disagree, `sign` selects one of them. Entropies are in nats. `N` tokens, `R` rows of a sampling batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_hapo.types import EntropyStats, Sign, TemperatureRule

_SQUARES_PER_UNIT = 1 << 24
"""Squares are summed as integers of this resolution, so that the sum does not depend on the order."""
_TOKENS_AT_ONCE = 1 << 18
"""Tokens per chunk of the sum of squares; a chunk fits into the processor's cache."""
_SMALLEST_SPREAD = 1e-12
"""As in the released code: a side of the pivot without any spread gives 0, never 0 / 0."""
_LARGEST_CHANGE = 0.9
"""Bound of the unscaled rule: T_t stays between 0.1 T and 1.9 T."""


def entropy_stats(
    entropy_N: Tensor, *, pivot: float = 0.8, floor: float = 1e-6, scale_quantile: float = 0.0
) -> EntropyStats:
    """Statistics of log entropy over these tokens, bit-identical for every order of them.

    The pivot is the k-th smallest log entropy, k = round_half_even(pivot (N - 1)), without interpolation. The released
    code computes the same, and calls the pivot `median` and the rms `std`.

    Args:
        entropy_N: nats, all valid response tokens of the step (global, not of one rank). float64 stays float64.
        pivot: in (0, 1).
        floor: entropies are raised to this many nats before the logarithm.
        scale_quantile: in [0, 0.5). With q > 0, log_max and log_min are the quantiles 1 - q and q (clamped to their
            side of the pivot), so that single tokens do not stretch the scale of h; tokens beyond get h = 1 or -1.
    Raises:
        ValueError: no tokens, a non-finite entropy, a pivot outside (0, 1), a scale_quantile outside [0, 0.5).
    """
    if not 0 < pivot < 1:
        raise ValueError(f"pivot must lie in (0, 1), got {pivot}")
    log_N = _checked(entropy_N, floor).clamp(min=floor).log().flatten()
    num_tokens = log_N.numel()
    if num_tokens == 0:
        raise ValueError("entropy statistics need at least one token, got none")
    if not 0 <= scale_quantile < 0.5:
        raise ValueError(f"scale_quantile must lie in [0, 0.5), got {scale_quantile}")

    def order_statistic(share: float) -> Tensor:
        # Python rounds half to even, as the released code does.
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
    """h of each token under one step's statistics: see `modulation`.

    Args:
        entropy_N: nats. float64 stays float64.
    Returns:
        h in the shape of the entropies, float32 unless they are float64; without gradient.
    Raises:
        ValueError: a non-finite entropy, an unknown sign.
    """
    unsigned, (above, below) = is_unsigned(sign), spreads(stats)
    return modulation(
        _checked(entropy_N, floor), floor=floor, pivot=stats.pivot, above=above, below=below, unsigned=unsigned
    )


def modulation(
    entropy: Tensor,
    *,
    floor: float | Tensor,
    pivot: float | Tensor,
    above: float | Tensor,
    below: float | Tensor,
    unsigned: bool | Tensor,
) -> Tensor:
    """h: where log entropy lies between the pivot (0) and the extremes (1 and -1), in [-1, 1].

    Above the pivot q, h = (log H - q) / above. Below it, the signed h is -(q - log H) / below; the unsigned one, of the
    authors' released code, is the same without the minus. Entropies beyond the extremes are clamped, which the released
    code does only in the sampler.

    Every argument is a number or a tensor with one value per entropy, so that the rows of one batch can follow
    different statistics. Tensor values decide nothing on the host: a GPU is never synchronised.

    Args:
        entropy: nats, float32 or float64.
        floor: entropies are raised to this many nats before the logarithm.
        above, below: spreads of log entropy on either side of the pivot, positive.
        unsigned: whether to drop the sign below the pivot (`sign: reference`).
    """
    distance = entropy.clamp(min=floor).log() - pivot  # type: ignore[call-overload]  # a number or a tensor
    h = torch.where(distance > 0, distance / above, distance / below).clamp(-1, 1)
    if isinstance(unsigned, bool):
        return h.abs() if unsigned else h
    return torch.where(unsigned, h.abs(), h)


def is_unsigned(sign: Sign) -> bool:
    """Whether h loses its sign below the pivot.

    Raises:
        ValueError: an unknown sign.
    """
    match sign:
        case "signed":
            return False
        case "reference":
            return True
        case _:
            raise ValueError(f"sign must be 'signed' or 'reference', got {sign!r}")


def spreads(stats: EntropyStats) -> tuple[float, float]:
    """Distance from the pivot to the largest and to the smallest log entropy, at least `_SMALLEST_SPREAD`."""
    return max(stats.log_max - stats.pivot, _SMALLEST_SPREAD), max(stats.pivot - stats.log_min, _SMALLEST_SPREAD)


def adaptive_temperature(
    entropy_R: Tensor,
    base_R: Tensor | float,
    stats: EntropyStats,
    *,
    tau: float,
    rule: TemperatureRule = "scaled",
    sign: Sign = "signed",
    floor: float = 1e-6,
) -> Tensor:
    """T_t = T (1 + tau h), the temperature at which each row is sampled. [R]

    Args:
        entropy_R: [R], nats, of the row's logits divided by its base temperature.
        base_R: [R] or a number, base temperature.
        tau: in [0, 1); 0 gives the base temperature.
        rule, sign: see `temperature_response`.
    Raises:
        ValueError: tau outside [0, 1), base temperatures of another shape, a non-finite entropy.
    """
    strength, above, below, unsigned = temperature_response(stats, tau=tau, rule=rule, sign=sign)
    if not isinstance(base_R, int | float) and base_R.dim() and base_R.shape != entropy_R.shape:
        raise ValueError(
            f"base temperature must be a number or have the entropies' shape {tuple(entropy_R.shape)}, "
            f"got {tuple(base_R.shape)}"
        )
    h_R = modulation(
        _checked(entropy_R, floor), floor=floor, pivot=stats.pivot, above=above, below=below, unsigned=unsigned
    )
    return base_R * (1 + strength * h_R)


def temperature_response(
    stats: EntropyStats, *, tau: float, rule: TemperatureRule, sign: Sign
) -> tuple[float, float, float, bool]:
    """(strength, spread above, spread below, unsigned), so that T_t = T (1 + strength modulation(H_t)).

    `scaled`, the released code: h in [-1, 1], so that tau is the largest relative change. `z_score`, the paper's
    equation 8: T_t = T (1 + tau (log H - q) / rms), where rms, the spread about the pivot, takes the place of the
    standard deviation, as it does in the released code. The equation has no bound, and where it is not positive there
    is no distribution: here the change is limited to `_LARGEST_CHANGE`, as modulation clamps at its spreads. Its sign
    is that of log H - q, whatever `sign` says.

    Raises:
        ValueError: tau outside [0, 1), an unknown sign or rule.
    """
    if not 0 <= tau < 1:
        raise ValueError(f"tau must lie in [0, 1), got {tau}")
    match rule:
        case "scaled":
            return tau, *spreads(stats), is_unsigned(sign)
        case "z_score":
            if tau == 0:
                return 0.0, 1.0, 1.0, False
            spread = max(stats.rms * _LARGEST_CHANGE / tau, _SMALLEST_SPREAD)
            return _LARGEST_CHANGE, spread, spread, False
        case _:
            raise ValueError(f"rule must be 'scaled' or 'z_score', got {rule!r}")


def entropy_from_logits(logits_RV: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, float32, clamped at 0: the unsharded reference. [R]"""
    log_probs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
    # exp(-inf) * -inf is NaN; a forbidden token adds nothing.
    terms_RV = torch.where(log_probs_RV.isneginf(), 0.0, log_probs_RV.exp() * log_probs_RV)
    return (-terms_RV.sum(-1)).clamp_min(0)


def _checked(entropy_N: Tensor, floor: float) -> Tensor:
    """The entropies without gradient, float32 or float64; refuses NaN, infinity and a floor that is not positive."""
    if not floor > 0:
        raise ValueError(f"floor must be positive, got {floor}")
    entropy_N = entropy_N.detach()
    finite_N = entropy_N.isfinite().flatten()
    if not bool(finite_N.all()):
        token = int((~finite_N).nonzero()[0])
        raise ValueError(f"entropy of token {token} is {float(entropy_N.flatten()[token])}; it must be finite")
    return entropy_N if entropy_N.dtype == torch.float64 else entropy_N.float()
