"""The states of an engine, and the table that says which call is allowed in which state and where it leads. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, NamedTuple

from megatron_hapo.errors import HapoError, RolloutError, WeightSyncError

Verb = Literal[
    "advance",
    "self_test",
    "pause",
    "begin_weight_update",
    "load_bucket",
    "receive_weights",
    "verify",
    "end_weight_update",
    "resume",
    "release_memory",
    "take_memory",
]
"""The calls that depend on the state. All other calls of an engine are allowed at any time and change nothing."""

MEMORY_PARTS = ("kv_cache", "weights")
"""What an engine can release, under SGLang's names."""


class Update(Enum):
    """The weight update."""

    CLOSED = "closed"
    OPEN = "open"
    """No token is sampled."""
    FLUSHED = "flushed"
    """Open, and nothing cached from the old weights is left."""


class Requests(Enum):
    """What becomes of requests."""

    RUNNING = "running"
    """SGLang serves them."""
    PAUSED = "paused"
    """They wait, new ones too, until `resume`."""


class Weights(Enum):
    """What the engine's parameters hold."""

    RANDOM = "random"
    """The engine was started without reading its weights. It can sample, as the self-test does at the start."""
    LOADED = "loaded"
    """The weights of the model folder or of the last update."""
    LOST = "lost"
    """Their memory has been released, and no update has ended since."""


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """The state of an engine."""

    weights: Weights
    proved: bool = False
    """Whether the self-test has passed on loaded weights. Random ones give all tokens similar probabilities at any
    temperature, and so prove nothing."""
    update: Update = Update.CLOSED
    requests: Requests = Requests.RUNNING
    released: frozenset[str] = frozenset()
    """The parts, of `MEMORY_PARTS`, that the engine does not hold."""

    def __str__(self) -> str:
        """The state as a predicate of "the engine"."""
        parts = []
        if self.updating:
            parts.append("is between begin_weight_update and end_weight_update")
        if self.paused:
            parts.append("has paused its requests")
        if self.released:
            parts.append(f"has released the memory of its {' and '.join(sorted(self.released))}")
        if self.weights is Weights.LOST and "weights" not in self.released:
            parts.append("has lost its weights")
        return ", ".join(parts) or "is ready"

    def allows(self, verb: Verb) -> bool:
        """Whether the call is allowed in this state."""
        return all(need.holds(self) for need in TABLE[verb].needs)

    def check(self, verb: Verb) -> None:
        """Raises the verb's error if the call is not allowed: what was called, in which state, what is allowed."""
        rule = TABLE[verb]
        missing = [need.text for need in rule.needs if not need.holds(self)]
        if missing:
            allowed = ", ".join(other for other in TABLE if self.allows(other))
            raise rule.error(
                f"{verb} requires {' and '.join(missing)}, but the engine {self}; calls allowed now: {allowed}"
            )

    def after(self, verb: Verb, parts: Sequence[str] = ()) -> EngineState:
        """The state to which an allowed call leads.

        Args:
            parts: the `MEMORY_PARTS` of `release_memory` and `take_memory`.
        """
        self.check(verb)
        assert {*parts} <= {*MEMORY_PARTS}, f"{verb}: parts must be among {MEMORY_PARTS}, got {tuple(parts)}"
        return TABLE[verb].leads_to(self, frozenset(parts))

    @property
    def updating(self) -> bool:
        """Whether an update is open."""
        return self.update is not Update.CLOSED

    @property
    def flushed(self) -> bool:
        """Whether the open update has flushed the caches."""
        return self.update is Update.FLUSHED

    @property
    def paused(self) -> bool:
        """Whether requests are paused."""
        return self.requests is Requests.PAUSED

    @property
    def due_for_proof(self) -> bool:
        """Whether the sampling can and must be proved now: on loaded weights, once after the start."""
        return self.weights is Weights.LOADED and not self.proved and self.allows("self_test")


class Need(NamedTuple):
    """A condition of a call, and the text of the error where it does not hold."""

    text: str
    holds: Callable[[EngineState], bool]


class Rule(NamedTuple):
    """When a call is allowed, what it raises otherwise, and the state to which it leads."""

    error: type[HapoError]
    needs: tuple[Need, ...]
    leads_to: Callable[[EngineState, frozenset[str]], EngineState]


def _stay(state: EngineState, _parts: frozenset[str]) -> EngineState:
    return state


def _prove(state: EngineState, _parts: frozenset[str]) -> EngineState:
    return replace(state, proved=state.weights is Weights.LOADED)


def _pause(state: EngineState, _parts: frozenset[str]) -> EngineState:
    return replace(state, requests=Requests.PAUSED)


def _resume(state: EngineState, _parts: frozenset[str]) -> EngineState:
    return replace(state, requests=Requests.RUNNING)


def _open(state: EngineState, _parts: frozenset[str]) -> EngineState:
    return state if state.updating else replace(state, update=Update.OPEN)


def _flush(state: EngineState, _parts: frozenset[str]) -> EngineState:
    return replace(state, update=Update.FLUSHED)


def _close(state: EngineState, _parts: frozenset[str]) -> EngineState:
    return replace(state, update=Update.CLOSED, weights=Weights.LOADED)


def _release(state: EngineState, parts: frozenset[str]) -> EngineState:
    return replace(
        state, released=state.released | parts, weights=Weights.LOST if "weights" in parts else state.weights
    )


def _take(state: EngineState, parts: frozenset[str]) -> EngineState:
    return replace(state, released=state.released - parts)


_UPDATE = Need("an open update (begin_weight_update)", lambda s: s.updating)
_NO_UPDATE = Need("that no update is open (end_weight_update)", lambda s: not s.updating)
_RUNNING = Need("running requests (resume)", lambda s: not s.paused)
_NOT_SAMPLING = Need(
    "that no update is open, or that it has paused the requests",
    lambda s: s.paused or not s.updating,
)
_ALL_MEMORY = Need("all of the engine's memory (take_memory)", lambda s: not s.released)
_WEIGHT_MEMORY = Need("the memory of the weights (take_memory)", lambda s: "weights" not in s.released)
_WEIGHTS = Need("weights (a whole update)", lambda s: s.weights is not Weights.LOST)

TABLE: dict[Verb, Rule] = {
    "advance": Rule(RolloutError, (_NOT_SAMPLING, _ALL_MEMORY, _WEIGHTS), _stay),
    "self_test": Rule(RolloutError, (_NO_UPDATE, _RUNNING, _ALL_MEMORY, _WEIGHTS), _prove),
    "pause": Rule(WeightSyncError, (_NO_UPDATE,), _pause),
    "begin_weight_update": Rule(WeightSyncError, (), _open),
    "load_bucket": Rule(WeightSyncError, (_UPDATE, _WEIGHT_MEMORY), _stay),
    "receive_weights": Rule(WeightSyncError, (_UPDATE, _WEIGHT_MEMORY), _flush),
    "verify": Rule(WeightSyncError, (_UPDATE, _WEIGHT_MEMORY), _stay),
    "end_weight_update": Rule(WeightSyncError, (_UPDATE, _WEIGHT_MEMORY), _close),
    "resume": Rule(WeightSyncError, (_NO_UPDATE,), _resume),
    "release_memory": Rule(RolloutError, (_NO_UPDATE,), _release),
    "take_memory": Rule(RolloutError, (), _take),
}
"""One row per call. A failed call changes nothing."""
