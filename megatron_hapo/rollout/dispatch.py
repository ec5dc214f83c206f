"""Which engine generates which prompt's responses: whoever has least to do, as engines get free; pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence


class Dispatch:
    """The groups of one generation call on their way through the engines.

    An engine is never given everything at once: while it decodes as many requests as it can and some wait in it, the
    groups that are left belong to nobody, and go to whichever engine has room first. So a few long responses on one
    engine leave no other without work before the groups run out.

    Args:
        response_tokens: for each group, tokens that one of its responses is expected to take.
        samples: responses of each group.
        engines: their number.
        room: an engine that has fewer unfinished responses is given another group.
    """

    def __init__(self, response_tokens: Sequence[int], *, samples: int, engines: int, room: int):
        self._response_tokens, self._samples, self._room = response_tokens, samples, room
        self._waiting = deque(range(len(response_tokens)))
        self._unfinished: list[dict[int, int]] = [{} for _ in range(engines)]
        self._responses, self._tokens = [0] * engines, [0] * engines

    @property
    def done(self) -> bool:
        """Whether every response of every group has finished."""
        return not self._waiting and not any(self._responses)

    def busy(self, engine: int) -> bool:
        """Whether the engine has unfinished responses."""
        return self._responses[engine] > 0

    def assign(self, engines: Collection[int]) -> dict[int, list[int]]:
        """Groups for those of `engines` that have room, each to the one with the fewest tokens outstanding."""
        given: dict[int, list[int]] = {engine: [] for engine in engines}
        while self._waiting and (free := [engine for engine in engines if self._responses[engine] < self._room]):
            engine = min(free, key=self._tokens.__getitem__)
            group = self._waiting.popleft()
            self._unfinished[engine][group] = self._samples
            self._add(engine, group, self._samples)
            given[engine].append(group)
        return given

    def finished(self, engine: int, group: int) -> None:
        """One response of this group has finished."""
        self._add(engine, group, -1)
        self._unfinished[engine][group] -= 1
        if not self._unfinished[engine][group]:
            del self._unfinished[engine][group]

    def lost(self, engine: int) -> None:
        """The engine has lost its work: groups that were not finished are given out again, before all others."""
        for group, responses in reversed(self._unfinished[engine].items()):
            self._add(engine, group, -responses)
            self._waiting.appendleft(group)
        self._unfinished[engine] = {}

    def _add(self, engine: int, group: int, responses: int) -> None:
        self._responses[engine] += responses
        self._tokens[engine] += responses * self._response_tokens[group]
