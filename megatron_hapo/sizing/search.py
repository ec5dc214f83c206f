"""All layouts of a number of GPUs: those that fit, the fastest first, and why the others do not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_hapo.errors import HapoError
from megatron_hapo.model.families import MoeShape, Shape
from megatron_hapo.pipeline import Pipeline
from megatron_hapo.sizing.memory import GIB, EngineMemory, Spec, TrainerMemory, engine_memory, trainer_memory
from megatron_hapo.sizing.parameters import Layout, Recompute, experts, model_parameters
from megatron_hapo.sizing.throughput import (
    Gpu,
    StepTime,
    Workload,
    generate_seconds,
    model_flops,
    sync_seconds,
    train_seconds,
)

Placement = Literal["disaggregated", "colocated"]
MOST_UNEVEN_STAGES = 16


@dataclass(frozen=True, kw_only=True)
class Cluster:
    gpus: int
    gpu_bytes: int
    """Memory of one GPU."""
    gpu: Gpu
    nvlink_size: int = 8
    """GPUs of one NVLink domain; tensor parallelism stays inside."""
    placement: Placement = "disaggregated"
    """`disaggregated`: trainer and engines have GPUs of their own. `colocated`: they share all, in turn."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the plan may use, as the config knows it."""

    max_cp: int = 1
    recompute: tuple[Recompute, ...] = ("none", "selective", "full")
    output_head: Literal["logits", "fused"] = "logits"
    bytes_per_parameter: int = 2
    spec: Spec = "te"
    memory_fraction: float = 0.8
    max_running_requests: int = 256
    bucket_bytes: int = 512 << 20
    replicate_kv_heads: bool = False
    """Whether an engine may have more ranks than the model has key-value heads, each head on several of them."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout of trainer and engines that fits."""

    layout: Layout
    engines: int
    rollout_tp: int
    trainer: TrainerMemory
    engine: EngineMemory
    running_requests: int
    """Responses that an engine decodes together."""
    time: StepTime


@dataclass(frozen=True)
class Rejection:
    """Layouts that do not fit, for one reason."""

    what: str
    """tp=2 pp=1 ..."""
    reason: str


def search(shape: Shape, workload: Workload, cluster: Cluster, limits: Limits) -> tuple[list[Plan], list[Rejection]]:
    """Plans, the shortest step first, one for each (tp, pp, cp, etp, ep) and engine tp; and what was rejected.

    Raises:
        HapoError: nothing fits; names the layout that comes nearest, and its largest part.
    """
    engines, rejected_engines = _engine_choices(shape, workload, cluster, limits)
    rejections = [*rejected_engines]
    best: dict[tuple[int, ...], Plan] = {}
    nearest: tuple[int, str] | None = None
    for trainer_gpus in _trainer_shares(cluster):
        for layout in _layouts(shape, workload, cluster, limits, trainer_gpus, rejections):
            memory = trainer_memory(
                shape, layout, gpu_bytes=cluster.gpu_bytes, spec=limits.spec, bucket_bytes=limits.bucket_bytes,
                num_microbatches=_microbatches(workload, layout),
            )  # fmt: skip
            if memory.total > cluster.gpu_bytes:
                reason = too_large(memory, cluster.gpu_bytes)
                rejections.append(Rejection(describe(layout), reason))
                if nearest is None or memory.total < nearest[0]:
                    nearest = (memory.total, f"{describe(layout)}: {reason}")
                continue
            training = train_seconds(shape, layout, workload, cluster.gpu, nvlink_size=cluster.nvlink_size)
            for rollout_tp, engine, running in engines:
                left = cluster.gpus if cluster.placement == "colocated" else cluster.gpus - trainer_gpus
                if left < rollout_tp:
                    continue
                plan = _plan(
                    shape, workload, cluster, layout, memory, training, rollout_tp, engine, running, left // rollout_tp
                )
                key = (layout.tp, layout.pp, layout.cp, layout.etp, layout.ep, rollout_tp)
                if key not in best or plan.time.total < best[key].time.total:
                    best[key] = plan
    if not best:
        head = f"no layout of {cluster.gpus} GPUs of {cluster.gpu_bytes / GIB:.0f} GiB fits"
        if not engines:
            raise HapoError(f"{head} an engine: {rejected_engines[-1].what}: {rejected_engines[-1].reason}")
        raise HapoError(f"{head}; nearest: {nearest[1]}" if nearest else head)
    return sorted(best.values(), key=lambda plan: plan.time.total), _deduplicated(rejections)


def describe(layout: Layout) -> str:
    """tp=2 pp=1 cp=1 ep=1 dp=4, 16384 tokens, recompute none."""
    pipeline = f"pp={layout.pp}"
    if layout.vpp > 1:
        pipeline += f" vpp={layout.vpp}"
    if layout.first_stage_layers is not None:
        pipeline += f" ({layout.first_stage_layers} layers in the first stage, {layout.last_stage_layers} in the last)"
    experts_cut = f" etp={layout.etp}" if layout.etp > 1 else ""
    sizes = f"tp={layout.tp} {pipeline} cp={layout.cp}{experts_cut} ep={layout.ep} dp={layout.dp}"
    return f"{sizes}, {layout.tokens_per_microbatch} tokens, recompute {layout.recompute}"


def too_large(memory: TrainerMemory, gpu_bytes: int) -> str:
    """Why a rank does not fit a GPU."""
    name, size = memory.largest
    return (
        f"needs {memory.total / GIB:.1f} GiB a GPU of {gpu_bytes / GIB:.1f} GiB; "
        f"the largest part is {name} with {size / GIB:.1f} GiB"
    )


def _plan(
    shape: Shape,
    workload: Workload,
    cluster: Cluster,
    layout: Layout,
    memory: TrainerMemory,
    training: tuple[float, float, float],
    rollout_tp: int,
    engine: EngineMemory,
    running: int,
    engines: int,
) -> Plan:
    gpu = cluster.gpu
    score, update, bubble = training
    # Scoring is one forward pass, an update a forward and a backward pass, which is twice as much.
    useful = 4 * model_flops(
        shape,
        tokens=workload.responses * workload.mean_tokens,
        length=workload.token_mean_length,
        response_share=workload.mean_response_tokens / workload.mean_tokens,
    )
    time = StepTime(
        generate=generate_seconds(shape, workload, gpu, tp=rollout_tp, engines=engines, running=running),
        log_probs=score,
        update=update,
        sync=sync_seconds(shape, layout, gpu, num_parameters=model_parameters(shape)),
        bubble_share=bubble,
        mfu=useful / ((score + update) * layout.world_size * gpu.flops),
    )
    return Plan(
        layout=layout, engines=engines, rollout_tp=rollout_tp, trainer=memory, engine=engine,
        running_requests=running, time=time,
    )  # fmt: skip


def _trainer_shares(cluster: Cluster) -> list[int]:
    """Numbers of GPUs that the trainer may get."""
    if cluster.placement == "colocated":
        return [cluster.gpus]
    eighths = {cluster.gpus * part // 8 for part in range(1, 8)}
    return sorted(share for share in eighths if 0 < share < cluster.gpus)


def _engine_choices(
    shape: Shape, workload: Workload, cluster: Cluster, limits: Limits
) -> tuple[list[tuple[int, EngineMemory, int]], list[Rejection]]:
    """(tp, memory, running requests) of engines that hold the model and one longest response."""
    choices, rejections = [], []
    for tp in _divisors(cluster.nvlink_size):
        fault = _tp_fault(shape, tp, engine=True, replicate=limits.replicate_kv_heads)
        if fault:
            rejections.append(Rejection(f"rollout.tp={tp}", fault))
            continue
        memory = engine_memory(
            shape, tp=tp, gpu_bytes=cluster.gpu_bytes, memory_fraction=limits.memory_fraction,
            num_parameters=model_parameters(shape),
        )  # fmt: skip
        if memory.kv_tokens < workload.longest:
            reason = (
                f"weights of {memory.weights / GIB:.1f} GiB leave room for {max(0, memory.kv_tokens)} tokens of KV "
                f"cache in {limits.memory_fraction:.0%} of {cluster.gpu_bytes / GIB:.1f} GiB; one response may need "
                f"{workload.longest}"
            )
            rejections.append(Rejection(f"rollout.tp={tp}", reason))
            continue
        # While they run, responses are half done on average.
        in_cache = workload.mean_prompt_tokens + workload.token_mean_length / 2
        running = max(1, min(limits.max_running_requests, int(memory.kv_tokens / in_cache)))
        choices.append((tp, memory, running))
    return choices, rejections


def _layouts(
    shape: Shape, workload: Workload, cluster: Cluster, limits: Limits, gpus: int, rejections: list[Rejection]
) -> Iterator[Layout]:
    """Every layout of so many GPUs that the model's sizes and the batch allow."""
    moe = next((found for layer in range(shape.num_layers) if (found := experts(shape, layer))), None)
    for tp in _divisors(cluster.nvlink_size):
        if fault := _tp_fault(shape, tp):
            rejections.append(Rejection(f"tp={tp}", fault))
            continue
        for pipeline, cp in itertools.product(_pipelines(shape.num_layers), _powers_of_two(limits.max_cp)):
            pp = pipeline.pp
            if gpus % (tp * pp * cp):
                continue
            dp = gpus // (tp * pp * cp)
            if dp > workload.responses_per_minibatch:
                reason = f"a mini-batch has {workload.responses_per_minibatch} responses, fewer than dp={dp} ranks"
                rejections.append(Rejection(f"tp={tp} pp={pp} cp={cp} dp={dp}", reason))
                continue
            for etp, ep in _expert_grids(moe, tp, dp):
                grid = Layout(
                    tp=tp, **vars(pipeline), cp=cp, ep=ep, etp=etp, dp=dp,
                    output_head=limits.output_head, bytes_per_parameter=limits.bytes_per_parameter,
                )  # fmt: skip
                for factor, recompute in itertools.product((1, 2, 4), limits.recompute):
                    # The budget must hold the longest sequence; a whole number of ranks' shares.
                    budget = -(-factor * workload.longest // 1024) * 1024
                    yield replace(grid, tokens_per_microbatch=budget, recompute=recompute)


def _expert_grids(moe: MoeShape | None, tp: int, dp: int) -> Iterator[tuple[int, int]]:
    """(etp, ep): experts whole or cut over all tp ranks, dealt out over what is left of tp x dp."""
    if moe is None:
        yield 1, 1
        return
    for etp in dict.fromkeys((1, tp)):
        for ep in _powers_of_two(tp * dp // etp):
            if moe.ffn_size % etp == 0 and moe.num_experts % ep == 0 and tp * dp % (etp * ep) == 0:
                yield etp, ep


def _pipelines(num_layers: int) -> Iterator[Pipeline]:
    """Equal stages, interleaved or not; where layers do not split, fewer in the first and the last stage."""
    for pp in sorted({*_divisors(num_layers), *_powers_of_two(min(num_layers, MOST_UNEVEN_STAGES))}):
        if num_layers % pp == 0:
            yield from (
                Pipeline(pp=pp, vpp=vpp) for vpp in (1, 2, 4) if vpp == 1 or (pp > 1 and num_layers % (pp * vpp) == 0)
            )
            continue
        middle = -(-num_layers // pp)
        ends = num_layers - (pp - 2) * middle
        if ends >= 2:
            yield Pipeline(pp=pp, first_stage_layers=ends // 2, last_stage_layers=ends - ends // 2)


def _microbatches(workload: Workload, layout: Layout) -> int:
    tokens = workload.responses_per_minibatch * workload.mean_tokens / layout.dp
    return max(1, -(-int(tokens) // layout.tokens_per_microbatch))


def _tp_fault(shape: Shape, tp: int, *, engine: bool = False, replicate: bool = False) -> str | None:
    sizes = {"attention heads": shape.num_heads, "feed-forward units": shape.ffn_size}
    if not (replicate and tp % shape.num_kv_heads == 0):
        sizes["key-value heads"] = shape.num_kv_heads
    moe = next((found for layer in range(shape.num_layers) if (found := experts(shape, layer))), None)
    if moe and engine:  # the trainer may leave them whole
        sizes["feed-forward units of an expert"] = moe.ffn_size
    bad = [f"{size} {what}" for what, size in sizes.items() if size % tp]
    return f"{' and '.join(bad)} do not split over tp={tp}" if bad else None


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _powers_of_two(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(limit.bit_length())]


def _deduplicated(rejections: Sequence[Rejection]) -> list[Rejection]:
    return list(dict.fromkeys(rejections))
