"""CISPO: clips the importance weight instead of dropping the gradient of tokens outside the clip range.

    L = -1/sum |o_i| sum_i sum_t sg(clip(r_it, 1 - eps_low, 1 + eps_high)) A_i log pi(o_it),   sg: no gradient

Every token keeps its gradient, whatever its ratio, also rare tokens whose ratio grows fast. The paper leaves out the
lower bound (clip_low: 1 here) and tunes the upper one without naming its value (clip_high: the job's here, 0.2 in
verl's example). Decided here: the bound holds for both signs of the advantage, and there is no dual clip.

Source: MiniMax-M1, arXiv:2506.13585, equations 4 and 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hapo.algorithm.part import LossTokens, Part


class ClippedWeight(Part):
    """`clipped_weight_loss` of the tokens; with a ratio for each response, its clipped ratio weighs all its tokens."""

    choice = ("surrogate", "cispo")

    def surrogate(
        self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor, low_N: Tensor, high_N: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return clipped_weight_loss(tokens.log_probs, ratio_N, advantages_N, low_N, high_N)


def clipped_weight_loss(
    log_probs_N: Tensor, ratio_N: Tensor, advantages_N: Tensor, low_N: Tensor, high_N: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the tokens [N], differentiable in the log-probs, and the sums that `loss.clipped_surrogate` returns."""
    with torch.no_grad():
        weight_N = torch.minimum(torch.maximum(ratio_N, 1 - low_N), 1 + high_N)
        sums = {
            "clipped_low": (ratio_N < 1 - low_N).sum(),
            "clipped_high": (ratio_N > 1 + high_N).sum(),
            "dual_clipped": torch.zeros((), dtype=torch.int64, device=ratio_N.device),
        }
    return -weight_N * advantages_N * log_probs_N, sums
