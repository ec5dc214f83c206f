"""Imports that the ranks of tests share: torch and Megatron on a CPU, in the process from which the ranks are forked.

That process must not have started a thread, since a fork copies only the thread that calls it.
"""

from __future__ import annotations

from megatron_hapo.model.rank_environment import importing

with importing():
    import torch

    from megatron_hapo.model import megatron_on_cpu

    megatron_on_cpu.install()
    # torch and Megatron import these when an optimizer is made or takes its first step.
    import megatron.core.models.mimo.optimizer  # noqa: F401
    import torch._dynamo

    import megatron_hapo.trainer.trainer_rank  # noqa: F401

torch.set_num_threads(1)
