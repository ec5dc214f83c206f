"""Translates a config into the planner's inputs, and a plan into settings of a config."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_hapo.config import Config, RolloutConfig, load_config, parse_bytes, read_sources
from megatron_hapo.errors import HapoError
from megatron_hapo.model.families import read_shape
from megatron_hapo.sizing.memory import Spec
from megatron_hapo.sizing.parameters import Layout
from megatron_hapo.sizing.search import Cluster, LayoutPlan, Limits, Placement, search
from megatron_hapo.sizing.throughput import GPUS, Workload

MEAN_OVER_MAX = 0.25
"""Default ratio of the mean response to max_response_tokens: Qwen3-8B-Base reached 2,100 to 3,450 of 12,288 tokens in
the authors' curves."""
MEAN_PROMPT_TOKENS = 200
PLACEHOLDERS = ("parallel={tp: 2, dp: 2}", "rollout.engines=1", "rollout.tp=1", "rollout.ep=1")
"""Sizes with which a config with `parallel: auto` is read before the planner has chosen: they contradict no other
setting, and every setting that needs several ranks has an effect."""


def layout_of(config: Config) -> Layout:
    """The trainer layout of a config."""
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    return Layout(
        sizes=config.parallel,
        sequence_parallel=config.parallel.sequence_parallel,
        distributed_optimizer=config.trainer.distributed_optimizer,
        cpu_offload=config.optimizer.cpu_offload,
        has_reference=config.algorithm.kl.enabled,
        recompute=config.trainer.recompute,
        output_head=config.trainer.output_head,
        float32_logits=config.trainer.float32_logits,
        # A sequence that exceeds the budget gets a micro-batch of its own.
        tokens_per_microbatch=max(longest, config.trainer.max_tokens_per_microbatch),
        bytes_per_parameter=2 if config.trainer.dtype == "bfloat16" else 4,
    )


def workload_of(config: Config, *, mean_response_tokens: float | None = None) -> Workload:
    """The work of one step of a run.

    Args:
        mean_response_tokens: None: a quarter of max_response_tokens.
    """
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
    """What a plan for this config may use."""
    return Limits(
        # Entropy statistics per micro-batch need whole sequences on a rank.
        max_cp=1 if config.algorithm.entropy.source == "micro_batch" else 8,
        distributed_optimizer=config.trainer.distributed_optimizer,
        has_reference=config.algorithm.kl.enabled,
        output_head=config.trainer.output_head,
        float32_logits=config.trainer.float32_logits,
        bytes_per_parameter=2 if config.trainer.dtype == "bfloat16" else 4,
        spec="local" if config.model.spec == "local" else "te",
        # In a colocated config, memory_fraction already excludes what a trainer rank keeps.
        memory_fraction=(config.rollout if config.placement == "disaggregated" else RolloutConfig()).memory_fraction,
        max_running_requests=config.rollout.max_running_requests,
        rollout_quantization=config.rollout.quantization,
        bucket_bytes=config.weight_sync.bucket_bytes,
    )


def spec_here(config: Config) -> Spec:
    """The layer implementation that a GPU of this machine would use."""
    if config.model.spec == "auto":
        return "te" if importlib.util.find_spec("transformer_engine") else "local"
    return config.model.spec


def plan_settings(plan: LayoutPlan) -> dict[str, dict[str, Any]]:
    """The settings that a plan consists of, except its placement, by section of the config.

    They include defaults, which may have to override a base config, e.g. one with uneven stages.
    """
    layout = plan.layout
    return {
        "parallel": {
            **layout.sizes.model_dump(),
            # Has no effect at tp=1.
            **({"sequence_parallel": layout.sequence_parallel} if layout.sizes.tp > 1 else {}),
        },
        "trainer": {"max_tokens_per_microbatch": layout.tokens_per_microbatch, "recompute": layout.recompute},
        "optimizer": {"cpu_offload": layout.cpu_offload},
        "rollout": {
            "engines": plan.engines, "tp": plan.rollout_tp,
            "ep": 1,  # the planner assumes that every expert is sharded over the engine's ranks
            "memory_fraction": plan.memory_fraction,
        },
    }  # fmt: skip


def placement_settings(placement: Placement) -> dict[str, Any]:
    """The placement, with the values that it requires of other settings, by section of the config."""
    if placement == "disaggregated":
        return {"placement": placement}
    return {
        "placement": placement,
        "async": {"max_staleness": 0},
        "launch": {"engines": "trainer_nodes"},
    }


def gpu_memory(config: Config) -> int | None:
    """Bytes of a GPU, from the config or from this machine's driver; None on a CPU or if unknown."""
    if config.device == "cpu":
        return None
    if config.parallel.gpu_memory is not None:
        return parse_bytes(config.parallel.gpu_memory)
    return min(local_gpus(), default=None)


def local_gpus() -> list[int]:
    """Bytes of each GPU of this machine, from nvidia-smi, so that torch is not imported."""
    return [int(line) << 20 for line in _nvidia_smi("memory.total") if line.isdigit()]


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 operations per second of this machine's GPU; None on a CPU and for a GPU that is not in GPUS."""
    names = _nvidia_smi("name") if device == "cuda" else []
    return next((gpu.flops for gpu in GPUS.values() for name in names if gpu.name in name.lower()), None)


def _nvidia_smi(field: str) -> list[str]:
    """One field of nvidia-smi for each GPU; empty if there is no GPU or no nvidia-smi."""
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
    """The settings that `parallel: auto` stands for on this machine, as key=value; empty for any other config.

    They are the trainer's sizes, micro-batches, recomputation and offload, and the number and size of the engines.

    Raises:
        HapoError: this machine shows no GPU, or nothing fits.
        ConfigError: the config has faults.
    """
    if not is_automatic(Path(path), overrides):
        return []
    config = load_config(path, [*overrides, *PLACEHOLDERS])
    gpus = local_gpus()
    if not gpus:
        raise HapoError(
            f"{path}: parallel: auto uses the GPUs of this machine, but nvidia-smi shows none; "
            "`megatron-hapo plan CONFIG --gpus N --write FILE` plans for other machines"
        )
    cluster = Cluster(
        gpus=len(gpus), gpu_bytes=min(gpus), gpu=GPUS["h100"], nvlink_size=len(gpus),
        placement=config.placement,
    )  # fmt: skip
    limits = replace(limits_of(config), spec=spec_here(config))
    plans, _ = search(read_shape(config.model.path), workload_of(config), cluster, limits)
    return [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in plan_settings(plans[0]).items()
        for key, value in values.items()
    ]
