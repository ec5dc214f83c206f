"""What `megatron-hapo train --dry-run` prints: a job as a config, with its processes and their memory as comments."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_hapo.checks.machine import Machine, machine_faults
from megatron_hapo.config import Config, config_as_yaml
from megatron_hapo.config.parallel_sizes import ParallelSizes
from megatron_hapo.model.families import Shape, num_parameters
from megatron_hapo.sizing import from_config
from megatron_hapo.sizing.memory import GIB
from megatron_hapo.sizing.processes import ProcessKind, processes_of, readable_size

_GPUS_OF_A_NODE = 8
"""Of nodes that nothing is known about."""


def dry_run(config: Config, shape: Shape, machine: Machine) -> str:
    """The job as YAML that `train` reads back to the same config."""
    lines = [*_overview(config, shape, machine), "", *_process_table(config, shape, _device(config, machine))]
    faults = [str(fault) for fault in machine_faults(config, shape, machine)]
    lines += ["", *(f"this machine cannot hold it: {fault}" for fault in faults)] if faults else []
    return config_as_yaml(config) + "".join(f"# {line}".rstrip() + "\n" for line in ["", *lines])


def _device(config: Config, machine: Machine) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if config.parallel.gpu_memory is not None else machine.device


def _overview(config: Config, shape: Shape, machine: Machine) -> Iterator[str]:
    rollout, batch = config.rollout, config.batch
    yield f"model: {config.model.path}, {shape.family}, {num_parameters(shape):,} parameters"
    updates = batch.prompts_per_step // batch.prompts_per_minibatch
    yield (
        f"steps: {config.steps}, each with {batch.prompts_per_step} prompts x {batch.samples_per_prompt} responses and "
        f"{updates} updates; results in {config.run_dir}"
    )
    if _device(config, machine) == "cpu":
        yield f"nodes: this one, {machine.cores} cores and {readable_size(machine.host_bytes)} of memory"
        return
    ranks, engines = config.parallel.world_size, rollout.engines * rollout.tp
    gpus = ranks if config.placement == "colocated" else ranks + engines
    of_a_node = machine.gpus or _GPUS_OF_A_NODE
    shared = (
        "shared by trainer and engines" if config.placement == "colocated" else f"{ranks} trainer, {engines} engines"
    )
    yield f"nodes: {-(-gpus // of_a_node)} with {of_a_node} GPUs each; {gpus} GPUs are used ({shared})"


def _process_table(config: Config, shape: Shape, device: str) -> Iterator[str]:
    kinds = processes_of(config, shape, device=device)
    yield f"{'process':<14} {'number':>6}  memory of each"
    for kind in kinds:
        yield f"{kind.name:<14} {kind.count:>6}  {_memory(config, kind)}{_detail(config, kind)}"
    if device == "cpu":
        memory = sum(kind.count * kind.host_bytes for kind in kinds)
        yield f"{'together':<14} {sum(kind.count for kind in kinds):>6}  at least {readable_size(memory)}"


def _memory(config: Config, kind: ProcessKind) -> str:
    if not kind.gpu_bytes:
        return f"at least {readable_size(kind.host_bytes)}"
    parts = ", ".join(
        f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in kind.gpu_bytes.items() if name != "total"
    )
    gpu = from_config.gpu_memory(config)
    of = "" if gpu is None else f" of {readable_size(gpu)}"
    return f"{readable_size(kind.gpu_bytes['total'])}{of} on its GPU: {parts}"


def _detail(config: Config, kind: ProcessKind) -> str:
    """The sizes that make up the number."""
    if kind.name == "trainer rank":
        sizes = {name: getattr(config.parallel, name) for name in ParallelSizes.model_fields}
        named = [f"{name} {size}" for name, size in sizes.items() if isinstance(size, int) and size > 1]
        return f"; {', '.join(named)}" if named else ""
    if kind.name == "engine rank" and config.rollout.tp > 1:
        return f"; tp {config.rollout.tp}"
    return ""
