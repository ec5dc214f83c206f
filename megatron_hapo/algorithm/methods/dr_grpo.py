"""Dr.GRPO: GRPO without its two biases, the division by the response's length and by the group's standard deviation.

    L = -1/B sum_i 1/L_max sum_t min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i),   A_i = R_i - mean R

The paper sums over tokens and leaves the divisor open ("a constant"; its code takes the generation budget). Here L_max
is `rollout.max_response_tokens`. The advantage is GRPO's with `algorithm.norm_by_std: false`.

Source: arXiv:2503.20783, section 3.2.
"""

from __future__ import annotations

from torch import Tensor

from megatron_hapo.algorithm.part import Part


class SequenceMeanTokenSumNorm(Part):
    """Mean over responses of their token sums / max_tokens."""

    choice = ("aggregation", "sequence_mean_token_sum_norm")

    def minibatch_weights(self, lengths_B: Tensor, *, max_tokens: int) -> Tensor:
        return fixed_length_weights(lengths_B, max_tokens=max_tokens)


def fixed_length_weights(lengths_B: Tensor, *, max_tokens: int) -> Tensor:
    """Weights that turn sum / (number of tokens) into sum / (B max_tokens). [N] float32

    B is the number of responses that have tokens.
    """
    num_responses = int((lengths_B > 0).sum())
    weights_B = (lengths_B.sum().double() / (num_responses * max_tokens)).float().expand(len(lengths_B))
    return weights_B.repeat_interleave(lengths_B)
