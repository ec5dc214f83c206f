"""Verbs reach engines and trainer ranks by name, and only those that are declared."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, RayTaskError

import sglang_ext.engine
from megatron_hapo.config import load_config
from megatron_hapo.errors import RolloutError, WeightSyncError
from megatron_hapo.launch.ray.engine_actor import EngineActor
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.remote import death
from megatron_hapo.protocols import RolloutEngine, TrainerShard, TrainerWorker, declared_verbs, engine_failure
from megatron_hapo.resharding.hosts import this_host
from megatron_hapo.trainer.over_ranks import RankObject

_CONFIG = Path(__file__).parents[2] / "configs/demo_cpu.yaml"


class StubEngine:
    """Stands for sglang_ext's Engine in its actor."""

    def __init__(self, config: Any):
        self.config = config

    def release_memory(self, parts: tuple[str, ...]) -> str:
        return f"{self.config.name} releases {' '.join(parts)}"

    def verify(self, checksums: dict[str, list[int]]) -> None:
        raise WeightSyncError("other values")

    def take_memory(self, parts: tuple[str, ...]) -> None:
        raise RolloutError("no memory")

    def shutdown(self) -> None:
        raise AssertionError("not called")


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> EngineActor:
    monkeypatch.setattr(sglang_ext.engine, "Engine", StubEngine)
    return EngineActor(load_config(_CONFIG), "cpu", 3, read_weights=False)


def test_an_engine_is_called_by_the_name_of_a_declared_verb(actor: EngineActor) -> None:
    assert actor.call("release_memory", ("kv_cache",)) == "engine 3 releases kv_cache"


@pytest.mark.parametrize("verb", ["shutdown", "spans", "__reduce__", "relase_memory"])
def test_an_undeclared_verb_of_an_engine_is_refused(actor: EngineActor, verb: str) -> None:
    with pytest.raises(
        ValueError, match=rf"a rollout engine has no verb '{verb}'; its verbs are advance, begin_weight"
    ):
        actor.call(verb)


def test_errors_of_a_sync_name_the_engine_and_others_are_unchanged(actor: EngineActor) -> None:
    with pytest.raises(WeightSyncError, match=r"^engine 3: other values$"):
        actor.call("verify", {})
    with pytest.raises(RolloutError, match=r"^no memory$"):
        actor.call("take_memory", ())


def test_the_engine_implements_every_verb_with_the_declared_parameters() -> None:
    for verb in declared_verbs(RolloutEngine):
        implemented = inspect.signature(getattr(sglang_ext.engine.Engine, verb))
        assert implemented.parameters == inspect.signature(getattr(RolloutEngine, verb)).parameters, verb


def test_the_verb_decides_the_class_of_its_failures() -> None:
    assert engine_failure(RolloutEngine.receive_weights) is WeightSyncError
    assert engine_failure(RolloutEngine.take_memory) is RolloutError


class StubRank:
    def own_parameters(self) -> tuple[str, ...]:
        return ("weight",)

    def weight_buckets(self, *, verify: bool) -> Any:
        yield from ("first", "second") if verify else ()

    def shutdown(self) -> None:
        raise AssertionError("not called")


def test_a_trainer_rank_is_called_by_the_name_of_a_declared_verb() -> None:
    stub: Any = StubRank()
    rank = RankObject(stub, 0)
    assert list(rank.results("own_parameters", (), {})) == [("weight",)]
    assert list(rank.results("weight_buckets", (), {"verify": True})) == ["first", "second"]
    assert list(rank.results("host", (), {})) == [this_host()]
    with pytest.raises(
        ValueError, match=r"a trainer rank has no verb 'shutdown'; its verbs are damaged_files, export_hf, finish_prof"
    ):
        next(rank.results("shutdown", (), {}))


def test_the_process_of_a_rank_implements_what_the_shard_does_not() -> None:
    for verb in declared_verbs(TrainerWorker) - declared_verbs(TrainerShard):
        implemented = inspect.signature(getattr(RankObject, verb))
        assert implemented.parameters == inspect.signature(getattr(TrainerWorker, verb)).parameters, verb


def test_a_pool_broadcasts_a_verb_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's own code over a stand-in for Ray's actors and object store."""
    from megatron_hapo.launch.ray import engine_pool, remote

    class Method:
        def __init__(self, number: int):
            self.number = number

        def remote(self, verb: str, *args: Any) -> tuple[Any, ...]:
            return (self.number, verb, *args)

    pool: Any = object.__new__(RayRolloutPool)
    pool._engines = [type("Actor", (), {"call": Method(number)}) for number in range(2)]
    pool._timeout_seconds = 5.0
    seen: list[Any] = []
    monkeypatch.setattr(engine_pool, "gather", lambda calls, **options: seen.append(options) or list(calls.values()))
    monkeypatch.setattr(remote.ray, "put", lambda value: value)
    assert pool.broadcast(RolloutEngine.release_memory, ("weights",)) == [
        (0, "release_memory", ("weights",)),
        (1, "release_memory", ("weights",)),
    ]
    plans = [["a"], ["b"]]
    assert pool.scatter(RolloutEngine.prepare_receiving, plans) == [
        (0, "prepare_receiving", ["a"]),
        (1, "prepare_receiving", ["b"]),
    ]
    assert [(o["what"], o["error"], o["timeout_seconds"]) for o in seen] == [
        ("release_memory", RolloutError, 5.0),
        ("prepare_receiving", WeightSyncError, 5.0),
    ]


def test_a_constructor_that_failed_is_reported_by_its_error_without_the_traceback() -> None:
    text = (
        "\x1b[36mray::EngineActor.__init__()\x1b[39m (pid=1, ip=127.0.0.1)\n"
        '  File "connection.py", line 399, in _recv\n    raise EOFError\nEOFError\n\n'
        "During handling of the above exception, another exception occurred:\n\n"
        "\x1b[36mray::EngineActor.__init__()\x1b[39m (pid=1, ip=127.0.0.1)\n"
        '  File "engine.py", line 71, in __init__\n    self._engine = TokenEngine()\n'
        "RuntimeError: Rank 0 scheduler died during initialization (exit code: -9).\nSee its log."
    )
    task = RayTaskError("EngineActor.__init__", text, RuntimeError("Rank 0 scheduler died"))
    message = death("starting: engine 0", ActorDiedError.from_task_error(task))
    assert message == (
        "starting: engine 0: the process died: "
        "RuntimeError: Rank 0 scheduler died during initialization (exit code: -9). See its log."
    )


def test_a_process_that_was_killed_is_reported_without_ray_s_ids() -> None:
    context = ActorDiedErrorContext(
        error_message="The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR",
        **{"class_name": "EngineActor", "actor_id": b"a" * 16, "pid": 3, "ray_namespace": "n", "node_ip_address": "1"},
    )
    assert death("engine 0", ActorDiedError(context)) == (
        "engine 0: the process died: The actor died unexpectedly before finishing this task. "
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
    )
