"""Between a run's config and the planner: what a config asks for, and a plan as settings of a config."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from megatron_hapo.config import (
    Config,
    ParallelConfig,
    RolloutConfig,
    TrainerConfig,
    load_config,
    parse_bytes,
    read_sources,
)
from megatron_hapo.errors import HapoError
from megatron_hapo.model.families import read_shape
from megatron_hapo.sizing.memory import Spec
from megatron_hapo.sizing.parameters import Layout
from megatron_hapo.sizing.search import Cluster, Limits, Placement, Plan, search
from megatron_hapo.sizing.throughput import GPUS, Workload

MEAN_OVER_MAX = 0.25
"""Mean response over max_response_tokens, where nobody says better: Qwen3-8B-Base came to 2,100 to 3,450 of 12,288
tokens in the authors' curves."""
MEAN_PROMPT_TOKENS = 200
PLANNED_SIZES = ("tp", "pp", "vpp", "cp", "etp", "ep", "dp")
STAND_INS = ("parallel={tp: 2, dp: 2}", "rollout.engines=1", "rollout.tp=1", "rollout.ep=1")
"""Sizes of a config that leaves them to the planner, while it is read: they contradict nothing, and no setting that
needs several ranks is without effect."""
UNEVEN_STAGES = ("first_stage_layers", "last_stage_layers")


def layout_of(config: Config) -> Layout:
    """The trainer's layout that a config asks for."""
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    known = ParallelConfig.model_fields.keys() & set(PLANNED_SIZES)
    return Layout(
        **{name: getattr(config.parallel, name) for name in known},
        **{name: getattr(config.parallel, name) for name in UNEVEN_STAGES},
        sequence_parallel=config.parallel.sequence_parallel,
        distributed_optimizer=config.trainer.distributed_optimizer,
        cpu_offload=config.optimizer.cpu_offload,
        recompute=config.trainer.recompute,
        output_head=config.trainer.output_head,
        # A sequence longer than the budget stands alone in a micro-batch of its own.
        tokens_per_microbatch=max(longest, config.trainer.max_tokens_per_microbatch),
        bytes_per_parameter=2 if config.trainer.dtype == "bfloat16" else 4,
    )


def workload_of(config: Config, *, mean_response_tokens: float | None = None) -> Workload:
    """A step of the run; without a better word the mean response is a quarter of the longest."""
    batch, rollout = config.batch, config.rollout
    return Workload(
        prompts_per_step=batch.prompts_per_step,
        samples_per_prompt=batch.samples_per_prompt,
        prompts_per_minibatch=batch.prompts_per_minibatch,
        mean_prompt_tokens=min(MEAN_PROMPT_TOKENS, rollout.max_prompt_tokens),
        mean_response_tokens=mean_response_tokens or MEAN_OVER_MAX * rollout.max_response_tokens,
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_response_tokens=rollout.max_response_tokens,
    )


def limits_of(config: Config) -> Limits:
    """What a plan for this run may use."""
    return Limits(
        # Entropy statistics of a micro-batch need whole sequences on a rank.
        max_cp=1 if config.algorithm.entropy.source == "micro_batch" else 8,
        distributed_optimizer=config.trainer.distributed_optimizer,
        recompute=recompute_choices(),
        output_head=config.trainer.output_head,
        bytes_per_parameter=2 if config.trainer.dtype == "bfloat16" else 4,
        spec="local" if config.model.spec == "local" else "te",
        # A colocated run's own is what a trainer rank left of an engine's share.
        memory_fraction=(config.rollout if config.placement == "disaggregated" else RolloutConfig()).memory_fraction,
        max_running_requests=config.rollout.max_running_requests,
        bucket_bytes=config.weight_sync.bucket_bytes,
    )


def recompute_choices() -> tuple[Any, ...]:
    """Those of the config."""
    return get_args(TrainerConfig.model_fields["recompute"].annotation)


def spec_here(config: Config) -> Spec:
    """The layers that a GPU of this machine would run."""
    if config.model.spec == "auto":
        return "te" if importlib.util.find_spec("transformer_engine") else "local"
    return config.model.spec


def plan_settings(plan: Plan) -> dict[str, dict[str, Any]]:
    """The settings of a config that make this plan, beside its placement: all of them, since the config that they come
    on top of may have others in their place, e.g. uneven stages.

    Raises:
        HapoError: the plan needs a size that the config has no setting for.
    """
    if missing := inexpressible(plan):
        raise HapoError(f"the config has no setting for {', '.join(missing)}")
    layout = plan.layout
    sizes = [name for name in PLANNED_SIZES if name in ParallelConfig.model_fields]
    return {
        "parallel": {
            **{name: getattr(layout, name) for name in sizes},
            **{name: getattr(layout, name) for name in UNEVEN_STAGES},
            # Has no effect at tp=1.
            **({"sequence_parallel": layout.sequence_parallel} if layout.tp > 1 else {}),
        },
        "trainer": {"max_tokens_per_microbatch": layout.tokens_per_microbatch, "recompute": layout.recompute},
        "optimizer": {"cpu_offload": layout.cpu_offload},
        "rollout": {
            "engines": plan.engines, "tp": plan.rollout_tp,
            "ep": 1,  # the planner counts experts that are cut over an engine's ranks
            "memory_fraction": plan.memory_fraction,
        },
    }  # fmt: skip


def placement_settings(placement: Placement) -> dict[str, Any]:
    """The placement, and the settings that it leaves no choice about."""
    if placement == "disaggregated":
        return {"placement": placement}
    return {
        "placement": placement,
        "async": {"max_staleness": 0},
        "launch": {"engines": "trainer_nodes"},
    }


def inexpressible(plan: Plan) -> list[str]:
    """parallel.cp=2 and the like: sizes above one that the config has no setting for."""
    unknown = [name for name in PLANNED_SIZES if name not in ParallelConfig.model_fields]
    return [f"parallel.{name}={size}" for name in unknown if (size := getattr(plan.layout, name)) > 1]


def gpu_memory(config: Config) -> int | None:
    """Bytes of a GPU: as the config says, else as the driver of this machine says; None on a CPU or if unknown."""
    if config.device == "cpu":
        return None
    if config.parallel.gpu_memory is not None:
        return parse_bytes(config.parallel.gpu_memory)
    return min(local_gpus(), default=None)


def local_gpus() -> list[int]:
    """Bytes of each GPU of this machine, from nvidia-smi, so that torch need not be imported."""
    return [int(line) << 20 for line in _nvidia_smi("memory.total") if line.isdigit()]


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 operations a second of a GPU of this machine; None on a CPU, and for a GPU that GPUS has not."""
    names = _nvidia_smi("name") if device == "cuda" else []
    return next((gpu.flops for gpu in GPUS.values() for name in names if gpu.name in name.lower()), None)


def _nvidia_smi(field: str) -> list[str]:
    """What nvidia-smi says of each GPU; nothing where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.splitlines()]


def is_automatic(path: Path, overrides: Sequence[str]) -> bool:
    """Whether the config says `parallel: auto`."""
    return read_sources(path, overrides)[0].get("parallel") == "auto"


def automatic_layout(path: Path | str, overrides: Sequence[str]) -> list[str]:
    """What `parallel: auto` stands for on this machine, as key=value settings; nothing where a config does not say so.

    It sets the trainer's sizes, micro-batches, recomputation and offload, and the number and size of the engines.

    Raises:
        HapoError: no GPU is visible here, or nothing fits; ConfigError: the config has faults.
    """
    if not is_automatic(Path(path), overrides):
        return []
    config = load_config(path, [*overrides, *STAND_INS])
    gpus = local_gpus()
    if not gpus:
        raise HapoError(
            f"{path}: parallel: auto asks for the GPUs of this machine, and nvidia-smi shows none; "
            "`megatron-hapo plan CONFIG --gpus N --write FILE` makes a layout for other machines"
        )
    cluster = Cluster(
        gpus=len(gpus), gpu_bytes=min(gpus), gpu=GPUS["h100"], nvlink_size=len(gpus),
        placement=config.placement,
    )  # fmt: skip
    limits = replace(limits_of(config), spec=spec_here(config))
    plans, _ = search(read_shape(config.model.path), workload_of(config), cluster, limits)
    plan = next((plan for plan in plans if not inexpressible(plan)), None)
    if plan is None:
        raise HapoError(f"{path}: parallel: auto: every layout that fits needs {', '.join(inexpressible(plans[0]))}")
    return [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in plan_settings(plan).items()
        for key, value in values.items()
    ]
