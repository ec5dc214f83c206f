"""Controllers of a method: what they set for a step, and the state that carries them to the next. Pure.

A controller is a part with `controls` and `next_state`. Its whole state is numbers by name, kept by the driver between
steps and saved in checkpoints, so a resumed run goes on exactly. Whatever it measures is exact over the whole step: the
trainer's scores of all tokens, and sums over the updates, reduced over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_hapo.algorithm.methods import enabled_parts
from megatron_hapo.algorithm.part import Part
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.types import TokenScores


def step_controls(state: Mapping[str, float], scores: TokenScores, algorithm: AlgorithmConfig) -> dict[str, float]:
    """What the enabled controllers set for the step's updates, by name.

    Args:
        state: after the previous step; empty before the first.
        scores: the trainer's, before the step's first update.
    """
    return _of_parts(algorithm, lambda part: part.controls(state, scores))


def next_state(
    state: Mapping[str, float],
    scores: TokenScores,
    updates: Sequence[Mapping[str, float]],
    algorithm: AlgorithmConfig,
) -> dict[str, float]:
    """The state of the enabled controllers after the step; that of others is dropped.

    Args:
        state, scores: as for `step_controls`.
        updates: metrics of each update, with the sums `measured/NAME`.
    """
    return _of_parts(algorithm, lambda part: part.next_state(state, scores, updates))


def _of_parts(algorithm: AlgorithmConfig, numbers: Callable[[Part], dict[str, float]]) -> dict[str, float]:
    found = [(name, float(value)) for part in enabled_parts(algorithm) for name, value in numbers(part).items()]
    names = [name for name, _ in found]
    assert len(set(names)) == len(names), f"several controllers use one name: {names}"
    return dict(found)
