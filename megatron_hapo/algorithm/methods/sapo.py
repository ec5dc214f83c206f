"""SAPO: a smooth gate in place of clipping, narrower for negative advantages.

    L = -1/B sum_i 1/|o_i| sum_t f(r_it) A_i,   f(r) = 4 / tau sigmoid(tau (r - 1))

with tau = tau_positive where A_i > 0, else tau_negative. The gradient is that of r A weighted by 4 p (1 - p), p =
sigmoid(tau (r - 1)): 1 at r = 1, and falling smoothly on both sides, on which neither sign of A is favoured.

Source: arXiv:2511.20347, section 3; tau 1.0 and 1.05 as in its released settings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hapo.algorithm.part import LossTokens, Part


class SoftGate(Part):
    """`soft_gate` of the ratio times the advantage; metric `loss/gate`: mean weight of the gradient."""

    choice = ("surrogate", "sapo")

    def surrogate(
        self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor, low_N: Tensor, high_N: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        none = torch.zeros((), dtype=torch.int64, device=ratio_N.device)
        return -soft_gate(ratio_N, self._tau(advantages_N)) * advantages_N, {
            "clipped_low": none, "clipped_high": none, "dual_clipped": none,
        }  # fmt: skip

    def sums(self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor) -> dict[str, Tensor]:
        open_N = torch.sigmoid(self._tau(advantages_N) * (ratio_N - 1))
        return {"gate": (4 * open_N * (1 - open_N)).sum()}

    def _tau(self, advantages_N: Tensor) -> Tensor:
        sapo = self.algorithm.sapo
        positive_N = torch.full_like(advantages_N, sapo.tau_positive)
        return torch.where(advantages_N > 0, positive_N, sapo.tau_negative)


def soft_gate(ratio_N: Tensor, tau_N: Tensor) -> Tensor:
    """f of each token's ratio, in (0, 4 / tau), with slope 1 at a ratio of 1. [N]"""
    return torch.sigmoid(tau_N * (ratio_N - 1)) * (4 / tau_N)
