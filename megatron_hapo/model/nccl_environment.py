"""How NCCL and CUDA's allocator are set up in trainer ranks and engines: the one place, since both can join one group.

Of itself an engine sets other values than a trainer rank: SGLang (0.5.23) disables NCCL's cuMem buffers and NVLS in its
own processes, unless the environment says otherwise. Members of one group that differ in them fail or hang.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_hapo.errors import WeightSyncError

SHARED = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""Values for every process of a run on several hosts, where a weight sync joins trainer ranks and engines in one group.
A value of the user's environment has precedence."""
COMPARED = (
    *SHARED,
    "NCCL_ALGO",
    "NCCL_IB_DISABLE",
    "NCCL_MNNVL_ENABLE",
    "NCCL_NET",
    "NCCL_P2P_DISABLE",
    "NCCL_PROTO",
    "NCCL_SHM_DISABLE",
)
"""Variables that must agree between all members of a group. Others may differ between hosts, such as interfaces."""
_EXPANDABLE = "expandable_segments"
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def nccl_environment(*, loopback: bool, deterministic: bool = False) -> dict[str, str]:
    """Variables for a process that uses NCCL, set before it starts; `loopback`: all processes are on this host.

    On one host no group joins trainer ranks and engines, so each keeps its own defaults, and NVLS where NCCL has it.
    """
    # What SGLang's deterministic mode sets in engines of several ranks, whatever the user's environment says.
    algorithm = {"NCCL_ALGO": "allreduce:tree"} if deterministic else {}
    if loopback:
        return {"NCCL_SOCKET_IFNAME": "lo"} | algorithm
    return {name: os.environ.get(name, value) for name, value in SHARED.items()} | algorithm


def without_expandable_segments() -> dict[str, str]:
    """Changes to this process's allocator settings for an engine's process; empty if there is nothing to change.

    Expandable segments are usual with Megatron, but torch_memory_saver refuses them, and memory in them cannot be
    shared between the processes of an unprivileged container. Trainer ranks keep them.
    """
    changes = {}
    for name in _ALLOCATOR_VARIABLES:
        options = [option for option in os.environ.get(name, "").split(",") if option]
        kept = [option for option in options if option.split(":")[0].strip() != _EXPANDABLE]
        if kept != options:
            changes[name] = ",".join(kept)
    return changes


def settings_in_effect() -> dict[str, str]:
    """The compared variables that this process has set."""
    return {name: os.environ[name] for name in COMPARED if name in os.environ}


def check_agreement(settings: Mapping[str, Mapping[str, str]]) -> None:
    """Raises WeightSyncError unless all members of a group have the same settings; names the first two that differ.

    Args:
        settings: `settings_in_effect` of each member, by its name in errors.
    """
    (first, expected), *others = settings.items()
    for name, got in others:
        for variable in COMPARED:
            if got.get(variable) != expected.get(variable):
                values = [f"{who} has {variable}={s.get(variable, '')}" for who, s in ((first, expected), (name, got))]
                raise WeightSyncError(
                    f"connecting: {', but '.join(values)}; members of one NCCL group need the same value: set it in "
                    "the environment of every host"
                )
