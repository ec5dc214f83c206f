"""The rollout engines as Ray actors."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_hapo.config import Config
from megatron_hapo.errors import RolloutError, WeightSyncError
from megatron_hapo.launch.places import Place
from megatron_hapo.launch.ray.remote import death, gather, result
from megatron_hapo.observe.spans import SpanRecorder, Timeline, recorded
from megatron_hapo.resharding.receiving import ReceiveRequest
from megatron_hapo.rollout.dispatch import Dispatch
from megatron_hapo.types import InFlight, Prompt, Rollout, Sampling, WeightBucket

_GENERATIONS = 2
"""`generate` calls at a time: training's, one step ahead, and evaluation's. One more would wait its turn."""


class EngineActor:
    """Holds an sglang_ext Engine and forwards: generation in threads of its own, all else in one."""

    def __init__(self, config: Config, device: str, index: int, *, read_weights: bool):
        from sglang_ext.engine import Engine, EngineConfig

        rollout = config.rollout
        self._index, self.spans = index, SpanRecorder(f"engine {index}")
        self._in_flight: InFlight = config.weight_sync.in_flight
        self._engine = Engine(
            EngineConfig(
                model_path=config.model.path.absolute(),
                device=device,  # type: ignore[arg-type]  # "cpu" or "cuda"
                dtype=rollout.dtype,
                tp=rollout.tp,
                ep=rollout.ep,
                max_running_requests=rollout.max_running_requests,
                memory_fraction=rollout.memory_fraction,
                kv_cache_tokens=rollout.kv_cache_tokens,
                context_tokens=rollout.max_prompt_tokens + rollout.max_response_tokens,
                seed=(config.seed + index) % 2**32,  # as numpy wants it
                read_weights=read_weights,
                gives_memory_back=config.placement == "colocated",
            )
        )
        self._checksums: dict[str, list[int]] = {}

    def ready(self) -> None:
        """Answers once the engine has started and proved its hook."""

    @ray.method(concurrency_group="generation")  # read from the innermost function: no other decorator within
    def advance(self, call: int, prompts: Mapping[int, Prompt], sampling: Sampling) -> list[tuple[int, int, Rollout]]:
        with self.spans("advance"):
            return self._engine.advance(call, prompts, sampling)

    def begin_weight_update(self) -> None:
        self._checksums = {}
        self._engine.begin_weight_update(self._in_flight)

    @recorded
    def load_bucket(self, bucket: WeightBucket) -> None:
        self._engine.load_bucket(bucket)
        self._checksums |= bucket.checksums or {}

    @recorded
    def end_weight_update(self, policy_version: int) -> None:
        self.verify(self._checksums)
        self._engine.end_weight_update(policy_version)

    def resume(self) -> None:
        self._engine.resume()

    def sees(self, path: Path) -> bool:
        return path.exists()

    def prepare_receiving(self, plans: Sequence[str]) -> None:
        self._engine.prepare_receiving(plans)

    @recorded
    def receive_weights(self, request: ReceiveRequest) -> None:
        self.begin_weight_update()
        with self._named():
            self._engine.receive_weights(request)

    @recorded
    def verify(self, checksums: dict[str, list[int]]) -> None:
        if checksums:
            with self._named():
                self._engine.verify(checksums)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Puts the engine's number before the errors of a sync."""
        try:
            yield
        except WeightSyncError as error:
            raise WeightSyncError(f"engine {self._index}: {error}") from error

    def release_memory(self, parts: Sequence[str]) -> None:
        self._engine.release_memory(parts)

    def take_memory(self, parts: Sequence[str]) -> None:
        self._engine.take_memory(parts)

    def start_profile(self) -> None:
        self.spans.start()

    def finish_profile(self) -> Timeline:
        return self.spans.finish()

    def shutdown(self) -> None:
        self._engine.shutdown()


def _actor_options(tp: int, device: str, place: Place | None) -> dict[str, Any]:
    environment = {"GLOO_SOCKET_IFNAME": "lo"}  # the ranks of an engine share a node
    if device == "cpu":
        from sglang_ext import cpu

        environment |= cpu.environment(tp)
    num_gpus = tp if device == "cuda" else 0
    if place is not None and place.gpus:
        # GPUs that trainer ranks hold, in Ray's books too: Ray must neither count them twice nor hide them.
        num_gpus = 0
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(place.gpus), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return {
        "num_cpus": 0,
        "num_gpus": num_gpus,
        "runtime_env": {"env_vars": environment},
        "scheduling_strategy": ("DEFAULT" if place is None else NodeAffinitySchedulingStrategy(place.node, soft=False)),
    }


class RayRolloutPool:
    """protocols.RolloutPool over Ray actors, one an engine.

    Args:
        places: of each engine; None leaves the choice to Ray.
        read_weights: from the model folder. Without, the first sync brings them: a large model would be read once an
            engine, a Megatron checkpoint not at all, and SGLang (0.5.23) knows no stacked experts.
    """

    def __init__(
        self, config: Config, *, device: str, places: Sequence[Place] | None = None, read_weights: bool = False
    ):
        rollout = config.rollout
        self._timeout_seconds = rollout.timeout_seconds
        self._room = rollout.max_running_requests + max(1, rollout.max_running_requests // 8)
        options = [
            _actor_options(rollout.tp, device, None if places is None else places[index])
            for index in range(rollout.engines)
        ]
        remote: Any = ray.remote
        actor = remote(concurrency_groups={"generation": _GENERATIONS})(EngineActor)
        self._start = lambda index: actor.options(**options[index]).remote(
            config, device, index, read_weights=read_weights
        )
        self._engines: list[Any] = [self._start(index) for index in range(rollout.engines)]
        self._versions = [0]  # of every sync that all engines confirmed
        self._calls = itertools.count()
        self._synced = threading.Event()  # cleared while a sync is under way
        self._synced.set()
        self._plans: list[ray.ObjectRef] = []

    def wait_until_ready(self) -> None:
        """Returns when every engine has started and proved its temperature hook."""
        self._all(lambda engine: engine.ready.remote(), "starting", RolloutError)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        call, first_version = next(self._calls), len(self._versions) - 1
        dispatch = Dispatch(
            [len(prompt.token_ids) + sampling.max_response_tokens for prompt in prompts],
            samples=sampling.samples, engines=len(self._engines), room=self._room,
        )  # fmt: skip
        rollouts: dict[tuple[int, int], Rollout] = {}
        working: dict[ray.ObjectRef, tuple[int, Any]] = {}  # to the engine and its actor
        deadline = time.monotonic() + self._timeout_seconds
        while not dispatch.done:
            idle = sorted(set(range(len(self._engines))) - {engine for engine, _ in working.values()})
            for engine, groups in dispatch.assign(idle).items():
                if dispatch.busy(engine):
                    actor, given = self._engines[engine], {group: prompts[group] for group in groups}
                    working[actor.advance.remote(call, given, sampling)] = engine, actor
            engine, finished = self._first_finished(working, deadline)
            if finished is None:
                dispatch.lost(engine)
                continue
            for group, sample, rollout in finished:
                self._check_versions(engine, rollout, self._versions[first_version:])
                rollouts[group, sample] = rollout
                dispatch.finished(engine, group)
        return [[rollouts[group, sample] for sample in range(sampling.samples)] for group in range(len(prompts))]

    def _first_finished(
        self, working: dict[ray.ObjectRef, tuple[int, Any]], deadline: float
    ) -> tuple[int, list[tuple[int, int, Rollout]] | None]:
        """The first engine that answers, which is then no longer working, and the responses that it has finished; None
        if it died in a sync that has replaced it."""
        done, _ = ray.wait(list(working), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            late = ", ".join(f"engine {engine}" for engine in sorted(engine for engine, _ in working.values()))
            raise RolloutError(f"generating: no answer within {self._timeout_seconds:g} s from {late}")
        engine, actor = working.pop(done[0])
        try:
            return engine, result(done[0])
        except RayActorError as failure:
            self._synced.wait()
            if self._engines[engine] is actor:
                raise RolloutError(death(f"generating: engine {engine}", failure)) from None
            return engine, None

    def _check_versions(self, engine: int, rollout: Rollout, versions: Sequence[int]) -> None:
        """No token of other weights than those of the syncs that all engines confirmed goes into training."""
        others = set(rollout.policy_versions.tolist()) - set(versions)
        if others:
            raise RolloutError(
                f"engine {engine} holds version {others.pop()} of the weights, the last sync brought version "
                f"{versions[-1]} to all engines"
            )

    def update_weights(self, buckets: Iterator[Any], *, policy_version: int) -> None:
        self._synced.clear()
        self._all(lambda engine: engine.begin_weight_update.remote(), "beginning the weight update", WeightSyncError)
        for bucket in buckets:
            self._all(lambda engine, b=bucket: engine.load_bucket.remote(b), "loading weights", WeightSyncError)
        self._end_weight_update(policy_version)

    def sees(self, path: Path) -> bool:
        return all(self._all(lambda engine: engine.sees.remote(path), "looking for a shared folder", WeightSyncError))

    def prepare_receiving(self, plans: Sequence[Sequence[str]]) -> None:
        self._plans = [ray.put(plan) for plan in plans]
        self._prepare(range(len(plans)))

    def _prepare(self, engines: Iterable[int]) -> None:
        calls = {f"engine {i}": self._engines[i].prepare_receiving.remote(self._plans[i]) for i in engines}
        gather(calls, timeout_seconds=self._timeout_seconds, what="taking the plan", error=WeightSyncError)

    def receive_weights(self, requests: Sequence[ReceiveRequest], *, timeout_seconds: float) -> None:
        self._synced.clear()
        calls = {
            f"engine {index}": engine.receive_weights.remote(request)
            for index, (engine, request) in enumerate(zip(self._engines, requests, strict=True))
        }
        gather(calls, timeout_seconds=timeout_seconds, what="receiving weights", error=WeightSyncError)

    def finish_update(self, checksums: dict[str, list[int]] | None, *, policy_version: int) -> None:
        if checksums:
            shared = ray.put(checksums)
            self._all(lambda engine: engine.verify.remote(shared), "verifying weights", WeightSyncError)
        self._end_weight_update(policy_version)

    def _end_weight_update(self, policy_version: int) -> None:
        self._all(
            lambda engine: engine.end_weight_update.remote(policy_version), "ending the weight update", WeightSyncError
        )
        self._versions.append(policy_version)
        self._all(lambda engine: engine.resume.remote(), "resuming generation", WeightSyncError)
        self._synced.set()

    def release_memory(self, parts: Sequence[str]) -> None:
        self._all(lambda engine: engine.release_memory.remote(tuple(parts)), "giving memory back", RolloutError)

    def take_memory(self, parts: Sequence[str]) -> None:
        self._all(lambda engine: engine.take_memory.remote(tuple(parts)), "taking memory again", RolloutError)

    def replace_dead_engines(self, *, patience_seconds: float) -> list[int]:
        """Drop every engine that has died, or does not answer in time, and start another in its place.

        Returns:
            Their indices. The new engines hold random weights, under version 0.
        """
        deadline = time.monotonic() + patience_seconds
        answers = [engine.ready.remote() for engine in self._engines]
        dead = [index for index, answer in enumerate(answers) if not _answers(answer, deadline)]
        for index in dead:
            ray.kill(self._engines[index])
            self._engines[index] = self._start(index)
        if dead:
            self.wait_until_ready()
        if self._plans:
            self._prepare(dead)
        return dead

    def start_profile(self) -> None:
        self._all(lambda engine: engine.start_profile.remote(), "starting the profile", RolloutError)

    def finish_profile(self) -> list[Timeline]:
        return self._all(lambda engine: engine.finish_profile.remote(), "finishing the profile", RolloutError)

    def close(self) -> None:
        self._synced.set()
        for engine in self._engines:
            # shutdown first: it ends SGLang's own processes
            ray.wait([engine.shutdown.remote()], timeout=30)
            ray.kill(engine)

    def _all(self, call: Callable[[Any], ray.ObjectRef], what: str, error: type) -> list[Any]:
        calls = {f"engine {index}": call(engine) for index, engine in enumerate(self._engines)}
        return gather(calls, timeout_seconds=self._timeout_seconds, what=what, error=error)


def _answers(answer: ray.ObjectRef, deadline: float) -> bool:
    try:
        ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
    except (RayActorError, GetTimeoutError):
        return False
    return True
