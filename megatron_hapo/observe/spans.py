"""What a process does when, by the wall clock, while a step is profiled; pure."""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, NamedTuple, Protocol


class Span(NamedTuple):
    """One activity; nanoseconds since 1970 by the clock of its host."""

    name: str
    begin_ns: int
    end_ns: int


class Timeline(NamedTuple):
    """What one process did, in the order in which it ended."""

    process: str
    """As a reader of the trace knows it: engine 0."""
    host: str
    spans: list[Span]


class SpanRecorder:
    """Spans of this process, in all its threads, that end between `start` and `finish`; others are forgotten."""

    def __init__(self, process: str):
        self._process = process
        self._spans: list[Span] | None = None
        self._start_ns = 0

    def start(self) -> None:
        self._start_ns, self._spans = time.time_ns(), []

    def finish(self) -> Timeline:
        spans, self._spans = self._spans or [], None
        return Timeline(self._process, socket.gethostname(), spans)

    def add(self, name: str, begin_ns: int) -> None:
        """A span that ends now; if it began before `start`, it counts from there."""
        spans = self._spans
        if spans is not None:
            spans.append(Span(name, max(begin_ns, self._start_ns), time.time_ns()))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """What happens inside is a span."""
        begin_ns = time.time_ns()
        try:
            yield
        finally:
            self.add(name, begin_ns)


class Recorded(Protocol):
    spans: SpanRecorder


def recorded[S: Recorded, **P, R](method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """The method, its calls recorded as spans of its object."""

    @functools.wraps(method)
    def recording(self: S, *args: P.args, **kwargs: P.kwargs) -> Any:
        with self.spans(method.__name__):
            return method(self, *args, **kwargs)

    return recording
