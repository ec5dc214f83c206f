"""What deserves a warning in the metrics of a step: each condition once, and steps that are slower than usual.

The limits are this project's: they are meant to be silent in runs that learn, and say what to do where one does not.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator, Mapping

_FIRST_STEPS = 5
"""Steps whose median is what a run started from."""
_USUAL_STEPS = 20
"""Steps whose median is what a stage usually takes."""
_SLOW = 2.0
"""A step is slow if it takes this many times as long as usual, and at least a second longer."""
_STAGES = ("rollout", "reward", "memory_turn", "log_probs", "update", "weight_sync")

_ENTROPY = (
    "entropy/mean fell to {now:.3g} nats, less than a tenth of the {before:.3g} of the first steps: the policy "
    "explores little from here; raise algorithm.clip_high, lower optimizer.lr, or add algorithm.entropy_bonus"
)
_MISMATCH = (
    "rollout/mismatch_kl rose to {now:.3g} nats, from {before:.3g} in the first steps: engine and trainer no longer "
    "compute one policy; run `megatron-hapo check`, or set algorithm.importance_correction"
)
_TRUNCATION = (
    "{now:.0%} of the responses were cut off at rollout.max_response_tokens and mostly count as wrong: raise it, or "
    "shorten responses by reward.overlong.buffer_tokens"
)
_EQUAL_REWARDS = (
    "no group has both right and wrong responses, so this step teaches nothing: check the scorer (`megatron-hapo "
    "check` prints responses with their rewards), choose data of another difficulty, or set dynamic_sampling.enabled"
)


class StepWarnings:
    """Looks at every step's metrics, in their order; of a resumed run also at those before."""

    def __init__(self) -> None:
        self._first: dict[str, list[float]] = {}
        self._seconds: dict[str, deque[float]] = {}
        self._told: set[str] = set()

    def of_step(self, step: int, metrics: Mapping[str, float | None]) -> list[str]:
        """The warnings of this step, a line each. Row 0, the evaluation before training, has none."""
        if step == 0:
            return []
        found = dict(self._conditions(metrics))
        new = [text for name, text in found.items() if name not in self._told]
        self._told |= found.keys()
        slow = self._slow_stage(step, metrics)
        return new if slow is None else [*new, slow]

    def _conditions(self, metrics: Mapping[str, float | None]) -> Iterator[tuple[str, str]]:
        entropy, before = self._since_start("entropy/mean", metrics)
        if entropy is not None and before is not None and entropy < 0.1 * before:
            yield "entropy", _ENTROPY.format(now=entropy, before=before)
        # Tokens of older weights differ by what has been learned since.
        same_weights = not metrics.get("rollout/staleness_max")
        mismatch, before = self._since_start("rollout/mismatch_kl", metrics if same_weights else {})
        if mismatch is not None and before is not None and mismatch > max(10 * before, 1e-3):
            yield "mismatch", _MISMATCH.format(now=mismatch, before=before)
        truncated = metrics.get("response_length/truncated")
        if truncated is not None and truncated > 0.2:
            yield "truncation", _TRUNCATION.format(now=truncated)
        if metrics.get("rollout/informative_groups") == 0.0:
            yield "equal rewards", _EQUAL_REWARDS

    def _since_start(self, name: str, metrics: Mapping[str, float | None]) -> tuple[float | None, float | None]:
        """The metric now, and its median over the first steps, None until they have been made."""
        value, first = metrics.get(name), self._first.setdefault(name, [])
        if len(first) >= _FIRST_STEPS:
            return value, statistics.median(first)
        if value is not None:
            first.append(value)
        return value, None

    def _slow_stage(self, step: int, metrics: Mapping[str, float | None]) -> str | None:
        """Which stage made the step slower than usual; None if it was not."""
        usual = {name: statistics.median(past) for name, past in self._seconds.items() if len(past) >= _FIRST_STEPS}
        taken = {name: metrics.get(f"time/{name}") for name in ("step", *_STAGES)}
        seconds = {name: value for name, value in taken.items() if value is not None}
        for name, value in seconds.items():
            self._seconds.setdefault(name, deque(maxlen=_USUAL_STEPS)).append(value)
        total, normal = seconds.get("step"), usual.get("step")
        if total is None or normal is None or total < max(_SLOW * normal, normal + 1):
            return None
        excess = {name: value - usual[name] for name, value in seconds.items() if name in usual and name != "step"}
        stage = max(excess, key=excess.__getitem__, default=None)
        where = "" if stage is None else f", mostly in {stage}: {seconds[stage]:.1f} s, usually {usual[stage]:.1f} s"
        return f"step {step} took {total:.1f} s, usually {normal:.1f} s{where}"
