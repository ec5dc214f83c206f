"""HAPO, and each of its components alone as in the paper's ablation: four switches over DAPO's objective.

| component | switch | formula |
| --- | --- | --- |
| adaptive temperature sampling | `algorithm.adaptive_temperature.enabled` | `entropy.adaptive_temperature` |
| token-level group average | `algorithm.advantage: token_level_group_average` | `advantage.token_level_group_average` |
| differential advantage redistribution | `algorithm.redistribution.enabled` | `loss.redistribute_advantage` |
| asymmetric adaptive clipping | `algorithm.adaptive_clip.enabled` | `loss.adaptive_clip_range` |

The entropies behind h come from `algorithm.entropy.source`: `old`, the policy before the step's first update, which
makes h a constant of the step; `current`, the policy being updated, against the step's statistics; `micro_batch`, the
released code's way, whose statistics are those of each micro-batch's current entropies, so that the result depends on
the layout. h never carries gradient.

Source: arXiv:2509.16591.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from megatron_hapo.entropy import EntropyStats, Sign, entropy_modulation, entropy_stats


def current_modulation(
    entropies_N: Tensor,
    stats: EntropyStats | None,
    *,
    source: Literal["current", "micro_batch"],
    pivot: float,
    sign: Sign,
    floor: float,
    scale_quantile: float = 0.0,
) -> Tensor:
    """h of a micro-batch from the current policy's entropies, without gradient. [N]

    Args:
        entropies_N: [N] nats, of one micro-batch.
        stats: of the step; needed by `current`.
    """
    entropies_N = entropies_N.detach()
    if source == "micro_batch":
        if not len(entropies_N):
            return entropies_N
        stats = entropy_stats(entropies_N, pivot=pivot, floor=floor, scale_quantile=scale_quantile)
    assert stats is not None, "entropy.source=current needs the step's statistics"
    return entropy_modulation(entropies_N, stats, sign=sign, floor=floor)
