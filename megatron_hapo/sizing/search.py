"""All layouts of a number of GPUs: those that fit, the fastest first, and why the others do not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_hapo.config.parallel_sizes import ParallelSizes
from megatron_hapo.errors import HapoError
from megatron_hapo.model.families import MoeShape, Shape
from megatron_hapo.sizing.memory import (
    ENGINE_RESTING_BYTES,
    GIB,
    EngineMemory,
    Spec,
    TrainerMemory,
    engine_memory,
    trainer_memory,
    turns_on_shared_gpu,
)
from megatron_hapo.sizing.parameters import Layout, Recompute, experts, model_parameters
from megatron_hapo.sizing.throughput import (
    Gpu,
    StepTime,
    Workload,
    generate_seconds,
    model_flops,
    sync_seconds,
    train_seconds,
    turn_seconds,
)

Placement = Literal["disaggregated", "colocated"]
MOST_UNEVEN_STAGES = 16
OFFLOAD_MARGIN = 1.1
"""How much faster a plan must be to come before one without offload: hosts differ more than GPUs of one kind do."""


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
    distributed_optimizer: bool = True
    bytes_per_parameter: int = 2
    spec: Spec = "te"
    memory_fraction: float = 0.8
    """Of an engine that has its GPUs for itself; beside a trainer's weights it gets so much less."""
    max_running_requests: int = 256
    bucket_bytes: int = 512 << 20


@dataclass(frozen=True, kw_only=True)
class LayoutPlan:
    """One layout of trainer and engines that fits."""

    layout: Layout
    engines: int
    rollout_tp: int
    trainer: TrainerMemory
    engine: EngineMemory
    running_requests: int
    """Responses that an engine decodes together."""
    memory_fraction: float
    """Share of a GPU for the engine's weights and cache."""
    time: StepTime

    @property
    def rank(self) -> float:
        """Seconds of a step; more for plans that rest on the host's speed."""
        return self.time.total * (OFFLOAD_MARGIN if self.layout.cpu_offload else 1.0)


@dataclass(frozen=True)
class Rejection:
    """Layouts that do not fit, for one reason."""

    what: str
    """tp=2 pp=1 ..."""
    reason: str


def search(
    shape: Shape, workload: Workload, cluster: Cluster, limits: Limits
) -> tuple[list[LayoutPlan], list[Rejection]]:
    """The plans, best (`LayoutPlan.rank`) first, one for each (tp, pp, cp, etp, ep) and engine tp; and the rejections.

    Raises:
        HapoError: nothing fits; names the layout that comes nearest, and its largest part.
    """
    engines = _Engines(shape, workload, cluster, limits)
    shared = cluster.placement == "colocated"
    if cluster.gpus < 2 and not shared:
        raise HapoError("trainer and engines on GPUs of their own need two at least; placement=colocated shares one")
    rejections: list[Rejection] = []
    best: dict[tuple[int, ...], LayoutPlan] = {}
    nearest: tuple[int, str] | None = None
    some_trainer_fits = False
    for trainer_gpus in _trainer_shares(cluster):
        for wanted in _layouts(shape, workload, cluster, limits, trainer_gpus, rejections):
            layout, memory = _offloaded_if_needed(shape, workload, cluster, limits, wanted)
            needed = memory.total + (ENGINE_RESTING_BYTES if shared else 0)
            if needed > cluster.gpu_bytes:
                reason = too_large(memory, cluster.gpu_bytes, beside_engine=needed - memory.total)
                rejections.append(Rejection(describe(layout), reason))
                if nearest is None or needed < nearest[0]:
                    nearest = (needed, f"{describe(layout)}: {reason}")
                continue
            some_trainer_fits = True
            training = train_seconds(shape, layout, workload, cluster.gpu, nvlink_size=cluster.nvlink_size)
            for choice in engines.beside(memory if shared else None):
                left = cluster.gpus if shared else cluster.gpus - trainer_gpus
                if left < choice.tp:
                    engines.reject(choice.tp, f"{left} GPUs are left beside {trainer_gpus} of the trainer")
                    continue
                plan = _plan(shape, workload, cluster, layout, memory, training, choice, left // choice.tp)
                sizes = layout.sizes
                key = (sizes.tp, sizes.pp, sizes.cp, sizes.etp, sizes.ep, choice.tp)
                if key not in best or plan.rank < best[key].rank:
                    best[key] = plan
    if not best:
        head = f"no layout of {cluster.gpus} GPUs of {cluster.gpu_bytes / GIB:.0f} GiB fits"
        if some_trainer_fits or not engines.beside(None):
            raise HapoError(f"{head} an engine: {engines.rejections[-1].what}: {engines.rejections[-1].reason}")
        raise HapoError(f"{head}; nearest: {nearest[1]}" if nearest else head)
    plans = sorted(best.values(), key=lambda plan: plan.rank)
    return plans, _deduplicated([*engines.rejections, *rejections])


def _offloaded_if_needed(
    shape: Shape, workload: Workload, cluster: Cluster, limits: Limits, layout: Layout
) -> tuple[Layout, TrainerMemory]:
    """The layout, with the optimizer's state on the host where it does not fit without, and its memory."""
    room = cluster.gpu_bytes - (ENGINE_RESTING_BYTES if cluster.placement == "colocated" else 0)

    def memory_of(layout: Layout) -> TrainerMemory:
        return trainer_memory(
            shape, layout, gpu_bytes=cluster.gpu_bytes, spec=limits.spec, bucket_bytes=limits.bucket_bytes,
            num_microbatches=_microbatches(workload, layout),
        )  # fmt: skip

    memory = memory_of(layout)
    # Megatron offloads masters of 16-bit parameters, and shared ones only.
    if memory.total <= room or layout.bytes_per_parameter != 2 or not layout.distributed_optimizer:
        return layout, memory
    offloaded = replace(layout, cpu_offload=True)
    return offloaded, memory_of(offloaded)


def describe(layout: Layout) -> str:
    """tp=2 pp=1 cp=1 ep=1 dp=4, 16384 tokens, recompute none."""
    sizes = layout.sizes
    pipeline = f"pp={sizes.pp}"
    if sizes.vpp > 1:
        pipeline += f" vpp={sizes.vpp}"
    if sizes.first_stage_layers is not None:
        pipeline += f" ({sizes.first_stage_layers} layers in the first stage, {sizes.last_stage_layers} in the last)"
    experts_cut = f" etp={sizes.etp}" if sizes.etp > 1 else ""
    grid = f"tp={sizes.tp} {pipeline} cp={sizes.cp}{experts_cut} ep={sizes.ep} dp={sizes.dp}"
    offload = ", optimizer on the host" if layout.cpu_offload else ""
    return f"{grid}, {layout.tokens_per_microbatch} tokens, recompute {layout.recompute}{offload}"


def too_large(memory: TrainerMemory, gpu_bytes: int, *, beside_engine: int = 0) -> str:
    """Why a rank does not fit a GPU, on which a resting engine may have so many bytes."""
    name, size = memory.largest
    beside = f", beside {beside_engine / GIB:.1f} GiB of a resting engine," if beside_engine else ""
    return (
        f"needs {memory.total / GIB:.1f} GiB{beside} a GPU of {gpu_bytes / GIB:.1f} GiB; "
        f"the largest part is {name} with {size / GIB:.1f} GiB"
    )


def _plan(
    shape: Shape,
    workload: Workload,
    cluster: Cluster,
    layout: Layout,
    memory: TrainerMemory,
    training: tuple[float, float, float],
    choice: _EngineChoice,
    engines: int,
) -> LayoutPlan:
    gpu = cluster.gpu
    score, update, bubble = training
    turns = turn_seconds(memory.optimizer) if cluster.placement == "colocated" else 0.0
    # Scoring is one forward pass, an update a forward and a backward pass, which is twice as much.
    useful = 4 * model_flops(
        shape,
        tokens=workload.responses * workload.mean_tokens,
        length=workload.token_mean_length,
        response_share=workload.mean_response_tokens / workload.mean_tokens,
    )
    time = StepTime(
        generate=generate_seconds(shape, workload, gpu, tp=choice.tp, engines=engines, running=choice.running),
        log_probs=score,
        update=update,
        sync=sync_seconds(shape, layout, gpu, num_parameters=model_parameters(shape)) + turns,
        bubble_share=bubble,
        mfu=useful / ((score + update) * layout.sizes.world_size * gpu.flops),
    )
    return LayoutPlan(
        layout=layout, engines=engines, rollout_tp=choice.tp, trainer=memory, engine=choice.memory,
        running_requests=choice.running, memory_fraction=choice.memory_fraction, time=time,
    )  # fmt: skip


def _trainer_shares(cluster: Cluster) -> list[int]:
    """Numbers of GPUs that the trainer may get."""
    if cluster.placement == "colocated":
        return [cluster.gpus]
    eighths = {cluster.gpus * part // 8 for part in range(1, 8)}
    return sorted(share for share in eighths if 0 < share < cluster.gpus)


@dataclass(frozen=True, kw_only=True)
class _EngineChoice:
    tp: int
    memory: EngineMemory
    running: int
    memory_fraction: float


class _Engines:
    """Sizes of engines that hold the model and one longest response; and why others do not."""

    def __init__(self, shape: Shape, workload: Workload, cluster: Cluster, limits: Limits):
        self._shape, self._workload, self._cluster, self._limits = shape, workload, cluster, limits
        self._rejections: dict[Rejection, None] = {}  # in their order, each once
        self._known: dict[int, list[_EngineChoice]] = {}

    def beside(self, trainer: TrainerMemory | None) -> list[_EngineChoice]:
        """Of GPUs of their own, or of those on which such trainer ranks rest."""
        rest = 0 if trainer is None else trainer.resting()
        if rest not in self._known:
            sizes = _divisors(self._cluster.nvlink_size)
            self._known[rest] = [choice for tp in sizes if (choice := self._choice(tp, rest))]
        if trainer is None:
            return self._known[rest]
        gpu_bytes, fitting = self._cluster.gpu_bytes, []
        for choice in self._known[rest]:
            turn, needed = max(turns_on_shared_gpu(trainer, choice.memory).items(), key=lambda item: item[1])
            if needed <= gpu_bytes:
                fitting.append(choice)
            else:
                needs = f"{needed / GIB:.1f} GiB of {gpu_bytes / GIB:.1f} GiB beside a trainer rank ({turn})"
                self.reject(choice.tp, f"a shared GPU needs {needs}")
        return fitting

    @property
    def rejections(self) -> list[Rejection]:
        return list(self._rejections)

    def reject(self, tp: int, reason: str) -> None:
        self._rejections[Rejection(f"rollout.tp={tp}", reason)] = None

    def _choice(self, tp: int, rest: int) -> _EngineChoice | None:
        shape, workload, limits, gpu_bytes = self._shape, self._workload, self._limits, self._cluster.gpu_bytes
        if fault := _tp_fault(shape, tp, engine=True):
            self.reject(tp, fault)
            return None
        fraction = limits.memory_fraction if rest == 0 else int(100 * (limits.memory_fraction - rest / gpu_bytes)) / 100
        memory = engine_memory(
            shape, tp=tp, gpu_bytes=gpu_bytes, memory_fraction=fraction,
            num_parameters=model_parameters(shape), beside=rest,
        )  # fmt: skip
        if memory.kv_tokens < workload.longest:
            beside = f", beside the {rest / GIB:.1f} GiB of a resting trainer rank" if rest else ""
            reason = (
                f"weights of {memory.weights / GIB:.1f} GiB leave room for {max(0, memory.kv_tokens)} tokens of KV "
                f"cache in {fraction:.0%} of {gpu_bytes / GIB:.1f} GiB{beside}; one response may need "
                f"{workload.longest}"
            )
            self.reject(tp, reason)
            return None
        # While they run, responses are half done on average.
        in_cache = workload.mean_prompt_tokens + workload.token_mean_length / 2
        running = max(1, min(limits.max_running_requests, int(memory.kv_tokens / in_cache)))
        return _EngineChoice(tp=tp, memory=memory, running=running, memory_fraction=fraction)


def _layouts(
    shape: Shape, workload: Workload, cluster: Cluster, limits: Limits, gpus: int, rejections: list[Rejection]
) -> Iterator[Layout]:
    """Every layout of so many GPUs that the model's sizes and the batch allow."""
    moe = next((found for layer in range(shape.num_layers) if (found := experts(shape, layer))), None)
    for tp in _divisors(cluster.nvlink_size):
        if fault := _tp_fault(shape, tp):
            rejections.append(Rejection(f"tp={tp}", fault))
            continue
        for stages, cp in itertools.product(_pipelines(shape.num_layers), _powers_of_two(limits.max_cp)):
            pp = stages["pp"]
            if gpus % (tp * pp * cp):
                continue
            dp = gpus // (tp * pp * cp)
            if dp > workload.responses_per_minibatch:
                reason = f"a mini-batch has {workload.responses_per_minibatch} responses, fewer than dp={dp} ranks"
                rejections.append(Rejection(f"tp={tp} pp={pp} cp={cp} dp={dp}", reason))
                continue
            for etp, ep in _expert_grids(moe, tp, dp):
                grid = Layout(
                    sizes=ParallelSizes(tp=tp, **stages, cp=cp, ep=ep, etp=etp, dp=dp),
                    output_head=limits.output_head, bytes_per_parameter=limits.bytes_per_parameter,
                    distributed_optimizer=limits.distributed_optimizer,
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


def _pipelines(num_layers: int) -> Iterator[dict[str, int]]:
    """Equal stages, interleaved or not; where layers do not split, fewer in the first and the last stage."""
    for pp in sorted({*_divisors(num_layers), *_powers_of_two(min(num_layers, MOST_UNEVEN_STAGES))}):
        if num_layers % pp == 0:
            for vpp in (1, 2, 4):
                if vpp == 1 or (pp > 1 and num_layers % (pp * vpp) == 0):
                    yield {"pp": pp, "vpp": vpp}
            continue
        middle = -(-num_layers // pp)
        ends = num_layers - (pp - 2) * middle
        if ends >= 2:
            yield {"pp": pp, "first_stage_layers": ends // 2, "last_stage_layers": ends - ends // 2}


def _microbatches(workload: Workload, layout: Layout) -> int:
    tokens = workload.responses_per_minibatch * workload.mean_tokens / layout.sizes.dp
    return max(1, -(-int(tokens) // layout.tokens_per_microbatch))


def _tp_fault(shape: Shape, tp: int, *, engine: bool = False) -> str | None:
    sizes = {"attention heads": shape.num_heads, "feed-forward units": shape.ffn_size}
    if not (engine and tp % shape.num_kv_heads == 0):  # SGLang gives several ranks the same head
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
