"""Settings of the KL to a reference model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_hapo.config.effects import not_with, only_with
from megatron_hapo.config.faults import Fault
from megatron_hapo.config.section import NonNegativeInt, PositiveInt, Section, Strength

_KL = only_with("algorithm.kl.enabled", True)


class KlConfig(Section):
    """KL to a reference model, the one that the run starts from. docs/kl.md says what to choose."""

    enabled: bool = False
    """Keep the reference's weights in host memory, and regularize with the KL; one more forward pass a step."""
    coefficient: Annotated[Strength, _KL] = 0.001
    """Factor of the KL (beta); with a target, the first step's."""
    estimator: Annotated[Literal["k1", "k2", "k3"], _KL] = "k3"
    """Estimate of a token's KL from d = log policy - log reference. `k1`: d. `k2`: d^2 / 2. `k3`: exp(-d) - 1 + d."""
    where: Annotated[Literal["loss", "reward"], _KL] = "loss"
    """`loss`: coefficient times the tokens' mean is added to the loss, with the method's aggregation. `reward`:
    coefficient times the sum over a response is subtracted from its reward, before the advantages."""
    target: Annotated[Annotated[float, Field(gt=0, le=1e3)] | None, _KL] = None
    """KL in nats per token (metric kl/mean) towards which the coefficient adapts. `None`: the coefficient is fixed."""
    horizon: Annotated[PositiveInt, _KL, not_with("algorithm.kl.target", None)] = 10
    """Steps within which an adapting coefficient changes by about a fifth at most."""
    reset_every: Annotated[NonNegativeInt, _KL] = 0
    """Steps after which the policy replaces the reference; 0: never."""

    def contradictions(self) -> Iterator[Fault]:
        """Why the KL would not regularize."""
        if self.enabled and self.where == "loss" and self.estimator == "k1":
            yield Fault(
                "algorithm.kl.estimator",
                "must be k2 or k3 with algorithm.kl.where=loss, got k1: its gradient does not depend on the reference",
                ("algorithm.kl.where",),
            )
