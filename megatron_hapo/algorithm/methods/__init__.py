"""One small module a method: its formulas, its source, and the parts (`algorithm.part.Part`) that apply them.

A new method is a module in this folder, found by itself; its settings in `config/algorithm_settings.py`, since configs
are read without torch; and an overlay in `configs/methods`. Nothing else lists methods.

All methods share the rollouts, rewards, entropies, mini-batches and the loss of `algorithm.objective`, which is
homogeneous in the advantages. An aggregation, a token filter or an importance correction is therefore a constant weight
of each token, known before the first micro-batch, and the result does not depend on the layout.

`B` responses, `N` response tokens.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache

from megatron_hapo.algorithm.part import Part
from megatron_hapo.config import AlgorithmConfig


def enabled_parts(algorithm: AlgorithmConfig) -> list[Part]:
    """The parts that these settings ask for, in the order in which they are applied.

    Raises:
        ValueError: a setting that is a choice has a value that no part, or more than one, implements.
    """
    enabled = [part for part in part_classes() if part.enabled(algorithm)]
    for setting in {part.choice[0] for part in part_classes() if part.choice is not None}:
        value = getattr(algorithm, setting)
        count = sum(part.choice == (setting, value) for part in enabled)
        if count != 1:
            raise ValueError(
                f"algorithm.{setting}={value}: exactly one part in algorithm/methods must implement it, {count} do"
            )
    return [part(algorithm) for part in enabled]


@cache
def part_classes() -> tuple[type[Part], ...]:
    """Every part of every method, in order."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = {
        value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Part) and value is not Part and not name.startswith("_")
    }
    return tuple(sorted(found, key=lambda part: (part.order, part.__module__, part.__qualname__)))


def first_answer[T](answers: Iterable[T | None]) -> T | None:
    """The first that is not None, of the answers of parts in their order; None if there is none."""
    return next((answer for answer in answers if answer is not None), None)
