"""All rollout engines, as Ray actors.

An engine that dies while it generates is marked as dead, and its unfinished groups go to the others. The next weight
sync replaces it (`replace_dead_engines`): only the sync's thread may use the trainer, from which a new engine gets its
weights. If no engine is left, generation asks for a sync (`restore_with`), or waits for one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError

from megatron_hapo.config import Config
from megatron_hapo.errors import RolloutError
from megatron_hapo.launch.places import GpuPlacement
from megatron_hapo.launch.ray.engine_actor import GENERATION, actor_options, engine_actor
from megatron_hapo.launch.ray.remote import death, gather, result, shared
from megatron_hapo.observe import running_stages
from megatron_hapo.protocols import Finished, RolloutEngine, engine_failure
from megatron_hapo.rollout.dispatch import Dispatch
from megatron_hapo.types import GroupRequest, Prompt, Rollout, Sampling

logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 30
_POLL_SECONDS = 0.1
"""Between looks for new requests while an engine has room and others are waited for."""
_DEATHS_PER_ENGINE = 2
"""Deaths that one generation call survives, for each engine of the pool: whatever kills engines may be in its prompts.
"""


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
        self._timeout_seconds, self._read_weights = rollout.timeout_seconds, read_weights
        self._room = rollout.max_running_requests + max(1, rollout.max_running_requests // 8)
        options = [
            actor_options(
                rollout.tp,
                device,
                None if placements is None else placements[index],
                loopback=_is_single_host(),
                deterministic=config.deterministic,
            )
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
        self._state = threading.Condition()  # guards the following, and which actor an engine has
        self._dead: set[int] = set()  # engines that died while they generated
        self._without_weights: set[int] = set()  # replaced since the last sync
        self._waiting_for_sync = 0  # generation calls
        self._closed = False
        self._restore: Callable[[], bool] = lambda: False

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
        """A group of `sampling.samples` rollouts for each prompt, in the prompts' order; raises as `stream` does."""
        requests = [GroupRequest(prompt, sampling) for prompt in prompts]
        waiting = iter(requests)
        total = len(prompts) * sampling.samples
        groups = {id(request): group for request, group in self._stream(lambda: next(waiting, None), total)}
        return [groups[id(request)] for request in requests]

    def stream(self, requests: Callable[[], GroupRequest | None]) -> Iterator[tuple[GroupRequest, list[Rollout]]]:
        """Groups as they finish, of requests that are asked for whenever an engine has room.

        Groups that an engine's death leaves unfinished are generated again as a whole, from the same seeds. The stream
        ends when every group has finished and there is no request.

        Raises:
            RolloutError: engines kept dying, one did not answer in time, or returned tokens of weights that not all
                engines had confirmed.
        """
        return self._stream(requests)

    def _stream(
        self, requests: Callable[[], GroupRequest | None], total: int | None = None
    ) -> Iterator[tuple[GroupRequest, list[Rollout]]]:
        """`stream`; says how many responses of the `total` have finished, or of those requested so far."""
        call, numbers = next(self._calls), itertools.count()
        dispatch = Dispatch(engines=len(self._engines), room=self._room)
        unfinished: dict[int, _Unfinished] = {}
        working: dict[ray.ObjectRef, _Working] = {}
        holders: dict[int, Any] = {}  # the actor that generates an engine's groups
        deaths, version = 0, self._versions[-1]
        num_requested = num_finished = 0
        while True:
            running_stages.report(num_finished, total or num_requested, "responses")
            waited_for = {work.engine for work in working.values()}
            idle = {engine: actor for engine, actor in self._usable().items() if engine not in waited_for}
            for engine, holder in holders.items():
                if engine not in waited_for and idle.get(engine) is not holder:
                    dispatch.lost(engine)  # another call has noticed the death
            given: dict[int, list[int]] = {engine: [] for engine in idle}
            while True:
                for engine, groups in dispatch.assign(idle).items():
                    given[engine] += groups
                if not dispatch.wants_groups(idle) or (request := requests()) is None:
                    break
                unfinished[number := next(numbers)] = _Unfinished(request)
                num_requested += request.sampling.samples
                tokens = len(request.prompt.token_ids) + request.sampling.max_response_tokens
                dispatch.add(number, samples=request.sampling.samples, response_tokens=tokens)
            for engine, groups in given.items():
                for group in groups:
                    unfinished[group].first_version = len(self._versions) - 1
                if dispatch.busy(engine):
                    actor = holders[engine] = idle[engine]
                    sent = {group: unfinished[group].sent for group in groups}
                    deadline = time.monotonic() + self._timeout_seconds
                    working[_advance(actor, call, sent)] = _Working(engine, actor, deadline)
            if not working:
                if dispatch.done:
                    return
                self._wait_for_weights()
                continue
            answer = self._first_finished(working, looks_for_requests=not all(map(dispatch.busy, idle)))
            if answer is None:
                continue
            engine, finished = answer
            if isinstance(finished, RayActorError):
                # A new version of the weights is progress; the same weights, sent to an engine's replacement, are none.
                deaths = 1 if self._versions[-1] != version else deaths + 1
                version = self._versions[-1]
                if deaths > _DEATHS_PER_ENGINE * len(self._engines):
                    raise RolloutError(death(f"generating: death {deaths} in one step: engine {engine}", finished))
                dispatch.lost(engine)
                continue
            for number, sample, rollout in finished:
                group = unfinished[number]
                self._check_versions(engine, rollout, self._versions[group.first_version :])
                group.rollouts[sample] = replace(rollout, prompt=group.request.prompt)
                num_finished += 1
                if dispatch.finished(engine, number):
                    del unfinished[number]
                    yield group.request, [group.rollouts[index] for index in range(group.request.sampling.samples)]

    def _first_finished(
        self, working: dict[ray.ObjectRef, _Working], *, looks_for_requests: bool
    ) -> tuple[int, list[Finished] | RayActorError] | None:
        """The first engine that answers, which is then removed from `working`, and the responses that it has finished,
        or its death; None if none has answered in the moment after which requests are asked for again."""
        first = min(working.values(), key=lambda work: work.deadline)
        patience = max(0.0, first.deadline - time.monotonic())
        wait_seconds = min(patience, _POLL_SECONDS) if looks_for_requests else patience
        done, _ = ray.wait(list(working), num_returns=1, timeout=wait_seconds)
        if not done:
            if wait_seconds < patience:
                return None
            now = time.monotonic()
            late = ", ".join(f"engine {n}" for n in sorted(w.engine for w in working.values() if w.deadline <= now))
            raise RolloutError(f"generating: no answer within {self._timeout_seconds:g} s from {late}")
        work = working.pop(done[0])
        try:
            return work.engine, result(done[0])
        except RayActorError as failure:
            self._synced.wait()  # a sync that is under way replaces the engine itself
            if self._closed:
                raise RolloutError("generating: the engines have been closed") from None
            self._mark_dead(work.engine, work.actor, failure)
            return work.engine, failure

    def _mark_dead(self, engine: int, actor: Any, failure: RayActorError) -> None:
        """Notes that this actor of the engine has died, unless it has been replaced already."""
        with self._state:
            if self._engines[engine] is not actor or engine in self._dead:
                return
            self._dead.add(engine)
        then = "its groups start again" if self._read_weights else "its groups start again, the next sync replaces it"
        logger.warning("%s; %s", death(f"generating: engine {engine}", failure), then)

    def _usable(self) -> dict[int, Any]:
        """The actors of the engines that hold weights and are not known to be dead."""
        with self._state:
            unusable = self._dead | self._without_weights
            return {engine: actor for engine, actor in enumerate(self._engines) if engine not in unusable}

    def _wait_for_weights(self) -> None:
        """Returns when an engine can generate: from here a sync is asked for, or another thread's is awaited.

        Raises:
            RolloutError: the pool has been closed.
        """
        if self._read_weights:
            self.replace_dead_engines(patience_seconds=self._timeout_seconds)
            return
        with self._state:
            self._waiting_for_sync += 1
        try:
            if not self._restore():
                with self._state:
                    self._state.wait_for(lambda: self._closed or self._usable())
            if self._closed:
                raise RolloutError("generating: the engines have been closed")
        finally:
            with self._state:
                self._waiting_for_sync -= 1

    @property
    def waits_for_sync(self) -> bool:
        """Whether a generation call cannot go on before the next sync, because no engine is left."""
        with self._state:
            return self._waiting_for_sync > 0 and not self._usable()

    def restore_with(self, restore: Callable[[], bool]) -> None:
        """What `generate` calls when no engine is left: it syncs the current weights, or returns False where only
        another thread can do so."""
        self._restore = restore

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
        with self._state:
            self._without_weights.clear()
            self._state.notify_all()
        self._synced.set()

    def replace_dead_engines(self, *, patience_seconds: float) -> list[int]:
        """Replaces every engine that has died, or does not answer in time; the indices of those replaced now.

        The new ones hold random weights (unless engines of this pool read them), under version 0, and know no plan.
        """
        deadline = time.monotonic() + patience_seconds
        answers = [engine.ready.remote() for engine in self._engines]
        silent = {index for index, answer in enumerate(answers) if not _answers_in_time(answer, deadline)}
        with self._state:
            dead = sorted(silent | self._dead)
            for index in dead:
                ray.kill(self._engines[index])
                self._engines[index] = self._start(index)
            if not self._read_weights:
                self._without_weights.update(dead)
            self._dead.clear()
        if dead:
            logger.warning("replacing %s", ", ".join(f"engine {index}" for index in dead))
            self.wait_until_ready()
        return dead

    @property
    def new_engines(self) -> list[int]:
        with self._state:
            return sorted(self._without_weights)

    def close(self) -> None:
        """Ends all engines, and generation that waits for a sync."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._synced.set()
        # shutdown first: it ends SGLang's own processes
        ended = [engine.shutdown.remote() for engine in self._engines]
        ray.wait(ended, num_returns=len(ended), timeout=_SHUTDOWN_SECONDS)
        for engine in self._engines:
            ray.kill(engine)


@dataclass
class _Unfinished:
    """A group that is being generated."""

    request: GroupRequest
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    """By sample."""
    first_version: int = 0
    """Index among the pool's versions of the newest when the group went to its engine."""

    @property
    def sent(self) -> GroupRequest:
        """What engines need: other parts of a row can be large."""
        return replace(self.request, prompt=replace(self.request.prompt, columns={}, question=""))


@dataclass(frozen=True)
class _Working:
    """An engine that is waited for."""

    engine: int
    actor: Any
    deadline: float


def _advance(actor: Any, call: int, requests: dict[int, GroupRequest]) -> ray.ObjectRef:
    verb = RolloutEngine.advance.__name__
    return actor.call.options(concurrency_group=GENERATION).remote(verb, call, requests)


def _answers_in_time(answer: ray.ObjectRef, deadline: float) -> bool:
    try:
        ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
    except (RayActorError, OutOfMemoryError, GetTimeoutError):
        return False
    return True


def _is_single_host() -> bool:
    """Whether the run has one host, and no cluster that could grow."""
    return "RAY_ADDRESS" not in os.environ and sum(node["Alive"] for node in ray.nodes()) == 1
