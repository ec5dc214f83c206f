"""The adaptive temperature of a batch whose rows each follow their own statistics; imports no SGLang.

The formula is `megatron_hapo.entropy.modulation`; here its numbers travel with a request and become tensors, so that
one batch can mix requests of several steps, signs and taus. `R` rows of a sampling batch, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hapo.entropy import modulation, temperature_response
from megatron_hapo.types import AdaptiveTemperature

NEUTRAL = (0.0, 0.0, 1.0, 0.0, 1.0, 1.0)
"""Parameters of a row that keeps its base temperature: those of `row_parameters` with tau 0."""
_CHUNK_ELEMENTS = 1 << 24  # of logits; bounds the work space at 128 MiB however large the batch


def row_parameters(adaptive: AdaptiveTemperature) -> list[float]:
    """The numbers that travel with a request and become one row of `parameters_R6`.

    Strength, whether h loses its sign below the pivot, floor, pivot, spread above and spread below the pivot. The
    spreads are computed here in double precision, as `adaptive_temperature` does, so that the results agree bit by bit.
    """
    strength, above, below, unsigned = temperature_response(
        adaptive.stats, tau=adaptive.tau, rule=adaptive.rule, sign=adaptive.sign
    )
    return [strength, float(unsigned), adaptive.floor, adaptive.stats.pivot, above, below]


def temperature_factor(entropy_R: Tensor, parameters_R6: Tensor) -> Tensor:
    """1 + tau h of each row, exactly 1 where tau is 0. [R] float32"""
    tau_R, unsigned_R, floor_R, pivot_R, above_R, below_R = parameters_R6.unbind(1)
    h_R = modulation(entropy_R, floor=floor_R, pivot=pivot_R, above=above_R, below=below_R, unsigned=unsigned_R > 0)
    return torch.where(tau_R > 0, 1 + tau_R * h_R, 1.0)


def entropy_at_temperature(logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
    """Entropy of softmax(logits / temperature) of each row: nats, clamped at 0. [R] float32

    On a GPU one kernel reads the logits once. Elsewhere torch works in place on a few rows at a time: two work arrays
    of a chunk's size, however many rows there are.
    """
    if logits_RV.device.type == "cuda":
        from megatron_hapo.logprobs import row_statistics_triton

        return entropy_of(row_statistics_triton.local_statistics(logits_RV, None, temperature_R))
    rows = max(1, _CHUNK_ELEMENTS // logits_RV.shape[-1])
    parts = zip(logits_RV.split(rows), temperature_R.split(rows), strict=True)
    return torch.cat([_entropy(logits, temperature) for logits, temperature in parts])


def entropy_of(statistics_4R: Tensor) -> Tensor:
    """Entropy of rows from their `row_statistics.local_statistics`, which must cover the vocabulary. [R]"""
    _, sum_exp_R, sum_x_exp_R, _ = statistics_4R
    return (sum_exp_R.log() - sum_x_exp_R / sum_exp_R).clamp_min(0)


def _entropy(logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
    z_RV = logits_RV.float() / temperature_R[:, None]
    z_RV.sub_(z_RV.amax(-1, keepdim=True))
    z_RV.clamp_min_(-1e4)  # a forbidden token has -inf, and 0 * -inf would be NaN; exp(-1e4) is 0 as well
    p_RV = z_RV.exp()
    sum_R = p_RV.sum(-1)
    return (sum_R.log() - p_RV.mul_(z_RV).sum(-1) / sum_R).clamp_min(0)
