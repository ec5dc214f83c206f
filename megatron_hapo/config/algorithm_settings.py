"""Settings of the algorithm: everything that a method chooses. Those of single rivals are in `rival_settings`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_hapo.config.effects import any_of, not_with, only_with
from megatron_hapo.config.faults import Fault
from megatron_hapo.config.kl_settings import KlConfig
from megatron_hapo.config.rival_settings import (
    USES_CLIP_RANGE,
    AdapoConfig,
    BapoConfig,
    CeGppoConfig,
    ClipCovConfig,
    DualConstraintConfig,
    EntropicConfig,
    EntropyBonusConfig,
    ForkingTokensConfig,
    KlCovConfig,
    MultiTemperatureConfig,
    RepoConfig,
    SapoConfig,
)
from megatron_hapo.config.section import ClipHigh, ClipLow, Fraction, Section, Strength

_TEMPERATURE = only_with("algorithm.adaptive_temperature.enabled", True)
_MULTI_TEMPERATURE = only_with("algorithm.multi_temperature.enabled", True)
_FIXED_BOUNDS = not_with("algorithm.bapo.enabled", True)
_CLIP = only_with("algorithm.adaptive_clip.enabled", True)
_REDISTRIBUTION = only_with("algorithm.redistribution.enabled", True)
_MODULATION = any_of(_TEMPERATURE, _CLIP, _REDISTRIBUTION)
_CORRECTION = only_with("algorithm.importance_correction.level", "token", "sequence")


class AdaptiveTemperatureConfig(Section):
    """Adaptive temperature sampling: T_t = T (1 + tau h_t)."""

    enabled: bool = True
    """Sample each token at its own temperature."""
    tau: Annotated[float, Field(ge=0, lt=1), _TEMPERATURE] = 0.05
    """Strength: T (1 + tau) is the temperature at h = 1."""
    rule: Annotated[Literal["scaled", "z_score"], _TEMPERATURE] = "scaled"
    """`scaled`: h in [-1, 1], as in the released code. `z_score`: in its place (log H - q) / rms without scaling, the
    paper's equation 8; T_t is kept between 0.1 T and 1.9 T."""


class AdaptiveClipConfig(Section):
    """Asymmetric adaptive clipping: wider downwards at low entropy, wider upwards at high entropy."""

    enabled: bool = True
    """Adapt the clip range of each token to its entropy."""
    alpha: Annotated[Strength, _CLIP] = 1.0
    """Strength: the range is 1 + alpha times as wide at |h| = 1."""


class RedistributionConfig(Section):
    """Differential advantage redistribution."""

    enabled: bool = True
    """Amplify advantages of uncertain tokens whose ratio moves, and damp those of certain tokens whose ratio stays."""
    beta: Annotated[Strength, _REDISTRIBUTION] = 1.0
    """Strength: such an advantage is scaled by 1 + beta h."""
    neutral_zone: Annotated[Literal["adapted", "base"], _REDISTRIBUTION] = "adapted"
    """Clip range whose inner half is the zone in which a ratio counts as standing still. `adapted`: of the token, after
    adaptive clipping, as in the released code. `base`: clip_low and clip_high, as in the paper."""


class EntropyConfig(Section):
    """The entropy modulation h, which the adaptive temperature, adaptive clipping and redistribution share."""

    pivot: Fraction = 0.8
    """Quantile of log entropy that separates high from low (rho)."""
    sign: Annotated[Literal["signed", "reference"], _MODULATION] = "signed"
    """`signed`: h in [-1, 1], as the method is described. `reference`: h is positive at low entropy, as in the
    authors' released code."""
    floor: Annotated[float, Field(ge=1e-30, le=1)] = 1e-6
    """Entropies are raised to at least this value (nats) before the logarithm, in trainer and sampler alike."""
    source: Annotated[Literal["old", "current", "micro_batch"], any_of(_CLIP, _REDISTRIBUTION)] = "old"
    """Entropies from which h in the loss is computed. `old`: the policy before the step's first update. `current`: the
    policy being updated, against the step's statistics. `micro_batch`: current entropies with statistics of each
    micro-batch, as in the authors' released code; the result then depends on the layout."""
    scale_quantile: Annotated[Annotated[float, Field(ge=0, lt=0.5)], _MODULATION] = 0.0
    """Share of tokens at either end whose log entropies do not stretch the scale of h, e.g. 0.001. 0 scales by the
    largest and the smallest."""


class ImportanceCorrectionConfig(Section):
    """Truncated importance sampling: the loss is weighted by pi_old / pi_engine. With stale rollouts, `token` and
    `clip` are the decoupled PPO objective with bounded weights."""

    level: Literal["none", "token", "sequence"] = "none"
    """`none`: no correction. `token`: one weight for each token. `sequence`: one weight for each response."""
    mode: Annotated[Literal["clip", "mask"], _CORRECTION] = "clip"
    """`clip`: weights are at most max_weight. `mask`: weights outside [1 / max_weight, max_weight] become 0."""
    max_weight: Annotated[float, Field(ge=1, le=1e6), _CORRECTION] = 2.0
    """Bound on the weights."""


class AlgorithmConfig(Section):
    """Advantage and loss. The defaults are HAPO; `configs/methods` has the other methods."""

    advantage: Literal["token_level_group_average", "group_mean", "entropy_driven", "group_quantile"] = (
        "token_level_group_average"
    )
    """`token_level_group_average`: HAPO. `group_mean`: GRPO. `entropy_driven`: EDGE-GRPO. `group_quantile`: QAE."""
    advantage_quantile: Annotated[Fraction, only_with("algorithm.advantage", "group_quantile")] = 0.4
    """Quantile of the group's rewards that is the baseline (K): larger leaves more right responses without weight."""
    norm_by_std: bool = True
    """Divide advantages by the group's standard deviation."""
    advantage_fallback: Annotated[
        Annotated[float, Field(gt=0, le=1e6)] | None,
        only_with("algorithm.advantage", "token_level_group_average"),
        only_with("algorithm.norm_by_std", True),
    ] = 5.0
    """A group with a normalised |advantage| of at least this value gets GRPO's advantage instead, as in the released
    code. `None`: no group does, as in the paper."""
    ratio: Literal["token", "sequence"] = "token"
    """`token`: each token has its own importance ratio. `sequence`: one ratio for each response (GSPO)."""
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"] = "token_mean"
    """Reduction of the loss over a mini-batch. `token_mean`: mean over tokens (DAPO, HAPO). `sequence_mean_token_mean`:
    mean over responses of their token means (GRPO, GSPO). `sequence_mean_token_sum_norm`: mean over responses of their
    token sums / rollout.max_response_tokens (Dr.GRPO)."""
    surrogate: Literal["clipped", "unclipped", "cispo", "sapo", "ce_gppo"] = "clipped"
    """What ratio and advantage of a token become. `clipped`: PPO's clipping, with a dual clip. `unclipped`: their
    product. `cispo`: the clipped ratio weighs the gradient of every token. `sapo`: a smooth gate. `ce_gppo`: clipped
    tokens keep a bounded gradient."""
    clip_low: Annotated[ClipLow, USES_CLIP_RANGE, _FIXED_BOUNDS] = 0.2
    """The importance ratio is clipped to at least 1 - clip_low; 1 is no lower bound."""
    clip_high: Annotated[ClipHigh, USES_CLIP_RANGE, _FIXED_BOUNDS] = 0.2
    """The importance ratio is clipped to at most 1 + clip_high."""
    dual_clip: Annotated[
        Annotated[float, Field(gt=1, le=1e6)], only_with("algorithm.surrogate", "clipped", "ce_gppo")
    ] = 10.0
    """Bound c on the loss of tokens with a negative advantage."""
    entropy: Annotated[EntropyConfig, any_of(_TEMPERATURE, _MULTI_TEMPERATURE, _CLIP, _REDISTRIBUTION)] = (
        EntropyConfig()
    )
    adaptive_temperature: AdaptiveTemperatureConfig = AdaptiveTemperatureConfig()
    adaptive_clip: AdaptiveClipConfig = AdaptiveClipConfig()
    redistribution: RedistributionConfig = RedistributionConfig()
    forking_tokens: ForkingTokensConfig = ForkingTokensConfig()
    dual_constraint: DualConstraintConfig = DualConstraintConfig()
    entropy_bonus: EntropyBonusConfig = EntropyBonusConfig()
    sapo: SapoConfig = SapoConfig()
    ce_gppo: CeGppoConfig = CeGppoConfig()
    clip_cov: ClipCovConfig = ClipCovConfig()
    kl_cov: KlCovConfig = KlCovConfig()
    entropic: EntropicConfig = EntropicConfig()
    repo: RepoConfig = RepoConfig()
    bapo: Annotated[BapoConfig, USES_CLIP_RANGE] = BapoConfig()
    adapo: Annotated[AdapoConfig, USES_CLIP_RANGE] = AdapoConfig()
    multi_temperature: MultiTemperatureConfig = MultiTemperatureConfig()
    kl: KlConfig = KlConfig()
    importance_correction: ImportanceCorrectionConfig = ImportanceCorrectionConfig()

    def contradictions(self, *, cp: int) -> Iterator[Fault]:
        """Why the algorithm cannot run at this context parallel size."""
        if self.entropy.source == "micro_batch" and cp > 1:
            yield Fault(
                "algorithm.entropy.source",
                f"must be old or current with parallel.cp={cp}, got micro_batch: no rank holds all tokens of a "
                "micro-batch",
                ("parallel.cp",),
            )
        if self.multi_temperature.enabled and self.adaptive_temperature.enabled:
            yield Fault(
                "algorithm.multi_temperature.enabled",
                "must be false with algorithm.adaptive_temperature.enabled=true: both set the sampler's temperature",
                ("algorithm.adaptive_temperature.enabled",),
            )
        uses_range = self.surrogate in ("clipped", "cispo", "ce_gppo") or self.redistribution.enabled
        if self.adaptive_clip.enabled and not uses_range:
            yield Fault(
                "algorithm.adaptive_clip.enabled",
                f"must be false with algorithm.surrogate={self.surrogate}, which has no clip range",
                ("algorithm.surrogate",),
            )
        if self.adapo.enabled and self.bapo.enabled:
            yield Fault(
                "algorithm.adapo.enabled",
                "must be false with algorithm.bapo.enabled=true: both set the upper clip bound",
                ("algorithm.bapo.enabled",),
            )
        for section in (self.kl, self.entropy_bonus, self.clip_cov, self.repo, self.bapo):
            yield from section.contradictions()
