"""Renders a model's chat template in a child process, with limits on time, memory and length.

A chat template is a program that comes with a model. The sandbox of transformers keeps it from files and from Python's
internals, but not from looping for hours or from filling the memory.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_hapo.errors import DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 20.0
"""For one conversation; a real template takes less than a millisecond."""
MEMORY_BYTES = 1 << 30
"""What rendering may take in addition to the memory of this process."""
MAX_CHARACTERS = 8 << 20
"""Longest rendered conversation."""


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation, or the reason why it cannot be rendered."""

    text: str
    fault: str | None = None


def render_chat_template(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[dict[str, str]]]
) -> list[Rendered]:
    """The text of each conversation up to the start of the assistant's turn, or why the template refuses it.

    Raises:
        DataError: the template exceeds a limit.
    """
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Forking with other threads is safe here: the child renders, writes and exits, and shares no lock with them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _render_and_exit(tokenizer, conversations, read_end, write_end)
    os.close(write_end)
    try:
        lines = _read_lines(read_end, expected=len(conversations))
    finally:
        os.close(read_end)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [Rendered(*json.loads(line)) for line in lines]


def is_valid_unicode(text: str) -> bool:
    """Whether the text has an encoding: half of a surrogate pair, which JSON can contain, has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_lines(pipe: int, *, expected: int) -> list[bytes]:
    """The child's lines, one for each conversation.

    Raises:
        DataError: the next one does not come within SECONDS, or the child has ended.
    """
    received = bytearray()
    num_lines, deadline = 0, time.monotonic() + SECONDS
    while num_lines < expected:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise DataError(
                f"the tokenizer's chat template takes longer than {SECONDS:g} s to render conversation {num_lines}"
            )
        part = os.read(pipe, 1 << 20)
        if not part:
            raise DataError(
                f"the tokenizer's chat template ended its process on conversation {num_lines}, which may use "
                f"{MEMORY_BYTES >> 20} MiB of memory"
            )
        received += part
        if new_lines := part.count(b"\n"):
            num_lines, deadline = num_lines + new_lines, time.monotonic() + SECONDS
    return bytes(received).splitlines()


def _render_and_exit(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[dict[str, str]]], read_end: int, write_end: int
) -> None:
    """The child's work: one line of JSON for each conversation. Never returns."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        gc.disable()  # destructors of the parent's objects may need its threads, which this process does not have
        os.close(read_end)
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open(write_end, "wb") as pipe:
            for messages in conversations:
                pipe.write(_rendered_line(tokenizer, messages))
                pipe.flush()
    finally:
        os._exit(0)


def _rendered_line(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> bytes:
    text, fault = "", None
    try:
        text = str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
        if len(text) > MAX_CHARACTERS:
            fault = f"the chat template renders {len(text)} characters, more than {MAX_CHARACTERS}"
        elif not is_valid_unicode(text):
            fault = "the chat template renders text that is not valid Unicode"
    except Exception as error:  # a template raises what it likes, also on purpose: raise_exception(...)
        fault = f"the chat template fails: {type(error).__name__}: {one_line(error)[:300]}"
    return json.dumps(["" if fault else text, fault]).encode() + b"\n"
