"""Settings of the methods that HAPO is compared with: a section for each, off by default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_hapo.config.effects import any_of, not_with, only_with
from megatron_hapo.config.faults import Fault
from megatron_hapo.config.section import ClipHigh, Fraction, Section, Strength

_FORKING_TOKENS = only_with("algorithm.forking_tokens.enabled", True)
_DUAL_CONSTRAINT = only_with("algorithm.dual_constraint.enabled", True)
_CLIP_COV = only_with("algorithm.clip_cov.enabled", True)
_KL_COV = only_with("algorithm.kl_cov.enabled", True)
_ENTROPIC = only_with("algorithm.entropic.enabled", True)
_REPO = only_with("algorithm.repo.enabled", True)
_REPO_ADAPTIVE = only_with("algorithm.repo.adaptive", True)
_BAPO = only_with("algorithm.bapo.enabled", True)
_ADAPO = only_with("algorithm.adapo.enabled", True)
_MULTI_TEMPERATURE = only_with("algorithm.multi_temperature.enabled", True)
USES_CLIP_RANGE = any_of(
    only_with("algorithm.surrogate", "clipped", "cispo", "ce_gppo"),
    only_with("algorithm.redistribution.enabled", True),
)
"""The clip range bounds the ratio, or is the neutral zone of the redistribution."""
_BONUS = only_with("algorithm.entropy_bonus.enabled", True)
_BONUS_TARGET = not_with("algorithm.entropy_bonus.target", None)

Nats = Annotated[float, Field(ge=0, le=100)]
"""A mean entropy per token."""
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(ge=1e-6, le=1e3)]
Bound = Annotated[float, Field(gt=0, le=1e3)]
"""Of an importance ratio."""


class ForkingTokensConfig(Section):
    """Train on the most uncertain tokens of the step only (arXiv:2506.01939)."""

    enabled: bool = False
    """Drop the gradient of all other tokens."""
    share: Annotated[Share, _FORKING_TOKENS] = 0.2
    """Share of the response tokens to keep (rho)."""


class DualConstraintConfig(Section):
    """Archer's constraints (arXiv:2507.15778). Tokens above an entropy quantile of their response are reasoning tokens;
    the others are knowledge tokens, which keep algorithm.clip_low and clip_high."""

    enabled: bool = False
    """Apply the constraints."""
    quantile: Annotated[Fraction, _DUAL_CONSTRAINT] = 0.8
    """Entropy quantile that separates the two kinds of tokens."""
    clip_low: Annotated[Fraction, _DUAL_CONSTRAINT, USES_CLIP_RANGE] = 0.5
    """Lower clip range of reasoning tokens."""
    clip_high: Annotated[ClipHigh, _DUAL_CONSTRAINT, USES_CLIP_RANGE] = 0.5
    """Upper clip range of reasoning tokens."""
    kl: Annotated[Strength, _DUAL_CONSTRAINT] = 0.001
    """Coefficient of the KL divergence of knowledge tokens from the policy before the step's first update."""


class EntropyBonusConfig(Section):
    """A bonus for the mean token entropy, with a fixed coefficient, or with one that follows a target
    (arXiv:2505.22312)."""

    enabled: bool = False
    """Add the bonus to the loss."""
    coefficient: Annotated[Strength, _BONUS] = 0.001
    """Loss per nat of mean entropy; with a target, the coefficient of the first step."""
    target: Annotated[Nats | None, _BONUS] = None
    """Mean entropy, in nats, above which there is no bonus, and below which its coefficient grows. None: the
    coefficient is fixed."""
    delta: Annotated[Strength, _BONUS, _BONUS_TARGET] = 1e-4
    """Change of the coefficient after each step."""
    max_coefficient: Annotated[Strength, _BONUS, _BONUS_TARGET] = 0.005
    """Upper bound of the coefficient; the lower one is 0."""

    def contradictions(self) -> Iterator[Fault]:
        """Why the bonus cannot be applied."""
        if self.enabled and self.target is not None and self.coefficient > self.max_coefficient:
            yield Fault(
                "algorithm.entropy_bonus.coefficient",
                f"must be at most algorithm.entropy_bonus.max_coefficient={self.max_coefficient:g}, "
                f"got {self.coefficient:g}",
                ("algorithm.entropy_bonus.max_coefficient",),
            )


class SapoConfig(Section):
    """SAPO's gate in place of clipping (arXiv:2511.20347)."""

    tau_positive: Annotated[Positive, only_with("algorithm.surrogate", "sapo")] = 1.0
    """Steepness of the gate for positive advantages; larger closes it sooner."""
    tau_negative: Annotated[Positive, only_with("algorithm.surrogate", "sapo")] = 1.05
    """Steepness of the gate for the others."""


class CeGppoConfig(Section):
    """CE-GPPO's gradients beyond the clip range (arXiv:2509.20712)."""

    beta_low: Annotated[Strength, only_with("algorithm.surrogate", "ce_gppo")] = 0.75
    """Weight of tokens below the range with a negative advantage (beta_1)."""
    beta_high: Annotated[Strength, only_with("algorithm.surrogate", "ce_gppo")] = 1.0
    """Weight of tokens above the range with a positive advantage (beta_2)."""


class ClipCovConfig(Section):
    """Clip-Cov (arXiv:2505.22617): no gradient for some tokens with a large covariance of log-prob and advantage."""

    enabled: bool = False
    """Drop the gradient of these tokens."""
    share: Annotated[Share, _CLIP_COV] = 2e-4
    """Share of the step's tokens, drawn from those in the range (r)."""
    lower: Annotated[Positive, _CLIP_COV] = 1.0
    """Covariances must exceed this (omega_low)."""
    upper: Annotated[Positive, _CLIP_COV] = 5.0
    """Covariances must be less than this (omega_high)."""

    def contradictions(self) -> Iterator[Fault]:
        """Why no token could be drawn."""
        if self.enabled and self.lower >= self.upper:
            yield Fault(
                "algorithm.clip_cov.lower",
                f"must be less than algorithm.clip_cov.upper={self.upper:g}, got {self.lower:g}",
                ("algorithm.clip_cov.upper",),
            )


class KlCovConfig(Section):
    """KL-Cov (arXiv:2505.22617): a penalty on the tokens with the largest covariance of log-prob and advantage."""

    enabled: bool = False
    """Penalise how far these tokens move from the policy before the step's first update."""
    share: Annotated[Share, _KL_COV] = 2e-3
    """Share of the step's tokens (k)."""
    coefficient: Annotated[Strength, _KL_COV] = 1.0
    """Loss per nat of |log-ratio| (beta)."""


class EntropicConfig(Section):
    """EntroPIC (arXiv:2511.15248): a proportional-integral controller of entropy."""

    enabled: bool = False
    """Weigh likely tokens by the sign of their advantage."""
    target: Annotated[Nats, _ENTROPIC] = 0.1
    """Mean entropy to keep, nats (H_target)."""
    proportional: Annotated[Strength, _ENTROPIC] = 1.0
    """Weight per nat of the step's error (K_p)."""
    integral: Annotated[Strength, _ENTROPIC] = 0.01
    """Weight per nat of the errors of all earlier steps (K_i)."""
    probability: Annotated[Fraction, _ENTROPIC] = 0.95
    """Tokens are likely above this probability."""


class RepoConfig(Section):
    """REPO (arXiv:2603.11682): advantages freed of their correlation with log-probs."""

    enabled: bool = False
    """Change the advantages by the token's log-prob."""
    form: Annotated[Literal["rescaled", "subtracted"], _REPO] = "rescaled"
    """`rescaled`: A (1 - zeta sign(A) log pi), REPO-R. `subtracted`: A - zeta (log pi + H)."""
    zeta: Annotated[float, Field(ge=-1, le=1), _REPO] = 1e-3
    """Strength; if adaptive, that of the first step. Positive raises the entropy."""
    adaptive: Annotated[bool, _REPO] = True
    """Halve or double zeta after each step, towards the target."""
    target: Annotated[Nats | None, _REPO, _REPO_ADAPTIVE] = None
    """Mean entropy to keep, nats. None: that of the first step."""
    zeta_min: Annotated[float, Field(ge=1e-12, le=1), _REPO, _REPO_ADAPTIVE] = 1e-4
    """Smallest |zeta|; a halving below it turns the sign."""
    zeta_max: Annotated[float, Field(ge=1e-12, le=1), _REPO, _REPO_ADAPTIVE] = 0.05
    """Largest |zeta|."""

    def contradictions(self) -> Iterator[Fault]:
        """Why the controller has no range."""
        if self.enabled and self.adaptive and self.zeta_min > self.zeta_max:
            yield Fault(
                "algorithm.repo.zeta_min",
                f"must be at most algorithm.repo.zeta_max={self.zeta_max:g}, got {self.zeta_min:g}",
                ("algorithm.repo.zeta_max",),
            )


class BapoConfig(Section):
    """BAPO (arXiv:2510.18927): clip bounds that balance positive against negative advantages, in place of clip_low and
    clip_high."""

    enabled: bool = False
    """Let the bounds follow the balance of the previous step."""
    target: Annotated[Strength, _BAPO] = 1.0
    """Positive over negative contributions to reach."""
    low: Annotated[Bound, _BAPO] = 0.6
    """Lower bound of the ratio at the start of the search."""
    low_max: Annotated[Bound, _BAPO] = 0.8
    """Largest lower bound."""
    low_step: Annotated[float, Field(ge=0.005, le=1e3), _BAPO] = 0.05
    """Step of the lower bound."""
    high: Annotated[Bound, _BAPO] = 1.2
    """Upper bound of the ratio at the start of the search."""
    high_max: Annotated[Bound, _BAPO] = 2.0
    """Largest upper bound."""
    high_step: Annotated[float, Field(ge=0.005, le=1e3), _BAPO] = 0.05
    """Step of the upper bound."""

    def contradictions(self) -> Iterator[Fault]:
        """Why the bounds are not in order."""
        bounds = {"low": self.low, "low_max": self.low_max, "1": 1.0, "high": self.high, "high_max": self.high_max}
        if self.enabled and sorted(bounds.values()) != [*bounds.values()]:
            yield Fault(
                "algorithm.bapo.low",
                f"the bounds must be in the order low, low_max, 1, high, high_max, got {list(bounds.values())}",
                tuple(f"algorithm.bapo.{name}" for name in ("low_max", "high", "high_max")),
            )
        elif self.enabled and (self.high_max - self.high) / self.high_step > 200:
            yield Fault(
                "algorithm.bapo.high_max",
                f"must be at most 200 steps of algorithm.bapo.high_step={self.high_step:g} above "
                f"algorithm.bapo.high={self.high:g}, got {self.high_max:g}",
                ("algorithm.bapo.high", "algorithm.bapo.high_step"),
            )


class AdapoConfig(Section):
    """ADAPO (arXiv:2603.11682): a clip_high that follows a target entropy, from algorithm.clip_high on."""

    enabled: bool = False
    """Widen clip_high after a step below the target, narrow it after one above."""
    target: Annotated[Nats | None, _ADAPO] = None
    """Mean entropy to keep, nats. None: that of the first step."""
    factor: Annotated[float, Field(gt=1, le=10), _ADAPO] = 1.1
    """What clip_high is multiplied with or divided by after a step."""
    max_change: Annotated[float, Field(gt=1, le=1e3), _ADAPO] = 4.0
    """It stays between algorithm.clip_high / max_change and algorithm.clip_high * max_change."""


class MultiTemperatureConfig(Section):
    """Two sampling temperatures (arXiv:2510.08892), separated at the entropy quantile algorithm.entropy.pivot."""

    enabled: bool = False
    """Sample tokens above the quantile at T (1 + tau), the others at T (1 - tau)."""
    tau: Annotated[float, Field(ge=0, lt=1), _MULTI_TEMPERATURE] = 0.1
    """Distance of both temperatures from T, relative to T."""
