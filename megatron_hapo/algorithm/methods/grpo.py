"""GRPO: A_i = (R_i - mean R) / std R over the group, token ratios, symmetric clipping, mean of responses' token means.

    L = -1/B sum_i 1/|o_i| sum_t min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i)

The advantage is `megatron_hapo.advantage.group_mean_advantage`. Decided here: no KL to a reference policy (the paper
has one with coefficient 0.04; the methods compared with HAPO leave it out), and dual clip as in every method of this
package.

Source: DeepSeekMath, arXiv:2402.03300, equation 3.
"""

from __future__ import annotations

from torch import Tensor


def sequence_mean_weights(lengths_B: Tensor) -> Tensor:
    """Weights that turn sum / (number of tokens) into the mean over responses of their token means. [N] float32

    Each token of response i gets sum |o| / (B |o_i|), B the responses that have tokens.
    """
    lengths = lengths_B.double()
    num_responses = int((lengths_B > 0).sum())
    return (lengths.sum() / (num_responses * lengths)).float().repeat_interleave(lengths_B)
