"""Settings that are sound alone: do they fit each other, and does each of them have an effect?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_hapo.config.faults import Fault

if TYPE_CHECKING:
    from megatron_hapo.config import Config


def contradictions(config: Config) -> Iterator[Fault]:
    """Settings that are sound alone and cannot work together."""
    batch, rollout, reward = config.batch, config.rollout, config.reward
    if batch.prompts_per_step % batch.prompts_per_minibatch:
        yield Fault(
            "batch.prompts_per_minibatch",
            f"must divide batch.prompts_per_step={batch.prompts_per_step}, got {batch.prompts_per_minibatch}",
            ("batch.prompts_per_step",),
        )
    if batch.samples_per_prompt == 1:
        yield Fault(
            "batch.samples_per_prompt",
            f"must be at least 2, got 1: algorithm.advantage={config.algorithm.advantage} compares the responses to "
            "one prompt with each other",
            ("algorithm.advantage",),
        )
    yield from config.parallel.grid_faults("parallel.")
    if config.trainer.quantization != "none" and config.trainer.dtype != "bfloat16":
        yield Fault(
            "trainer.quantization",
            f"{config.trainer.quantization} needs trainer.dtype=bfloat16, got {config.trainer.dtype}: the optimizer's "
            "float32 masters are the exact weights",
            ("trainer.dtype",),
        )
    if config.overlap.max_staleness and config.algorithm.importance_correction.level == "none":
        yield Fault(
            "async.max_staleness",
            f"{config.overlap.max_staleness} needs algorithm.importance_correction.level token or sequence, got none: "
            "rollouts come from older weights than those that are trained",
            ("algorithm.importance_correction",),
        )
    if config.placement == "colocated":
        yield from _colocated(config)
    if config.optimizer.cpu_offload:
        yield from _cpu_offload(config)
    if config.weight_sync.in_flight != "finish" and not config.overlap.max_staleness:
        yield Fault(
            "weight_sync.in_flight",
            f"{config.weight_sync.in_flight} needs async.max_staleness of 1, got 0: nothing is generated beside a sync",
            ("async.max_staleness",),
        )
    if config.algorithm.entropy.source == "micro_batch" and config.parallel.cp > 1:
        yield Fault(
            "algorithm.entropy.source",
            f"must be old or current with parallel.cp={config.parallel.cp}, got micro_batch: no rank sees all of "
            "its tokens",
            ("parallel.cp",),
        )
    if reward.overlong.buffer_tokens >= rollout.max_response_tokens:
        yield Fault(
            "reward.overlong.buffer_tokens",
            f"must be less than rollout.max_response_tokens={rollout.max_response_tokens}, "
            f"got {reward.overlong.buffer_tokens}",
            ("rollout.max_response_tokens",),
        )
    if reward.correct <= reward.wrong:
        yield Fault(
            "reward.correct",
            f"must be greater than reward.wrong={reward.wrong}, got {reward.correct}",
            ("reward.wrong",),
        )
    if rollout.ep not in (1, rollout.tp):
        yield Fault("rollout.ep", f"must be 1 or rollout.tp={rollout.tp}, got {rollout.ep}", ("rollout.tp",))
    elif rollout.ep > 1 and config.device == "cpu":
        yield Fault("rollout.ep", f"must be 1 with device=cpu, got {rollout.ep}: SGLang has no kernel", ("device",))
    if beyond := [step for step in config.profile.steps if step > config.steps]:
        yield Fault("profile.steps", f"must be steps of the run, 1 to steps={config.steps}, got {beyond}", ("steps",))
    ports = config.launch.ray_worker_ports
    if ports is not None and ports[1] - ports[0] + 1 < 10 + rollout.engines:
        yield Fault(
            "launch.ray_worker_ports",
            f"must span at least {10 + rollout.engines} ports, from the first to the last, got {list(ports)}",
            ("rollout.engines",),
        )
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if rollout.kv_cache_tokens is None and config.device == "cpu":
        yield Fault("rollout.kv_cache_tokens", "is required with device=cpu", ("device",))
    if rollout.kv_cache_tokens is not None and rollout.kv_cache_tokens < longest:
        yield Fault(
            "rollout.kv_cache_tokens",
            f"must hold one prompt and response of max_prompt_tokens + max_response_tokens = {longest}, "
            f"got {rollout.kv_cache_tokens}",
            ("rollout.max_prompt_tokens", "rollout.max_response_tokens"),
        )
    if config.eval.samples > 1 and config.eval.temperature == 0:
        yield Fault(
            "eval.samples",
            f"must be 1 with eval.temperature=0, got {config.eval.samples}: greedy responses are all the same",
            ("eval.temperature",),
        )
    for name, source in (("train", config.data.train), ("eval", config.data.eval)):
        if source is not None and source.type == "arithmetic" and source.min_terms > source.max_terms:
            yield Fault(
                f"data.{name}.min_terms",
                f"must be at most data.{name}.max_terms={source.max_terms}, got {source.min_terms}",
                (f"data.{name}.max_terms",),
            )
        if source is not None and reward.scorer == "reasoning_gym" and source.type != "reasoning_gym":
            yield Fault(
                "reward.scorer",
                f"reasoning_gym cannot score data.{name}.type={source.type}; auto chooses by the data source",
                (f"data.{name}.type",),
            )


def _colocated(config: Config) -> Iterator[Fault]:
    rollout, world_size = config.rollout, config.parallel.world_size
    if config.overlap.max_staleness:
        yield Fault(
            "async.max_staleness",
            f"must be 0 with placement=colocated, got {config.overlap.max_staleness}: engines that share the trainer's "
            "GPUs cannot generate while it trains",
            ("placement",),
        )
    if rollout.engines * rollout.tp > world_size:
        yield Fault(
            "rollout.engines",
            f"rollout.engines * rollout.tp must be at most the {world_size} trainer ranks (parallel.tp * pp * cp * dp) "
            f"with placement=colocated, got {rollout.engines} * {rollout.tp}",
            ("placement", "rollout.tp", "parallel"),
        )
    if config.launch.engines == "own_nodes":
        yield Fault(
            "launch.engines",
            "must be trainer_nodes with placement=colocated, got own_nodes",
            ("placement",),
        )


def _cpu_offload(config: Config) -> Iterator[Fault]:
    key, trainer = "optimizer.cpu_offload", config.trainer
    if config.device == "cpu":
        yield Fault(key, "needs GPUs, got device=cpu: all memory is the host's", ("device",))
    if not trainer.distributed_optimizer:
        yield Fault(key, "needs trainer.distributed_optimizer=true, got false", ("trainer.distributed_optimizer",))
    if trainer.dtype != "bfloat16":
        message = f"needs trainer.dtype=bfloat16, got {trainer.dtype}: Megatron loads checkpoints of no other"
        yield Fault(key, message, ("trainer.dtype",))


def settings_without_effect(config: Config, keys: Sequence[str]) -> Iterator[Fault]:
    """Among `keys`, which the user asked for in so many words, those that this run would ignore."""
    algorithm = config.algorithm
    uses_h_in_loss = algorithm.adaptive_clip.enabled or algorithm.redistribution.enabled
    uses_entropy = algorithm.adaptive_temperature.enabled or uses_h_in_loss
    corrects = algorithm.importance_correction.level != "none"
    ignored = {
        "parallel.sequence_parallel": (
            config.parallel.tp > 1 or not config.parallel.sequence_parallel,
            "parallel.tp is 1",
        ),
        "trainer.overlap_communication": (
            config.parallel.dp * config.parallel.cp > 1 or not config.trainer.overlap_communication,
            "parallel.dp and parallel.cp are 1",
        ),
        "algorithm.advantage_fallback": (
            algorithm.advantage == "token_level_group_average" and algorithm.norm_by_std,
            f"algorithm.advantage is {algorithm.advantage} and norm_by_std {str(algorithm.norm_by_std).lower()}",
        ),
        "algorithm.entropy": (uses_entropy, "no part of the algorithm that uses the entropy is enabled"),
        "algorithm.entropy.source": (uses_h_in_loss, "no part of the loss that uses the entropy is enabled"),
        "algorithm.forking_tokens.share": (
            algorithm.forking_tokens.enabled,
            "algorithm.forking_tokens.enabled is false",
        ),
        **{
            f"algorithm.dual_constraint.{name}": (
                algorithm.dual_constraint.enabled,
                "algorithm.dual_constraint.enabled is false",
            )
            for name in ("quantile", "clip_low", "clip_high", "kl")
        },
        "algorithm.importance_correction.mode": (corrects, "algorithm.importance_correction.level is none"),
        "algorithm.importance_correction.max_weight": (corrects, "algorithm.importance_correction.level is none"),
        "algorithm.adaptive_temperature.tau": (
            algorithm.adaptive_temperature.enabled,
            "algorithm.adaptive_temperature.enabled is false",
        ),
        "algorithm.adaptive_clip.alpha": (
            algorithm.adaptive_clip.enabled,
            "algorithm.adaptive_clip.enabled is false",
        ),
        "algorithm.redistribution.beta": (
            algorithm.redistribution.enabled,
            "algorithm.redistribution.enabled is false",
        ),
        "dynamic_sampling.max_generation_batches": (
            config.dynamic_sampling.enabled,
            "dynamic_sampling.enabled is false",
        ),
        "reward.overlong.factor": (config.reward.overlong.buffer_tokens > 0, "reward.overlong.buffer_tokens is 0"),
        **{
            f"memory_turns.{name}": (config.placement == "colocated", "placement is disaggregated")
            for name in ("trainer", "engines")
        },
        "eval": (config.data.eval is not None, "data.eval names no data"),
    }
    for key in keys:
        has_effect, reason = ignored.get(key, (True, ""))
        if not has_effect:
            yield Fault(key, f"has no effect: {reason}")
