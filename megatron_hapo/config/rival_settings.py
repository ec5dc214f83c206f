"""Settings of the methods that HAPO is compared with: a section for each, off by default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megatron_hapo.config.effects import not_with, only_with
from megatron_hapo.config.faults import Fault
from megatron_hapo.config.section import ClipHigh, Fraction, Section, Strength

_FORKING_TOKENS = only_with("algorithm.forking_tokens.enabled", True)
_DUAL_CONSTRAINT = only_with("algorithm.dual_constraint.enabled", True)
_BONUS = only_with("algorithm.entropy_bonus.enabled", True)
_BONUS_TARGET = not_with("algorithm.entropy_bonus.target", None)

Nats = Annotated[float, Field(ge=0, le=100)]
"""A mean entropy per token."""


class ForkingTokensConfig(Section):
    """Train on the most uncertain tokens of the step only (arXiv:2506.01939)."""

    enabled: bool = False
    """Drop the gradient of all other tokens."""
    share: Annotated[float, Field(gt=0, le=1), _FORKING_TOKENS] = 0.2
    """Share of the response tokens to keep (rho)."""


class DualConstraintConfig(Section):
    """Archer's constraints (arXiv:2507.15778). Tokens above an entropy quantile of their response are reasoning tokens;
    the others are knowledge tokens, which keep algorithm.clip_low and clip_high."""

    enabled: bool = False
    """Apply the constraints."""
    quantile: Annotated[Fraction, _DUAL_CONSTRAINT] = 0.8
    """Entropy quantile that separates the two kinds of tokens."""
    clip_low: Annotated[Fraction, _DUAL_CONSTRAINT] = 0.5
    """Lower clip range of reasoning tokens."""
    clip_high: Annotated[ClipHigh, _DUAL_CONSTRAINT] = 0.5
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
