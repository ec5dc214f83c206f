"""Remote calls: large arguments are shared, the first error wins, and a late process is named."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from megatron_hapo.errors import HapoError

_OUT_OF_MEMORY = (
    "Ray ended it because the machine's memory was nearly full: free memory, let the run have fewer or smaller "
    "processes, or raise RAY_memory_usage_threshold (default 0.95)"
)
_ERROR_LINE = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception)\b", re.MULTILINE)
"""Begins the last part of a traceback, whose other lines are indented or begin otherwise."""
_RAY_ID = re.compile(r"\t(class_name|actor_id|pid|name|namespace|ip): ")
"""A line of Ray's about the actor, which the message names already."""


def shared(value: Any) -> Any:
    """An argument for several remote calls: a reference to one copy for all of a node, unless it is small."""
    if value is None or isinstance(value, bool | int | float | str | Path | ray.ObjectRef):
        return value
    return ray.put(value)


def gather(
    calls: Mapping[str, ray.ObjectRef],
    *,
    timeout_seconds: float,
    what: str,
    error: type[HapoError],
    died: type[HapoError] | None = None,
) -> list[Any]:
    """Results of these calls, in their order; `calls` maps the name of each process to the reference.

    A failed rank makes the others hang in their collectives, so errors are raised as they come, not in order.

    Raises:
        error: some processes did not answer in time.
        died: a process died; None: `error` in this case too. An exception of the call itself is raised unchanged.
    """
    names = {reference: name for name, reference in calls.items()}
    waiting, results = list(names), {}
    deadline = time.monotonic() + timeout_seconds
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            late = ", ".join(names[reference] for reference in waiting)
            raise error(f"{what}: no answer within {timeout_seconds:g} s from {late}")
        for reference in done:
            try:
                results[reference] = result(reference)
            except RayActorError as failure:
                raise (died or error)(death(f"{what}: {names[reference]}", failure)) from None
    return [results[reference] for reference in calls.values()]


def items(
    streams: Mapping[str, ray.ObjectRefGenerator],
    *,
    timeout_seconds: float,
    what: str,
    error: type[HapoError],
    died: type[HapoError],
) -> Iterator[ray.ObjectRef]:
    """References to what these streams yield, stream after stream; none of them refers to an error.

    Raises:
        error: a stream has not yielded its next item in time.
        died: a process died, be it that of the present stream or another, for which the present one may wait. An
            exception of a stream itself is raised unchanged.
    """
    ends = {stream.completed(): name for name, stream in streams.items()}

    def check(done: Sequence[Any]) -> None:
        for end in [end for end in done if end in ends]:
            try:
                result(end)
            except RayActorError as failure:
                raise died(death(f"{what}: {ends[end]}", failure)) from None
            del ends[end]

    for name, stream in streams.items():
        # Ray ends a failed stream with a reference to the error, so an item is good once another one follows, or the
        # stream has ended without an error.
        held: list[ray.ObjectRef] = []
        while not stream.is_finished():
            done, _ = ray.wait([stream, *ends], num_returns=1, timeout=timeout_seconds, fetch_local=False)
            if not done:
                raise error(f"{what}: no answer within {timeout_seconds:g} s from {name}")
            check(done)
            if stream in done and not stream.is_finished():
                yield from held
                held = [next(stream)]
        check([stream.completed()])
        yield from held


def result(reference: ray.ObjectRef) -> Any:
    """Result of a call.

    Raises:
        RayActorError: the process died. The project's own errors are raised unchanged, others with the remote
            traceback.
    """
    try:
        return ray.get(reference)
    except OutOfMemoryError:  # a page about every process of the machine
        raise RayActorError(error_msg=_OUT_OF_MEMORY) from None
    except RayTaskError as failure:
        if isinstance(failure.cause, HapoError):
            raise failure.cause from None
        raise


def death(who: str, failure: RayActorError) -> str:
    """The message for a process that died, with Ray's reason in one line, without its ids and general advice.

    If its constructor failed, Ray's reason is a traceback, of which the error's own lines are enough.
    """
    text = str(failure)
    if "raised in its creation task" in text:
        text = text[max((error.start() for error in _ERROR_LINE.finditer(text)), default=0) :]
    sentences = [line for line in text.splitlines() if not _RAY_ID.match(line)]
    reason = " ".join(" ".join(sentences).split()).partition(" Some common causes include")[0]
    return f"{who}: the process died: {reason}"
