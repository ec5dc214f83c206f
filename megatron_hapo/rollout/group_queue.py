"""Which groups are generated next, and which of the finished ones a step trains on: staleness is bounded here. Pure.

Versions count updates: step s trains the weights of version s - 1, and a token of version v is s - 1 - v steps stale
there. Prompts are drawn in batches of a step's size. While version v is the newest of which the queue knows, at most
(v + N + 1) batches have been drawn that were or will be trained on, N = max_staleness. This is how AReaL controls
staleness (arXiv:2505.24298, "staleness-aware training"). The oldest finished groups are trained on first.

Groups may finish in another order than they were started in, for instance on engines that differ in speed. A group of
version v can be trained on up to step v + N + 1. With `wait`, a step waits until the unfinished groups of version v or
older fit into the steps after it, up to that one, for every v; none is lost then. With `drop`, it takes the oldest that
have finished; those that finish too late are dropped, and others are drawn in their place.

With `deterministic` nothing depends on when a group finishes: a batch is drawn when nothing is in progress, accepted
when all of it is there, in the order of its prompts, and trained on in that order. While version v is the newest, all
is generated that steps up to v + N + 1 need; the sync, and whoever asks for the queue's state, waits for that
(`is_settled`). So step s trains on tokens of version s - 1 - N, or of version 0 before; dynamic sampling may replace
some of them by newer ones. What is counted for metrics is counted from one settled state to the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_hapo.config import Config
from megatron_hapo.data.sampling import PromptSource, SamplerState
from megatron_hapo.errors import RolloutError
from megatron_hapo.rollout.collect import Collected
from megatron_hapo.types import GroupRequest, Prompt, Sampling, ScoredGroup

Place = tuple[int, str]
"""Identifies a group of a run: the seed of the batch in which its prompt was drawn, and the prompt's uid."""


@dataclass
class _Draw:
    """Prompts that were drawn together."""

    before: SamplerState
    """State of the prompts' source before the draw."""
    count: int
    left: set[str]
    """Uids of those whose groups have been neither trained on nor dropped."""


@dataclass(frozen=True)
class _Running:
    """A group that has been requested."""

    number: int
    """Requests are counted from 0."""
    version: int
    """Newest weights that the queue knew of: no token is from older ones."""
    statistics_step: int
    """Step whose entropy statistics steer its sampling."""


@dataclass(frozen=True, kw_only=True)
class FinishedGroup:
    """A group that waits to be trained on."""

    number: int
    place: Place
    version: int
    """Of the oldest weights among its tokens."""
    statistics_step: int
    scored: ScoredGroup


@dataclass
class _Counts:
    """Since the last step."""

    draws: int = 0
    finished: int = 0
    kept: int = 0
    dropped: int = 0


class GroupQueue:
    """The groups of a run that have been drawn and not been trained on.

    Args:
        prompts: where prompts come from; used by nobody else.
    """

    def __init__(self, config: Config, prompts: PromptSource):
        self._config, self._prompts = config, prompts
        self._size, self._bound = config.batch.prompts_per_step, config.async_.max_staleness
        self._draws: dict[int, _Draw] = {}
        """By seed."""
        self._waiting: deque[tuple[int, Prompt]] = deque()
        """With the seed of their draw."""
        self._running: dict[Place, _Running] = {}
        self._finished: list[FinishedGroup] = []
        self._taken, self._version, self._num_requests = 0, 0, 0
        self._sampling: Sampling | None = None
        self._counts, self._next_draw = _Counts(), 0
        self._exact = config.deterministic
        self._arrived: list[tuple[GroupRequest, ScoredGroup]] = []
        """With `deterministic`: finished groups of the batch that is in progress."""
        self._reports_when_settled = self._exact and self._bound > 0
        self._report: dict[str, Any] | None = None
        """If it reports when settled: what the next `take` says of the groups before it, as JSON values."""

    # ----- generation

    def begin(self, step: int, sampling: Sampling) -> None:
        """From here the newest weights and statistics are those of the step before this one.

        Args:
            sampling: of groups that are requested from now on; batches that are drawn count on from its seed.
        """
        if self._reports_when_settled:
            self._report = self._report or self._new_report()
        self._taken = self._version = step - 1
        self._sampling, self._next_draw = sampling, sampling.seed
        self._drop_stale()

    def has_request(self) -> bool:
        """Whether `next_request` has one."""
        return bool(self._waiting) or self._may_draw()

    def next_request(self) -> GroupRequest | None:
        """The next group to be generated, sampled as the newest statistics require; None if enough have been drawn."""
        if not self.has_request():
            return None
        if not self._waiting:
            self._draw()
        assert self._sampling is not None, "groups are requested only after `begin`"
        seed, prompt = self._waiting.popleft()
        self._running[seed, prompt.uid] = _Running(self._num_requests, self._version, self._version)
        self._num_requests += 1
        return GroupRequest(prompt, replace(self._sampling, seed=seed))

    def finished(self, request: GroupRequest, scored: ScoredGroup) -> None:
        """A requested group has been generated and scored."""
        if not self._exact:
            self._accept(request, scored)
            self._drop_stale()
            return
        self._arrived.append((request, scored))
        if not self._waiting and len(self._arrived) == len(self._running):
            arrived, self._arrived = self._arrived, []
            for one in sorted(arrived, key=lambda one: self._running[_place(one[0])].number):
                self._accept(*one)

    def is_settled(self) -> bool:
        """Whether nothing is in progress, and nothing may be requested before the next `begin`."""
        return not self._running and not self.has_request()

    def _accept(self, request: GroupRequest, scored: ScoredGroup) -> None:
        place = _place(request)
        group = self._running.pop(place)
        oldest = min(rollout.policy_version for rollout in scored.rollouts)
        assert oldest >= group.version, "a group has older weights than when it was requested"
        self._prompts.record([scored])
        self._counts.finished += 1
        if self._config.dynamic_sampling.enabled and not scored.informative:
            self._leaves(place)
            return
        self._counts.kept += 1
        self._finished.append(
            FinishedGroup(
                number=group.number, place=place, version=oldest, statistics_step=group.statistics_step, scored=scored
            )
        )

    def _may_draw(self) -> bool:
        """Whether another batch may be drawn.

        What dynamic sampling rejects or staleness drops is made up for by a whole batch, once nothing is in progress.
        With `deterministic` every batch waits for that.
        """
        dynamic = self._config.dynamic_sampling
        if self._sampling is None:
            return False
        if dynamic.enabled and self._counts.draws >= dynamic.max_generation_batches + self._bound:
            return False
        newest_step = min(self._version + self._bound + 1, self._config.steps)
        in_progress = len(self._waiting) + len(self._running)
        room = (newest_step - self._taken) * self._size - in_progress - len(self._finished)
        return (room >= self._size and not self._exact) or (room > 0 and not in_progress)

    def _draw(self) -> None:
        seed, before = self._next_draw, self._prompts.state()
        prompts = self._prompts.next(self._size)
        self._draws[seed] = _Draw(before, self._size, {prompt.uid for prompt in prompts})
        self._waiting += [(seed, prompt) for prompt in prompts]
        self._next_draw += 1
        self._counts.draws += 1

    # ----- training

    def is_ready(self) -> bool:
        """Whether the next step can take its groups.

        Raises:
            RolloutError: dynamic sampling has rejected too many groups.
        """
        if self._config.async_.stale_groups == "wait" and not self._all_can_be_in_time():
            return False
        if len(self._finished) < self._size and not self._running and not self.has_request():
            dynamic, counts = self._config.dynamic_sampling, self._counts
            raise RolloutError(
                f"dynamic sampling: {counts.kept} of {counts.finished} groups had responses of differing correctness "
                f"after {counts.draws} generation batches, but {self._size} are needed; raise "
                f"dynamic_sampling.max_generation_batches (now {dynamic.max_generation_batches}), or use easier or "
                "harder prompts"
            )
        return len(self._finished) >= self._size

    def _all_can_be_in_time(self) -> bool:
        """Whether no group need become too old if the next step takes its groups now, and every step the oldest.

        After it, groups of version v or older can be trained on in (v + N + 1 - step) further steps.
        """
        unfinished = [group.version for group in self._running.values()] + [self._version] * len(self._waiting)
        return all(
            sum(one <= version for one in unfinished) <= (version + self._bound - self._taken) * self._size
            for version in set(unfinished)
        )

    def take(self) -> Collected:
        """The groups of the next step, the oldest first; `is_ready` must hold."""
        self._finished.sort(key=lambda group: (group.version, group.number))
        taken, self._finished = self._finished[: self._size], self._finished[self._size :]
        self._taken += 1
        for group in taken:
            self._leaves(group.place)
        if not self._exact:  # otherwise only `begin` does, since groups may be in progress here or not
            self._drop_stale()
        report, self._report = self._report or self._new_report(), None
        lags = [self._taken - 1 - group.statistics_step for group in taken]
        queued = [group for group in self._finished if not self._exact or group.version < self._version]
        return Collected(
            groups=[group.scored for group in taken],
            kept_share=report["kept_share"],
            metrics=report["metrics"]
            | {"rollout/statistics_lag": float(np.mean(lags)), "rollout/queued_groups": float(len(queued))},
        )

    def _new_report(self) -> dict[str, Any]:
        """What has happened since the last one."""
        counts, self._counts = self._counts, _Counts()
        return {
            "kept_share": counts.kept / counts.finished if counts.finished else 1.0,
            "metrics": self._prompts.metrics() | {"rollout/dropped_groups": float(counts.dropped)},
        }

    def _drop_stale(self) -> None:
        """Drops finished groups that are too old for the next step."""
        stale = [group for group in self._finished if self._taken - group.version > self._bound]
        for group in stale:
            self._finished.remove(group)
            self._leaves(group.place)
        self._counts.dropped += len(stale)

    def _leaves(self, place: Place) -> None:
        seed, uid = place
        self._draws[seed].left.remove(uid)
        if not self._draws[seed].left:
            del self._draws[seed]

    # ----- checkpoints

    def state(self) -> SamplerState:
        """Where the prompts stand, and which of those drawn have been neither trained on nor dropped; as JSON."""
        after = self._prompts.state()
        if not self._draws:
            return after
        if self._reports_when_settled:
            assert not self._running, "what is in progress would come from other weights after a resume"
            self._report = self._report or self._new_report()
        draws = [
            {"seed": seed, "before": draw.before, "count": draw.count, "left": sorted(draw.left)}
            for seed, draw in self._draws.items()
        ]
        return {"after": after, "draws": draws} | ({} if self._report is None else {"report": self._report})

    def finished_groups(self) -> list[FinishedGroup]:
        """Those that no step has taken."""
        return list(self._finished)

    def restore(self, state: SamplerState, finished: Mapping[Place, FinishedGroup]) -> int:
        """Continue from `state`; the prompts of unfinished groups come again before all others, with the same seeds.

        Args:
            finished: groups that need not be generated again; those of prompts that are no longer there are left out.
        Returns:
            Number of prompts that come again.
        """
        self._draws.clear()
        self._waiting.clear()
        self._finished.clear()
        if not (isinstance(state, Mapping) and "draws" in state):
            self._prompts.restore(state)
            return 0
        for saved in state["draws"]:
            self._restore_draw(saved, finished)
        self._prompts.restore(state["after"])
        self._report = state.get("report") if self._reports_when_settled else None
        return len(self._waiting)

    def _restore_draw(self, saved: Mapping[str, Any], finished: Mapping[Place, FinishedGroup]) -> None:
        seed, left = int(saved["seed"]), set(saved["left"])
        self._prompts.restore(saved["before"])
        prompts = [prompt for prompt in self._prompts.next(saved["count"]) if prompt.uid in left]
        if prompts:
            self._draws[seed] = _Draw(saved["before"], saved["count"], {prompt.uid for prompt in prompts})
        for prompt in prompts:
            if (group := finished.get((seed, prompt.uid))) is None:
                self._waiting.append((seed, prompt))
                continue
            rollouts = [replace(rollout, prompt=prompt) for rollout in group.scored.rollouts]
            restored = replace(group, number=self._num_requests, scored=replace(group.scored, rollouts=rollouts))
            self._finished.append(restored)
            self._num_requests += 1


def _place(request: GroupRequest) -> Place:
    return request.sampling.seed, request.prompt.uid
