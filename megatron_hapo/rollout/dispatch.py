"""Which engine generates which group: the least loaded one, as engines become free. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class _Group:
    samples: int
    response_tokens: int


class Dispatch:
    """Assigns the groups of one generation call to engines.

    Groups are not assigned all at once: while an engine decodes as many requests as it can and queues a few more, the
    remaining groups stay unassigned, and go to the engine that has room first. A few long responses on one engine thus
    leave no other engine idle before the groups run out.

    Args:
        engines: number of engines.
        room: an engine with fewer unfinished responses than this can take another group.
    """

    def __init__(self, *, engines: int, room: int):
        self._room = room
        self._groups: dict[int, _Group] = {}
        self._waiting: deque[int] = deque()
        self._unfinished: list[dict[int, int]] = [{} for _ in range(engines)]
        self._responses, self._tokens = [0] * engines, [0] * engines

    def add(self, group: int, *, samples: int, response_tokens: int) -> None:
        """A new group waits for an engine.

        Args:
            response_tokens: expected number of tokens of one of its responses.
        """
        self._groups[group] = _Group(samples, response_tokens)
        self._waiting.append(group)

    def wants_groups(self, engines: Collection[int]) -> bool:
        """Whether one of `engines` has room and no group is waiting for it."""
        return not self._waiting and any(self._responses[engine] < self._room for engine in engines)

    @property
    def done(self) -> bool:
        """Whether every response of every group has finished."""
        return not self._waiting and not any(self._responses)

    def busy(self, engine: int) -> bool:
        """Whether the engine has unfinished responses."""
        return self._responses[engine] > 0

    def assign(self, engines: Collection[int]) -> dict[int, list[int]]:
        """Groups for each of `engines`; each goes to the one with the fewest pending tokens of those with room."""
        assigned: dict[int, list[int]] = {engine: [] for engine in engines}
        while self._waiting and (free := [engine for engine in engines if self._responses[engine] < self._room]):
            engine = min(free, key=self._tokens.__getitem__)
            group = self._waiting.popleft()
            self._unfinished[engine][group] = self._groups[group].samples
            self._add(engine, group, self._groups[group].samples)
            assigned[engine].append(group)
        return assigned

    def finished(self, engine: int, group: int) -> bool:
        """Records that one response of this group has finished on this engine; whether it was the group's last."""
        self._add(engine, group, -1)
        self._unfinished[engine][group] -= 1
        if self._unfinished[engine][group]:
            return False
        del self._unfinished[engine][group], self._groups[group]
        return True

    def lost(self, engine: int) -> None:
        """Records that the engine lost its work: its unfinished groups are assigned again, before all others."""
        for group, responses in reversed(self._unfinished[engine].items()):
            self._add(engine, group, -responses)
            self._waiting.appendleft(group)
        self._unfinished[engine] = {}

    def _add(self, engine: int, group: int, responses: int) -> None:
        self._responses[engine] += responses
        self._tokens[engine] += responses * self._groups[group].response_tokens
