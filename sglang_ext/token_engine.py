"""SGLang's engine for requests that are token ids, and whose answers are."""

from __future__ import annotations

import multiprocessing
from typing import Any

from sglang.srt.entrypoints.engine import Engine


class TokenEngine(Engine):
    """Without SGLang's detokenizer, to which its scheduler sends nothing under `skip_tokenizer_init` (0.5.23).

    As a process of its own it would import all of SGLang, a third of an engine's start, and hold its memory.
    """

    @classmethod
    def _launch_detokenizer_subprocesses(
        cls, *args: Any, **kwargs: Any
    ) -> tuple[list[multiprocessing.Process], list[str]]:
        """No process, and no name for SGLang's watchdog."""
        return [], []
