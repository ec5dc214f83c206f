"""Forking tokens: the policy gradient of the most uncertain tokens only, here on top of DAPO.

    L = -1/sum |o_i| sum_i sum_t [H_it >= tau] min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i)

tau is the entropy that the share rho = 0.2 of the batch's tokens reaches. As in the paper's formula the denominator
counts all tokens. Decided here: "the batch" is the step's, and the entropies are the old policy's, so that the choice
depends neither on mini-batches nor on the layout; tokens tied at tau are all kept.

Source: "Beyond the 80/20 rule", arXiv:2506.01939, section 5.1, equations 5 and 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forking_mask(entropies_N: Tensor, *, share: float = 0.2) -> Tensor:
    """Whether each token is among the `share` with the highest entropy, at least one token. [N] bool

    Raises:
        ValueError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    if not entropies_N.numel():
        return torch.zeros(0, dtype=torch.bool)
    # 0.2 * 5 is 1.0000000000000002: rounding must not add a token.
    count = max(1, math.ceil(share * entropies_N.numel() - 1e-9))
    threshold = entropies_N.topk(count).values[-1]
    return entropies_N >= threshold
