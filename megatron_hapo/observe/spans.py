"""Spans of time: what a process does and when, by the wall clock, while a step is profiled. Pure."""

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
    """The spans of one process, in the order of their ends."""

    process: str
    """Name in the trace, e.g. engine 0."""
    host: str
    spans: list[Span]


class SpanRecorder:
    """Records spans of all threads of this process that end between `start` and `finish`; others are dropped."""

    def __init__(self, process: str):
        self._process = process
        self._spans: list[Span] | None = None
        self._start_ns = 0

    def start(self) -> None:
        """Starts recording."""
        self._start_ns, self._spans = time.time_ns(), []

    def finish(self) -> Timeline:
        """Stops recording; the spans since `start`."""
        spans, self._spans = self._spans or [], None
        return Timeline(self._process, socket.gethostname(), spans)

    def add(self, name: str, begin_ns: int) -> None:
        """Adds a span that ends now; if it began before `start`, it is cut to begin there."""
        spans = self._spans
        if spans is not None:
            spans.append(Span(name, max(begin_ns, self._start_ns), time.time_ns()))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Records the time inside the context as a span."""
        begin_ns = time.time_ns()
        try:
            yield
        finally:
            self.add(name, begin_ns)


class Recorded(Protocol):
    """An object with a recorder of its own."""

    spans: SpanRecorder


def recorded[S: Recorded, **P, R](method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """The method, with each call recorded as a span by its object's recorder."""

    @functools.wraps(method)
    def recording(self: S, *args: P.args, **kwargs: P.kwargs) -> Any:
        with self.spans(method.__name__):
            return method(self, *args, **kwargs)

    return recording
