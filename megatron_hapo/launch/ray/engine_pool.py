"""All rollout engines, as Ray actors."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from megatron_hapo.config import Config
from megatron_hapo.errors import RolloutError
from megatron_hapo.launch.places import GpuPlacement
from megatron_hapo.launch.ray.engine_actor import GENERATION, actor_options, engine_actor
from megatron_hapo.launch.ray.remote import death, gather, result, shared
from megatron_hapo.protocols import Finished, RolloutEngine, engine_failure
from megatron_hapo.rollout.dispatch import Dispatch
from megatron_hapo.types import Prompt, Rollout, Sampling

_SHUTDOWN_SECONDS = 30


class RayRolloutPool:
    """protocols.RolloutPool over Ray actors, one an engine.

    Args:
        placements: of each engine; None leaves the choice to Ray.
        read_weights: whether engines read the model folder. Otherwise the first sync brings the weights: each engine
            would read a large model once more, could not read a Megatron checkpoint at all, and SGLang (0.5.23) does
            not know stacked experts.
    """

    def __init__(
        self,
        config: Config,
        *,
        device: str,
        placements: Sequence[GpuPlacement] | None = None,
        read_weights: bool = False,
    ):
        rollout = config.rollout
        self._timeout_seconds = rollout.timeout_seconds
        self._room = rollout.max_running_requests + max(1, rollout.max_running_requests // 8)
        options = [
            actor_options(rollout.tp, device, None if placements is None else placements[index])
            for index in range(rollout.engines)
        ]
        actor = engine_actor()
        self._start = lambda index: actor.options(**options[index]).remote(
            config, device, index, read_weights=read_weights
        )
        self._engines: list[Any] = [self._start(index) for index in range(rollout.engines)]
        self._versions = [0]  # of every sync that all engines confirmed
        self._calls = itertools.count()
        self._synced = threading.Event()  # cleared while a sync is under way
        self._synced.set()

    def wait_until_ready(self) -> None:
        """Returns when every engine has started and proved its sampling."""
        self._gather(
            [engine.ready.remote() for engine in self._engines], what="starting", error=RolloutError,
            timeout_seconds=self._timeout_seconds,
        )  # fmt: skip

    # ----- verbs

    def broadcast[**P, R](
        self, verb: Callable[Concatenate[RolloutEngine, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> list[R]:
        values, named = [shared(value) for value in args], {name: shared(value) for name, value in kwargs.items()}
        calls = [engine.call.remote(verb.__name__, *values, **named) for engine in self._engines]
        return self._answers(verb, calls, self._timeout_seconds)

    def scatter[A, R](
        self,
        verb: Callable[[RolloutEngine, A], R],
        arguments: Sequence[A],
        *,
        timeout_seconds: float | None = None,
    ) -> list[R]:
        calls = [
            engine.call.remote(verb.__name__, argument)
            for engine, argument in zip(self._engines, arguments, strict=True)
        ]
        return self._answers(verb, calls, self._timeout_seconds if timeout_seconds is None else timeout_seconds)

    def _answers(self, verb: Callable[..., Any], calls: list[ray.ObjectRef], timeout_seconds: float) -> list[Any]:
        return self._gather(calls, what=verb.__name__, error=engine_failure(verb), timeout_seconds=timeout_seconds)

    def _gather(self, calls: list[ray.ObjectRef], **options: Any) -> list[Any]:
        return gather({f"engine {index}": call for index, call in enumerate(calls)}, **options)

    # ----- generation

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        """A group of `sampling.samples` rollouts for each prompt, in the prompts' order.

        Raises:
            RolloutError: an engine died outside of a sync, did not answer in time, or returned tokens of weights that
                not all engines had confirmed.
        """
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
                    working[_advance(actor, call, given, sampling)] = engine, actor
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
    ) -> tuple[int, list[Finished] | None]:
        """The first engine that answers, which is then removed from `working`, and the responses that it has finished;
        None if it died in a sync that has replaced it."""
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
        """Only tokens of weights that all engines had confirmed go into training."""
        others = set(rollout.policy_versions.tolist()) - set(versions)
        if others:
            raise RolloutError(
                f"engine {engine} holds version {others.pop()} of the weights, the last sync brought version "
                f"{versions[-1]} to all engines"
            )

    # ----- weights

    @contextlib.contextmanager
    def weight_update(self, *, policy_version: int) -> Iterator[None]:
        self._synced.clear()
        yield
        self.broadcast(RolloutEngine.end_weight_update, policy_version)
        self._versions.append(policy_version)
        self.broadcast(RolloutEngine.resume)
        self._synced.set()

    def replace_dead_engines(self, *, patience_seconds: float) -> list[int]:
        """Replaces every engine that has died, or does not answer in time.

        Returns:
            Their indices. The new engines hold random weights, under version 0, and know no plan.
        """
        deadline = time.monotonic() + patience_seconds
        answers = [engine.ready.remote() for engine in self._engines]
        dead = [index for index, answer in enumerate(answers) if not _answers_in_time(answer, deadline)]
        for index in dead:
            ray.kill(self._engines[index])
            self._engines[index] = self._start(index)
        if dead:
            self.wait_until_ready()
        return dead

    def close(self) -> None:
        """Ends all engines, and generation that waits for a sync."""
        self._synced.set()
        for engine in self._engines:
            # shutdown first: it ends SGLang's own processes
            ray.wait([engine.shutdown.remote()], timeout=_SHUTDOWN_SECONDS)
            ray.kill(engine)


def _advance(actor: Any, call: int, prompts: dict[int, Prompt], sampling: Sampling) -> ray.ObjectRef:
    verb = RolloutEngine.advance.__name__
    return actor.call.options(concurrency_group=GENERATION).remote(verb, call, prompts, sampling)


def _answers_in_time(answer: ray.ObjectRef, deadline: float) -> bool:
    try:
        ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
    except (RayActorError, GetTimeoutError):
        return False
    return True
