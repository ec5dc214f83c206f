"""Dr.GRPO: GRPO without its two biases, the division by the response's length and by the group's standard deviation.

    L = -1/B sum_i 1/L_max sum_t min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i),   A_i = R_i - mean R

The paper sums over tokens and leaves the constant open ("a constant"; its code takes the generation budget): here L_max
is `rollout.max_response_tokens`.

Source: arXiv:2503.20783, section 3.2.
"""

from __future__ import annotations

from torch import Tensor


def fixed_length_weights(lengths_B: Tensor, *, max_tokens: int) -> Tensor:
    """Weights that turn sum / (number of tokens) into sum / (B max_tokens), B the responses that have tokens. [N]"""
    num_responses = int((lengths_B > 0).sum())
    weights_B = (lengths_B.sum().double() / (num_responses * max_tokens)).float().expand(len(lengths_B))
    return weights_B.repeat_interleave(lengths_B)
