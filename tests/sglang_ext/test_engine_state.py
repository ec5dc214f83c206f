"""The states of an engine: every call in every state, without SGLang."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest

from megatron_hapo.errors import RolloutError, WeightSyncError
from sglang_ext.engine_state import MEMORY_PARTS, TABLE, EngineState, Requests, Update, Verb, Weights

READY = EngineState(weights=Weights.LOADED, proved=True)
START_RANDOM = EngineState(weights=Weights.RANDOM)
SUBSETS = [
    frozenset(part for part, taken in zip(MEMORY_PARTS, bits, strict=True) if taken)
    for bits in product([0, 1], repeat=2)
]
EVERY_STATE = [
    EngineState(weights=weights, proved=proved, update=update, requests=requests, released=released)
    for weights, proved, update, requests, released in product(Weights, [False, True], Update, Requests, SUBSETS)
]  # fmt: skip
VERBS: tuple[Verb, ...] = get_args(Verb)


def is_allowed(verb: Verb, state: EngineState) -> bool:
    """What the table must say, written out once more and differently."""
    updating, paused = state.update in (Update.OPEN, Update.FLUSHED), state.requests is Requests.PAUSED
    can_sample = not state.released and state.weights is not Weights.LOST
    match verb:
        case "begin_weight_update" | "take_memory":
            return True
        case "pause" | "resume" | "release_memory":
            return not updating
        case "load_bucket" | "receive_weights" | "verify" | "end_weight_update":
            return updating and "weights" not in state.released
        case "self_test":
            return can_sample and not updating and not paused
        case "advance":
            return can_sample and (paused or not updating)


def expected_after(verb: Verb, state: EngineState, parts: frozenset[str]) -> EngineState:
    match verb:
        case "advance" | "load_bucket" | "verify":
            return state
        case "self_test":
            return replace(state, proved=state.weights is Weights.LOADED)
        case "pause":
            return replace(state, requests=Requests.PAUSED)
        case "resume":
            return replace(state, requests=Requests.RUNNING)
        case "begin_weight_update":
            return replace(state, update=Update.FLUSHED if state.update is Update.FLUSHED else Update.OPEN)
        case "receive_weights":
            return replace(state, update=Update.FLUSHED)
        case "end_weight_update":
            return replace(state, update=Update.CLOSED, weights=Weights.LOADED)
        case "release_memory":
            lost = "weights" in parts
            return replace(state, released=state.released | parts, weights=Weights.LOST if lost else state.weights)
        case "take_memory":
            return replace(state, released=state.released - parts)


def test_the_table_has_a_row_for_every_call() -> None:
    assert set(TABLE) == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_call_is_allowed_or_refused_in_every_state_and_leads_to_its_next(verb: Verb) -> None:
    for state, parts in product(EVERY_STATE, SUBSETS):
        assert state.allows(verb) == is_allowed(verb, state), f"{verb}: {state}"
        if is_allowed(verb, state):
            assert state.after(verb, tuple(parts)) == expected_after(verb, state, parts), f"{verb}: {state}"
            continue
        with pytest.raises(TABLE[verb].error) as caught:
            state.after(verb, tuple(parts))
        message = str(caught.value)
        assert message.startswith(f"{verb} requires ")
        assert f"but the engine {state}; calls allowed now: " in message
        listed = message.rpartition("calls allowed now: ")[2].split(", ")
        assert set(listed) == {other for other in VERBS if is_allowed(other, state)}


def test_a_refusal_names_the_call_the_state_and_what_is_allowed() -> None:
    with pytest.raises(WeightSyncError) as caught:
        READY.check("load_bucket")
    assert str(caught.value) == (
        "load_bucket requires an open update (begin_weight_update), but the engine is ready; calls allowed now: "
        "advance, self_test, pause, begin_weight_update, resume, release_memory, take_memory"
    )
    released = START_RANDOM.after("release_memory", MEMORY_PARTS)
    with pytest.raises(RolloutError, match=r"has released the memory of its kv_cache and weights; .* take_memory$"):
        released.check("advance")


def follow(state: EngineState, *calls: Verb | tuple[Verb, tuple[str, ...]]) -> EngineState:
    for call in calls:
        state = state.after(call) if isinstance(call, str) else state.after(*call)
    return state


def test_an_engine_without_weights_proves_its_sampling_once_it_has_the_real_ones() -> None:
    tested = START_RANDOM.after("self_test")
    assert not tested.proved
    assert not tested.due_for_proof
    received = follow(tested, "begin_weight_update", "receive_weights", "verify")
    assert not received.due_for_proof
    loaded = received.after("end_weight_update")
    assert loaded.due_for_proof
    assert not loaded.after("self_test").due_for_proof


def test_a_colocated_engine_proves_its_sampling_when_it_has_its_kv_cache_again() -> None:
    released = follow(START_RANDOM, "self_test", ("release_memory", MEMORY_PARTS))
    loaded = follow(
        released, ("take_memory", ("weights",)), "begin_weight_update", "receive_weights", "end_weight_update"
    )
    assert not loaded.due_for_proof
    assert follow(loaded, ("take_memory", ("kv_cache",))).due_for_proof


def test_a_kv_cache_alone_does_not_make_random_weights_provable() -> None:
    state = follow(START_RANDOM, ("release_memory", ("kv_cache",)), ("take_memory", ("kv_cache",)))
    assert not state.due_for_proof


def reachable(start: EngineState) -> Iterator[EngineState]:
    seen, waiting = {start}, [start]
    while waiting:
        state = waiting.pop()
        yield state
        for verb, parts in product(VERBS, SUBSETS):
            if state.allows(verb) and (after := state.after(verb, tuple(parts))) not in seen:
                seen.add(after)
                waiting.append(after)


@pytest.mark.parametrize("start", [READY, START_RANDOM])
def test_a_whole_sync_makes_every_reachable_engine_ready(start: EngineState) -> None:
    for state in reachable(start):
        synced = follow(
            state, ("take_memory", MEMORY_PARTS), "begin_weight_update", "receive_weights", "verify",
            "end_weight_update", "resume", "self_test",
        )  # fmt: skip
        assert synced == READY
