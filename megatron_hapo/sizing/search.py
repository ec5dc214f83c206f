"""Searches the layouts of a cluster: those that fit, fastest first, and why the others were rejected."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from megatron_hapo.config import ParallelSizes
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
"""Most pipeline stages that are tried where they do not divide the number of layers."""
OFFLOAD_MARGIN = 1.1
"""How much faster a plan with offload must be to rank before one without: hosts vary more than GPUs of one model."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The GPUs that a plan is for."""

    gpus: int
    """Number of GPUs of trainer and engines together."""
    gpu_bytes: int
    """Memory of one GPU."""
    gpu: Gpu
    nvlink_size: int = 8
    """GPUs of one NVLink domain; tensor parallelism stays inside a domain."""
    placement: Placement = "disaggregated"
    """`disaggregated`: trainer and engines have separate GPUs. `colocated`: they share all GPUs and take turns."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan may use, in terms of the config's settings."""

    max_cp: int = 1
    output_head: Literal["logits", "fused"] = "logits"
    float32_logits: bool = False
    distributed_optimizer: bool = True
    has_reference: bool = False
    bytes_per_parameter: int = 2
    spec: Spec = "te"
    memory_fraction: float = 0.8
    """Share of a GPU for an engine that has its GPUs to itself; the planner subtracts what a trainer rank keeps."""
    max_running_requests: int = 256
    rollout_quantization: Literal["none", "fp8"] = "none"
    bucket_bytes: int = 512 << 20


@dataclass(frozen=True, kw_only=True)
class LayoutPlan:
    """A layout of trainer and engines that fits, with its memory and estimated times."""

    layout: Layout
    engines: int
    rollout_tp: int
    trainer: TrainerMemory
    engine: EngineMemory
    running_requests: int
    """Responses that an engine decodes concurrently."""
    memory_fraction: float
    """Share of a GPU for the engine's weights and KV cache."""
    time: StepTime

    @property
    def rank(self) -> float:
        """Seconds of a step, by which plans are sorted; increased for plans that depend on the host's speed."""
        return self.time.total * (OFFLOAD_MARGIN if self.layout.cpu_offload else 1.0)


@dataclass(frozen=True)
class Rejection:
    """Layouts that were rejected for the same reason."""

    what: str
    """The sizes that these layouts share, e.g. tp=2 pp=1."""
    reason: str


def search(
    shape: Shape, workload: Workload, cluster: Cluster, limits: Limits
) -> tuple[list[LayoutPlan], list[Rejection]]:
    """The plans, best (`LayoutPlan.rank`) first, one for each (tp, pp, cp, etp, ep) and engine tp; and the rejections.

    There is at least one plan.

    Raises:
        HapoError: nothing fits; names the layout that comes closest, and its largest part.
    """
    if cluster.gpus < 2 and cluster.placement == "disaggregated":
        raise HapoError("placement=disaggregated needs at least 2 GPUs, got 1; use placement=colocated to share it")
    found = _Search(shape, workload, cluster, limits)
    for trainer_gpus in _trainer_shares(cluster):
        for layout in _layouts(shape, workload, cluster, limits, trainer_gpus, found.rejections):
            found.consider(layout)
    if not found.best:
        raise HapoError(found.nothing_fits())
    plans = sorted(found.best.values(), key=lambda plan: plan.rank)
    return plans, list(dict.fromkeys([*found.engines.rejections, *found.rejections]))


@dataclass
class _Search:
    """What was found so far."""

    shape: Shape
    workload: Workload
    cluster: Cluster
    limits: Limits
    best: dict[tuple[int, ...], LayoutPlan] = field(default_factory=dict)
    """The best plan for each (tp, pp, cp, etp, ep) and engine tp."""
    rejections: list[Rejection] = field(default_factory=list)
    nearest: tuple[int, str] | None = None
    """Bytes that the smallest rejected layout needs, and its description."""
    some_trainer_fits: bool = False

    def __post_init__(self) -> None:
        self.engines = _Engines(self.shape, self.workload, self.cluster, self.limits)

    def consider(self, wanted: Layout) -> None:
        """Record the plans with this layout of the trainer, or why there are none."""
        shape, workload, cluster = self.shape, self.workload, self.cluster
        shared = cluster.placement == "colocated"
        layout, memory = _offloaded_if_needed(shape, workload, cluster, self.limits, wanted)
        needed = memory.total + (ENGINE_RESTING_BYTES if shared else 0)
        if needed > cluster.gpu_bytes:
            self._reject(layout, memory, needed)
            return
        self.some_trainer_fits = True
        sizes = layout.sizes
        training = train_seconds(shape, layout, workload, cluster.gpu, nvlink_size=cluster.nvlink_size)
        engine_gpus = cluster.gpus if shared else cluster.gpus - sizes.world_size
        for choice in self.engines.fitting(memory if shared else None):
            if engine_gpus < choice.tp:
                reason = f"only {engine_gpus} GPUs remain for engines when the trainer has {sizes.world_size}"
                self.engines.reject(choice.tp, reason)
                continue
            engines = engine_gpus // choice.tp
            quantization = self.limits.rollout_quantization
            plan = _plan(shape, workload, cluster, layout, memory, training, choice, engines, quantization)
            key = (sizes.tp, sizes.pp, sizes.cp, sizes.etp, sizes.ep, choice.tp)
            if key not in self.best or plan.rank < self.best[key].rank:
                self.best[key] = plan

    def nothing_fits(self) -> str:
        """The error message for a search without plans."""
        head = f"no layout of {self.cluster.gpus} GPUs of {self.cluster.gpu_bytes / GIB:.0f} GiB"
        if self.some_trainer_fits or not self.engines.fitting(None):
            last = self.engines.rejections[-1]
            return f"{head} has room for an engine: {last.what}: {last.reason}"
        return f"{head} fits; nearest: {self.nearest[1]}" if self.nearest else f"{head} fits"

    def _reject(self, layout: Layout, memory: TrainerMemory, needed: int) -> None:
        reason = too_large(memory, self.cluster.gpu_bytes, beside_engine=needed - memory.total)
        self.rejections.append(Rejection(describe(layout), reason))
        if self.nearest is None or needed < self.nearest[0]:
            self.nearest = (needed, f"{describe(layout)}: {reason}")


def _offloaded_if_needed(
    shape: Shape, workload: Workload, cluster: Cluster, limits: Limits, layout: Layout
) -> tuple[Layout, TrainerMemory]:
    """The layout and its memory, with the optimizer's state on the host if it does not fit the GPU."""
    room = cluster.gpu_bytes - (ENGINE_RESTING_BYTES if cluster.placement == "colocated" else 0)

    def memory_of(layout: Layout) -> TrainerMemory:
        return trainer_memory(
            shape, layout, gpu_bytes=cluster.gpu_bytes, spec=limits.spec, bucket_bytes=limits.bucket_bytes,
            num_microbatches=_microbatches(workload, layout),
        )  # fmt: skip

    memory = memory_of(layout)
    # Megatron offloads only master weights of 16-bit parameters, and only with the distributed optimizer.
    if memory.total <= room or layout.bytes_per_parameter != 2 or not layout.distributed_optimizer:
        return layout, memory
    offloaded = replace(layout, cpu_offload=True)
    return offloaded, memory_of(offloaded)


def describe(layout: Layout) -> str:
    """The layout in words, e.g. tp=2 pp=1 cp=1 ep=1 dp=4, 16384 tokens, recompute none."""
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
    """Why a trainer rank does not fit a GPU.

    Args:
        beside_engine: bytes that a resting engine keeps on the same GPU.
    """
    name, size = memory.largest
    beside = f" beside the {beside_engine / GIB:.1f} GiB of a resting engine" if beside_engine else ""
    return (
        f"needs {memory.total / GIB:.1f} GiB{beside}, but a GPU has {gpu_bytes / GIB:.1f} GiB; "
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
    quantization: Literal["none", "fp8"],
) -> LayoutPlan:
    """The plan of a layout whose trainer and engines fit.

    Args:
        training: seconds of scoring and of updates, and the bubble's share, from `train_seconds`.
    """
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
        generate=generate_seconds(
            shape,
            workload,
            gpu,
            tp=choice.tp,
            engines=engines,
            running=choice.running,
            bytes_per_linear_weight=1 if quantization == "fp8" else 2,
        ),
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
    """The numbers of GPUs that are tried for the trainer."""
    if cluster.placement == "colocated":
        return [cluster.gpus]
    eighths = {cluster.gpus * part // 8 for part in range(1, 8)}
    return sorted(share for share in eighths if 0 < share < cluster.gpus)


@dataclass(frozen=True, kw_only=True)
class _EngineChoice:
    """An engine size that fits."""

    tp: int
    memory: EngineMemory
    running: int
    memory_fraction: float


class _Engines:
    """Engine sizes that hold the model and one longest response; and why others do not."""

    def __init__(self, shape: Shape, workload: Workload, cluster: Cluster, limits: Limits):
        self._shape, self._workload, self._cluster, self._limits = shape, workload, cluster, limits
        self._rejections: dict[Rejection, None] = {}  # an ordered set
        self._known: dict[int, list[_EngineChoice]] = {}

    def fitting(self, trainer: TrainerMemory | None) -> list[_EngineChoice]:
        """Engines on separate GPUs (None), or on GPUs where such trainer ranks rest."""
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
                total = f"engine and trainer rank together need {needed / GIB:.1f} GiB ({turn})"
                self.reject(choice.tp, f"{total}, but a GPU has {gpu_bytes / GIB:.1f} GiB")
        return fitting

    @property
    def rejections(self) -> list[Rejection]:
        """The rejected engine sizes, each reason once."""
        return list(self._rejections)

    def reject(self, tp: int, reason: str) -> None:
        """Record why an engine size cannot be used."""
        self._rejections[Rejection(f"rollout.tp={tp}", reason)] = None

    def _choice(self, tp: int, rest: int) -> _EngineChoice | None:
        shape, workload, limits, gpu_bytes = self._shape, self._workload, self._limits, self._cluster.gpu_bytes
        if fault := _tp_fault(shape, tp, engine=True):
            self.reject(tp, fault)
            return None
        fraction = limits.memory_fraction if rest == 0 else int(100 * (limits.memory_fraction - rest / gpu_bytes)) / 100
        memory = engine_memory(
            shape, tp=tp, gpu_bytes=gpu_bytes, memory_fraction=fraction,
            num_parameters=model_parameters(shape), beside=rest, quantization=limits.rollout_quantization,
            max_running_requests=limits.max_running_requests,
        )  # fmt: skip
        if memory.kv_tokens < workload.longest:
            beside = f" beside the {rest / GIB:.1f} GiB of a resting trainer rank" if rest else ""
            reason = (
                f"weights of {memory.weights / GIB:.1f} GiB leave room for {max(0, memory.kv_tokens)} tokens of KV "
                f"cache in {fraction:.0%} of {gpu_bytes / GIB:.1f} GiB{beside}; one response can need "
                f"{workload.longest}"
            )
            self.reject(tp, reason)
            return None
        # A running response is half finished on average.
        in_cache = workload.mean_prompt_tokens + workload.token_mean_length / 2
        running = max(1, min(limits.max_running_requests, int(memory.kv_tokens / in_cache)))
        return _EngineChoice(tp=tp, memory=memory, running=running, memory_fraction=fraction)


def _layouts(
    shape: Shape, workload: Workload, cluster: Cluster, limits: Limits, gpus: int, rejections: list[Rejection]
) -> Iterator[Layout]:
    """Every trainer layout on this number of GPUs that the model's sizes and the batch allow."""
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
                    output_head=limits.output_head, float32_logits=limits.float32_logits,
                    bytes_per_parameter=limits.bytes_per_parameter,
                    distributed_optimizer=limits.distributed_optimizer, has_reference=limits.has_reference,
                )  # fmt: skip
                for factor, recompute in itertools.product((1, 2, 4), get_args(Recompute)):
                    # The budget must hold the longest sequence, and is rounded up to a multiple of 1,024.
                    budget = -(-factor * workload.longest // 1024) * 1024
                    yield replace(grid, tokens_per_microbatch=budget, recompute=recompute)


def _expert_grids(moe: MoeShape | None, tp: int, dp: int) -> Iterator[tuple[int, int]]:
    """(etp, ep): experts whole or sharded over all tp ranks, distributed over the rest of tp x dp."""
    if moe is None:
        yield 1, 1
        return
    for etp in dict.fromkeys((1, tp)):
        for ep in _powers_of_two(tp * dp // etp):
            if moe.ffn_size % etp == 0 and moe.num_experts % ep == 0 and tp * dp % (etp * ep) == 0:
                yield etp, ep


def _pipelines(num_layers: int) -> Iterator[dict[str, int]]:
    """pp with vpp for equal stages; where the layers do not divide, with fewer in the first and the last stage."""
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
    """Number of micro-batches of a mini-batch on one data-parallel rank."""
    tokens = workload.responses_per_minibatch * workload.mean_tokens / layout.sizes.dp
    return max(1, -(-int(tokens) // layout.tokens_per_microbatch))


def _tp_fault(shape: Shape, tp: int, *, engine: bool = False) -> str | None:
    """Why the model cannot be sharded over tp ranks of the trainer, or of an engine."""
    sizes = {"attention heads": shape.num_heads, "feed-forward units": shape.ffn_size}
    if not (engine and tp % shape.num_kv_heads == 0):  # SGLang gives several ranks the same head
        sizes["key/value heads"] = shape.num_kv_heads
    moe = next((found for layer in range(shape.num_layers) if (found := experts(shape, layer))), None)
    if moe and engine:  # the trainer can keep experts whole
        sizes["feed-forward units of each expert"] = moe.ffn_size
    bad = [f"{size} {what}" for what, size in sizes.items() if size % tp]
    return f"tp={tp} must divide the model's {' and '.join(bad)}" if bad else None


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _powers_of_two(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(limit.bit_length())]
