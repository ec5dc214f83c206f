"""Whether a machine can hold the processes of a run, as far as is known before anything starts. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_hapo.config import Config, Fault
from megatron_hapo.errors import ConfigError
from megatron_hapo.model.families import Shape
from megatron_hapo.sizing.from_config import local_gpus
from megatron_hapo.sizing.processes import processes_of, readable_size

PROCESSES_PER_CORE = 16
"""Trainer and engine ranks that a core can hold. They would work, slowly; with many more, their starts exceed the time
limits of Ray and gloo, whose errors do not say why."""


@dataclass(frozen=True)
class Machine:
    """What this process may use."""

    cores: int
    host_bytes: int
    gpus: int

    @property
    def device(self) -> str:
        """What `device: auto` means here."""
        return "cuda" if self.gpus else "cpu"


def this_machine() -> Machine:
    """The machine that this process runs on, within the limits of its container."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len(local_gpus())
    if visible is not None:
        gpus = min(gpus, len([name for name in visible.split(",") if name.strip()]))
    return Machine(len(os.sched_getaffinity(0)), int(min(psutil.virtual_memory().total, _container_bytes())), gpus)


def machine_faults(config: Config, shape: Shape, machine: Machine, *, trains: bool = True) -> Iterator[Fault]:
    """Why this machine cannot hold a run that has no other.

    Args:
        trains: whether the run has a trainer.
    """
    device = machine.device if config.device == "auto" else config.device
    if device == "cuda":
        if machine.gpus:  # otherwise torch knows better what the machine has
            ranks = config.parallel.world_size if trains else 0
            yield from gpu_faults(config, ranks=ranks, here=machine.gpus, everywhere=machine.gpus)
        return
    processes = processes_of(config, shape, device=device, trains=trains)
    rollout = config.rollout
    parties = f"{_counted(rollout.engines, 'engine')} of tp={rollout.tp}"
    if config.replay is not None:
        parties = _counted(config.parallel.world_size, "trainer rank")
    elif trains:
        parties = f"{_counted(config.parallel.world_size, 'trainer rank')} and {parties}"
    involved = ("rollout.tp", "parallel")
    computing, most = sum(kind.count for kind in processes if kind.computes), PROCESSES_PER_CORE * machine.cores
    if computing > most:
        yield Fault(
            _larger(config, trains=trains),
            f"{parties} are {computing} computing processes, too many for {machine.cores} cores, which can hold {most}",
            involved,
        )
        return
    needed = sum(kind.count * kind.host_bytes for kind in processes)
    if needed > machine.host_bytes:
        has = readable_size(machine.host_bytes)
        yield Fault(
            _larger(config, trains=trains),
            f"{parties} need at least {readable_size(needed)} of memory, and this machine has {has}",
            (*involved, "model.path", "rollout.kv_cache_tokens"),
        )


def gpu_faults(config: Config, *, ranks: int, here: int, everywhere: int) -> Iterator[Fault]:
    """Why there are too few GPUs.

    Args:
        ranks: of the trainer.
        here: GPUs of this node, on which the trainer's ranks will be.
        everywhere: GPUs of all nodes.
    """
    rollout = config.rollout
    if ranks > here:
        yield Fault(
            "parallel",
            f"{ranks} trainer ranks need as many GPUs, and this node has {here}; start the run with torchrun on "
            "several nodes (docs/launching.md), or find another layout with `megatron-hapo plan`",
        )
        return
    shares = config.placement == "colocated" and ranks
    engines = 0 if shares or config.replay is not None else rollout.engines * rollout.tp
    if ranks + engines > everywhere:
        beside = f" beside the {ranks} of the trainer" if ranks else ""
        yield Fault(
            "rollout.engines",
            f"{rollout.engines} engines of tp={rollout.tp} need {engines} GPUs{beside}, and there are {everywhere} in "
            "all; use fewer engines, placement=colocated, or more nodes",
            ("rollout.tp", "parallel"),
        )


def check_gpus(config: Config, *, here: int, everywhere: int) -> None:
    """Raises ConfigError if Ray has too few GPUs for the run; its actors would wait for them forever."""
    faults = gpu_faults(config, ranks=config.parallel.world_size, here=here, everywhere=everywhere)
    if lines := [str(fault) for fault in faults]:
        raise ConfigError(lines)


def _larger(config: Config, *, trains: bool) -> str:
    """The setting of most of the processes."""
    engines = config.rollout.engines * config.rollout.tp
    return "parallel" if trains and config.parallel.world_size > engines else "rollout.engines"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _container_bytes() -> float:
    """The limit of memory of this process's control group; infinite if there is none."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no control groups of version 2; or "max"
        return float("inf")
