"""Two sampling temperatures: a higher one for uncertain tokens (reasoning), a lower one for the others (knowledge).

    T_t = T (1 + tau) where H_t > q, T (1 - tau) where H_t < q

q is the entropy at the quantile `algorithm.entropy.pivot` of the previous step's tokens, and H_t the entropy at the
base temperature T; the first step is sampled at T. This is HAPO's adaptive temperature with a step in place of its
slope, so the sampler's hook, the recorded temperatures and the trainer's comparison at T_t are shared. Decided here:
the threshold is a quantile of the step, the two temperatures lie symmetrically about T, and tau = 0.1, since the
paper's own values were not at hand. Its temperatures by rollout (each response of a group at its own) are left out.

Source: arXiv:2510.08892, abstract and introduction.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_hapo.algorithm.part import Part
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.types import AdaptiveTemperature, EntropyStats


class MultiTemperature(Part):
    """The two temperatures, as an adaptive one without spread about its pivot."""

    @classmethod
    def enabled(cls, algorithm: AlgorithmConfig) -> bool:
        return algorithm.multi_temperature.enabled

    def sampling(self, stats: EntropyStats) -> AdaptiveTemperature:
        step = replace(stats, log_max=stats.pivot, log_min=stats.pivot)
        return AdaptiveTemperature(
            stats=step, tau=self.algorithm.multi_temperature.tau, floor=self.algorithm.entropy.floor
        )
