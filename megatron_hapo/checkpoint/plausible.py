"""Weights of a folder without checksums must at least be numbers that a trained model could have."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hapo.errors import ConfigError

LARGEST_WEIGHT = 65504.0
"""float16's largest number. A flipped bit among the upper exponent bits makes a weight 1e9 to 1e38 times as large."""


def check_plausible(weights: Tensor, name: str) -> None:
    """Check that weights are finite, of plausible size, and, if it is a matrix, not all zero.

    It is one pass over the tensor, at 3 GB/s of one busy core. A flipped bit of the mantissa is not found: only
    checksums find that.

    Args:
        name: begins the error message.
    Raises:
        ConfigError: in one line.
    """
    if weights.numel() == 0 or not weights.is_floating_point():
        return
    low, high = (float(value) for value in torch.aminmax(weights))  # NaN if there is one
    message = None
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        message = "contains NaN or infinity"
    elif max(-low, high) > LARGEST_WEIGHT:
        message = f"contains {low if -low > high else high:.3g}; a weight is at most {LARGEST_WEIGHT:g} in magnitude"
    elif low == high == 0 and weights.dim() > 1:
        message = "is all zero"
    if message is not None:
        raise ConfigError([f"model.path: {name} {message}: the file is damaged, or the training that wrote it failed"])
