"""Which settings have an effect. A setting that a run would ignore is an error.

A setting declares, beside its type, the values of other settings that it needs:

    tau: Annotated[float, Field(ge=0, lt=1), only_with("algorithm.adaptive_temperature.enabled", True)] = 0.05

A declaration on a section holds for every setting in it; several declarations must all hold. `loading` checks them for
files and command line alike. A setting that sets its default counts as set.

Config files are layered: defaults, then bases, then the file, then the command line. A switch supersedes the settings
of earlier layers: an overlay may disable a part that its base has tuned, and the tuning then returns to its default. A
setting in the same layer as the switch that disables it, or in a later one, is an error.

Only what the config itself decides is declared. Not declared is what depends on

- the launcher: torchrun and Ray alone read different settings of `launch`;
- the command: `eval` is read by `megatron-hapo eval` even where eval.every is 0;
- the model: weight_sync.method=direct falls back to gather for a layout it does not know;
- the machine: with device=auto, settings for GPUs count as having an effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from megatron_hapo.config.section import fields_by_key, section_types, value_of

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Clause:
    """One setting has one of these values, or, with `excluded`, none of them."""

    key: str
    """The dotted key of the setting, e.g. parallel.tp."""
    values: tuple[Value, ...]
    excluded: bool

    def holds(self, config: BaseModel) -> bool:
        """Whether it is true of this config."""
        return (value_of(config, self.key) in self.values) != self.excluded


@dataclass(frozen=True)
class Condition:
    """A setting has an effect only if at least one of the clauses holds."""

    clauses: tuple[Clause, ...]

    def holds(self, config: BaseModel) -> bool:
        """Whether the setting has an effect in this config, as far as this condition is concerned."""
        return any(clause.holds(config) for clause in self.clauses)

    @property
    def keys(self) -> tuple[str, ...]:
        """The settings that decide."""
        return tuple(clause.key for clause in self.clauses)

    def why_not(self, config: BaseModel) -> str:
        """The values that disable the setting, e.g. "parallel.dp and parallel.cp are 1"."""
        texts = {key: _text(value_of(config, key)) for key in self.keys}
        if len(texts) > 1 and len(set(texts.values())) == 1:
            *others, last = texts
            return f"{', '.join(others)} and {last} are {texts[last]}"
        return " and ".join(f"{key} is {text}" for key, text in texts.items())


def only_with(key: str, *values: Value) -> Condition:
    """Field metadata: the setting has an effect only if the setting `key` has one of these values."""
    return Condition((Clause(key, values, excluded=False),))


def not_with(key: str, *values: Value) -> Condition:
    """Field metadata: the setting has no effect if the setting `key` has one of these values."""
    return Condition((Clause(key, values, excluded=True),))


def any_of(*conditions: Condition) -> Condition:
    """Field metadata: the setting has an effect only if at least one of these conditions holds."""
    return Condition(tuple(clause for condition in conditions for clause in condition.clauses))


def declared_conditions(
    schema: type[BaseModel], prefix: str = "", inherited: tuple[Condition, ...] = ()
) -> Iterator[tuple[str, tuple[Condition, ...]]]:
    """Each setting of the schema by its dotted key, with the conditions of it and of the sections around it."""
    for name, info in fields_by_key(schema).items():
        conditions = (*inherited, *(item for item in info.metadata if isinstance(item, Condition)))
        inner = list(section_types(info.annotation))
        if not inner:
            yield f"{prefix}{name}", conditions
        for section in inner:
            yield from declared_conditions(section, f"{prefix}{name}.", conditions)


def settings_without_effect(config: BaseModel) -> dict[str, tuple[Condition, ...]]:
    """The settings that a run of this config ignores by their dotted keys, with the conditions that do not hold."""
    failing = {
        key: tuple(condition for condition in conditions if not condition.holds(config))
        for key, conditions in declared_conditions(type(config))
    }
    return {key: conditions for key, conditions in failing.items() if conditions}


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "not set" if value is None else str(value)
