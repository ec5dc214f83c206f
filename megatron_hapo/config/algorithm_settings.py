"""Settings of the algorithm: everything that a method chooses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from megatron_hapo.config.section import Fraction, Section


class AdaptiveTemperatureConfig(Section):
    """Adaptive temperature sampling: T_t = T (1 + tau h_t)."""

    enabled: bool = True
    tau: Annotated[float, Field(ge=0, lt=1)] = 0.05


class AdaptiveClipConfig(Section):
    """Asymmetric adaptive clipping: wider to the left at low entropy, to the right at high entropy."""

    enabled: bool = True
    alpha: Annotated[float, Field(ge=0)] = 1.0


class RedistributionConfig(Section):
    """Differential advantage redistribution."""

    enabled: bool = True
    beta: Annotated[float, Field(ge=0)] = 1.0


class EntropyConfig(Section):
    pivot: Fraction = 0.8
    """Quantile of log entropy that separates high from low (rho)."""
    sign: Literal["signed", "reference"] = "signed"
    """`signed`: h in [-1, 1], as the method is described. `reference`: low entropy comes out positive, as in the
    authors' released code."""
    floor: Annotated[float, Field(ge=1e-30)] = 1e-6
    """Entropies are raised to this many nats before the logarithm, in trainer and sampler alike."""
    source: Literal["old", "current", "micro_batch"] = "old"
    """Entropies behind h in the loss. `old`: of the policy before the step's first update. `current`: of the policy
    being updated, against the step's statistics. `micro_batch`: as the authors' released code, statistics per
    micro-batch of current entropies; the result then depends on the layout."""
    scale_quantile: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the tokens beyond which log entropies no longer stretch the scale of h, at either end, e.g. 0.001;
    0 takes the largest and the smallest."""


class ForkingTokensConfig(Section):
    """Gradient of the most uncertain tokens of the step only (arXiv:2506.01939)."""

    enabled: bool = False
    share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the response tokens that is kept (rho)."""


class DualConstraintConfig(Section):
    """Archer's constraints (arXiv:2507.15778): tokens above an entropy quantile of their response are reasoning tokens,
    the others knowledge tokens, which keep algorithm.clip_low and clip_high."""

    enabled: bool = False
    quantile: Fraction = 0.8
    clip_low: Fraction = 0.5
    """Of reasoning tokens."""
    clip_high: PositiveFloat = 0.5
    """Of reasoning tokens."""
    kl: Annotated[float, Field(ge=0)] = 0.001
    """Coefficient of the KL of knowledge tokens, to the policy before the step's first update."""


class ImportanceCorrectionConfig(Section):
    """Truncated importance sampling: weights pi_old / pi_engine on the loss."""

    level: Literal["none", "token", "sequence"] = "none"
    mode: Literal["clip", "mask"] = "clip"
    """`clip`: at most max_weight. `mask`: weights outside [1 / max_weight, max_weight] become 0."""
    max_weight: Annotated[float, Field(ge=1)] = 2.0


class AlgorithmConfig(Section):
    advantage: Literal["token_level_group_average", "group_mean", "entropy_driven"] = "token_level_group_average"
    """`token_level_group_average` (HAPO), `group_mean` (GRPO), or `entropy_driven` (EDGE-GRPO)."""
    norm_by_std: bool = True
    """Divide advantages by the group's standard deviation."""
    advantage_fallback: PositiveFloat = 5.0
    """A group with a normalised |advantage| of at least this much takes the GRPO advantage."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or of its whole response (GSPO)."""
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"] = "token_mean"
    """Over a mini-batch: mean over tokens (DAPO, HAPO); mean over responses of their token means (GRPO, GSPO); mean
    over responses of token sums / rollout.max_response_tokens (Dr.GRPO)."""
    clip_low: Fraction = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] = 10.0
    """Bound c on the loss of tokens with negative advantage."""
    entropy: EntropyConfig = EntropyConfig()
    adaptive_temperature: AdaptiveTemperatureConfig = AdaptiveTemperatureConfig()
    adaptive_clip: AdaptiveClipConfig = AdaptiveClipConfig()
    redistribution: RedistributionConfig = RedistributionConfig()
    forking_tokens: ForkingTokensConfig = ForkingTokensConfig()
    dual_constraint: DualConstraintConfig = DualConstraintConfig()
    importance_correction: ImportanceCorrectionConfig = ImportanceCorrectionConfig()
