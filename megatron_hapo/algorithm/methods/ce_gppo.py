"""CE-GPPO: tokens outside the clip range keep a bounded gradient, weighted apart for each side.

Where PPO's clipping would drop the gradient:

    A < 0 and r < 1 - eps_low:    l = -beta_low (1 - eps_low) r / sg(r) A
    A > 0 and r > 1 + eps_high:   l = -beta_high (1 + eps_high) r / sg(r) A

and l = -r A elsewhere; sg takes no gradient. So such a token weighs like one at the bound, times beta. Unlikely tokens
with a negative advantage (beta_low, the paper's beta_1) lower the entropy when they are pushed on, those with a
positive one (beta_high, beta_2) raise it. Negative advantages are dual-clipped as in the released code.

Source: arXiv:2509.20712, equations of section 3, and the implementation in the authors' README; beta 0.75 and 1 are its
defaults (0.5 and 1 for their 1.5B model), with eps 0.2 on both sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hapo.algorithm.part import LossTokens, Part


class GradientPreserving(Part):
    """`gradient_preserving_loss` of the tokens."""

    choice = ("surrogate", "ce_gppo")

    def surrogate(
        self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor, low_N: Tensor, high_N: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ce_gppo = self.algorithm.ce_gppo
        return gradient_preserving_loss(
            ratio_N, advantages_N, low_N, high_N,
            beta_low=ce_gppo.beta_low, beta_high=ce_gppo.beta_high, dual_clip=self.algorithm.dual_clip,
        )  # fmt: skip


def gradient_preserving_loss(
    ratio_N: Tensor,
    advantages_N: Tensor,
    low_N: Tensor,
    high_N: Tensor,
    *,
    beta_low: float,
    beta_high: float,
    dual_clip: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the tokens [N], differentiable in the ratio, and the sums that `loss.clipped_surrogate` returns.

    Here `clipped_low` and `clipped_high` count the tokens whose gradient is bounded.
    """
    below_N = (ratio_N < 1 - low_N) & (advantages_N < 0)
    above_N = (ratio_N > 1 + high_N) & (advantages_N > 0)
    bound_N = torch.where(below_N, beta_low * (1 - low_N), beta_high * (1 + high_N))
    kept_N = bound_N * (ratio_N / ratio_N.detach())
    losses_N = -advantages_N * torch.where(below_N | above_N, kept_N, ratio_N)
    most_N = -advantages_N * dual_clip
    sums = {
        "clipped_low": below_N.sum(),
        "clipped_high": above_N.sum(),
        "dual_clipped": ((losses_N > most_N) & (advantages_N < 0)).sum(),
    }
    return torch.where(advantages_N < 0, torch.minimum(most_N, losses_N), losses_N), sums
