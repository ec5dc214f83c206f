"""Entry point of SGLang's scheduler processes, which imports SGLang as `importing` does, before it reads arguments."""

from __future__ import annotations

from typing import Any

from megatron_hapo.model.rank_environment import importing

with importing():
    from sglang.srt.managers.scheduler import run_scheduler_process


def run_scheduler(*args: Any) -> None:
    """SGLang's own, under a name whose module a new process imports first."""
    run_scheduler_process(*args)
