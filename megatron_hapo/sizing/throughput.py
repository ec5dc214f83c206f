"""Roofline estimate of a step's time: each part takes its operations or bytes over the rate that the hardware sustains.

It serves to rank layouts, not to predict times. docs/sizing.md has the formulas and compares them with published runs.
Letters: `h` hidden size, `q`/`k` width of query/key heads, `L` length of a sequence, `T` tokens of a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megatron_hapo.model.families import Shape
from megatron_hapo.sizing.memory import kv_bytes_per_token
from megatron_hapo.sizing.parameters import (
    Layout,
    active_parameters,
    experts,
    feed_forward_parameters,
    layer_kinds,
    stage_layers,
    stage_parameters,
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peak rates of one GPU, as stated by the manufacturer."""

    name: str
    flops: float
    """Dense bfloat16 operations per second."""
    memory_bandwidth: float
    """Bytes per second."""
    nvlink_bandwidth: float
    """Bytes per second in each direction between GPUs of one NVLink domain."""
    network_bandwidth: float
    """Bytes per second in each direction between nodes, per GPU."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100", flops=312e12, memory_bandwidth=2.04e12, nvlink_bandwidth=300e9, network_bandwidth=25e9),
        Gpu(name="h100", flops=989e12, memory_bandwidth=3.35e12, nvlink_bandwidth=450e9, network_bandwidth=50e9),
        Gpu(name="h200", flops=989e12, memory_bandwidth=4.8e12, nvlink_bandwidth=450e9, network_bandwidth=50e9),
        Gpu(name="b200", flops=2250e12, memory_bandwidth=7.7e12, nvlink_bandwidth=900e9, network_bandwidth=50e9),
    )
}
"""SXM modules with 200 or 400 Gbit/s of network per GPU. Source: NVIDIA's data sheets (dense rates, which are half of
those with sparsity; half of NVLink's total)."""

MATMUL_EFFICIENCY = 0.6
"""Share of the peak rate that large bfloat16 matrix products reach."""
ATTENTION_EFFICIENCY = 0.4
GROUPED_MATMUL_EFFICIENCY = 0.4
"""Share of the peak rate that the experts' many small products reach."""
MEMORY_EFFICIENCY = 0.7
LINK_EFFICIENCY = 0.7
HOST_LINK_BANDWIDTH = 55e9
"""Bytes per second in each direction between a GPU and its host: PCIe 5 with 16 lanes."""
HOST_MEMORY_BANDWIDTH = 50e9
"""Bytes per second of host memory for each GPU: eight GPUs share a host with about 400e9."""
KERNELS_PER_LAYER_SECONDS = 60e-6
"""Kernel launches and small operators of a layer's forward pass per micro-batch, which a roofline does not capture."""
DECODE_STEP_SECONDS = 4e-3
"""Scheduler, sampler and sampling hook of one decode iteration, in addition to the model."""
DECODE_LAYER_SECONDS = 8e-6
"""All-reduce latency of one layer in a decode iteration with tp > 1."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of one step of a run."""

    prompts_per_step: int
    samples_per_prompt: int
    prompts_per_minibatch: int
    mean_prompt_tokens: float
    mean_response_tokens: float
    max_prompt_tokens: int
    max_response_tokens: int

    @property
    def responses(self) -> int:
        """Responses of a step."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def responses_per_minibatch(self) -> int:
        """Responses of an optimizer update."""
        return self.prompts_per_minibatch * self.samples_per_prompt

    @property
    def minibatches(self) -> int:
        """Optimizer updates of a step."""
        return self.prompts_per_step // self.prompts_per_minibatch

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a prompt and its response."""
        return self.mean_prompt_tokens + self.mean_response_tokens

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its response."""
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def token_mean_length(self) -> float:
        """Mean over tokens of their sequence's length: twice the mean length, as for an exponential distribution,
        but at most the longest."""
        return min(self.longest, 2 * self.mean_tokens)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of each part of a step, and the resulting utilization."""

    generate: float
    log_probs: float
    update: float
    sync: float
    """Weight sync, and on shared GPUs the turns of trainer and engines."""
    bubble_share: float
    """Share of an update in which stages wait for the pipeline to fill and drain."""
    mfu: float
    """Model operations of scoring and updates, without recomputation, over the peak of the trainer's GPUs in that time.
    """

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.generate + self.log_probs + self.update + self.sync


@lru_cache(maxsize=256)
def model_flops(shape: Shape, *, tokens: float, length: float, response_share: float) -> float:
    """Operations of a forward pass: 2 per active weight and token, 2 L q per layer for causal attention, the head.

    Args:
        length: mean over tokens of their sequence's length (L).
        response_share: share of response tokens; only these reach the output head.
    """
    layers = sum(
        number * (2 * active_parameters(shape, layer) + 2 * length * shape.num_heads * shape.head_dim)
        for layer, number in layer_kinds(shape, range(shape.num_layers))
    )
    return tokens * (layers + 2 * response_share * shape.hidden_size * shape.vocab_size)


def train_seconds(
    shape: Shape, layout: Layout, workload: Workload, gpu: Gpu, *, nvlink_size: int
) -> tuple[float, float, float]:
    """Seconds of scoring, seconds of all updates of a step, and the bubble's share of an update."""
    sizes = layout.sizes
    tokens_of_rank = workload.responses_per_minibatch * workload.mean_tokens / sizes.dp
    microbatches = max(1, math.ceil(tokens_of_rank / layout.tokens_per_microbatch))
    if sizes.vpp > 1:  # the interleaved schedule takes micro-batches in groups of pp
        microbatches = math.ceil(microbatches / sizes.pp) * sizes.pp
    tokens = tokens_of_rank / microbatches
    forward = [
        _stage_forward_seconds(shape, layout, workload, gpu, stage, tokens, nvlink_size) for stage in range(sizes.pp)
    ]
    fill = (sizes.pp - 1) / sizes.vpp
    slots = microbatches + fill
    update = slots * max(forward) * (3 + _recomputed_share(shape, layout))
    update += _gradient_seconds(shape, layout, gpu, nvlink_size)
    # Scoring runs over all responses of the step at once, so its pipeline fills only once.
    score = (workload.minibatches * microbatches + fill) * max(forward)
    if layout.has_reference:
        score = 2 * score + reference_exchange_seconds(shape, layout)
    busy = microbatches * sum(forward) / len(forward)
    return score, workload.minibatches * update, 1 - busy / (slots * max(forward))


def _recomputed_share(shape: Shape, layout: Layout) -> float:
    """Share of a forward pass that the backward pass repeats; with selective recomputation, the feed-forward blocks."""
    if layout.recompute != "selective":
        return 1.0 if layout.recompute == "full" else 0.0
    kinds = layer_kinds(shape, range(shape.num_layers))
    blocks = sum(number * feed_forward_parameters(shape, layer) for layer, number in kinds)
    return blocks / sum(number * active_parameters(shape, layer) for layer, number in kinds)


def _stage_forward_seconds(
    shape: Shape, layout: Layout, workload: Workload, gpu: Gpu, stage: int, tokens: float, nvlink_size: int
) -> float:
    """Seconds of a micro-batch's forward pass through one stage: products, attention, messages of tp, cp, ep and pp."""
    sizes = layout.sizes
    shards = sizes.tp * sizes.cp
    length, w, h = workload.token_mean_length, layout.bytes_per_parameter, shape.hidden_size
    keys = shape.num_kv_heads * shape.head_dim
    local = tokens / sizes.cp
    tp_link = _link(gpu, sizes.tp, nvlink_size)
    cp_link = _link(gpu, shards, nvlink_size)
    ep_link = _link(gpu, sizes.etp * sizes.ep, nvlink_size)
    total = 0.0
    for layer, number in layer_kinds(shape, stage_layers(shape, layout, stage)):
        moe = experts(shape, layer)
        efficiency = MATMUL_EFFICIENCY if moe is None else GROUPED_MATMUL_EFFICIENCY
        seconds = 2 * active_parameters(shape, layer) * tokens / shards / (efficiency * gpu.flops)
        attention = 2 * length * shape.num_heads * shape.head_dim * tokens / shards
        seconds += attention / (ATTENTION_EFFICIENCY * gpu.flops)
        # An all-gather and a reduce-scatter of the hidden states for attention, and for a dense feed-forward block.
        messages = 2 if moe is not None else 4
        seconds += messages * (sizes.tp - 1) / sizes.tp * local * h * w / tp_link
        # Keys and values travel once around the cp ring.
        seconds += 2 * (sizes.cp - 1) * local * keys / sizes.tp * w / cp_link
        if moe is not None:
            # Tokens go to their experts and back; for a sharded expert, also to all of its ranks, and back as sums.
            routed = 2 * local * moe.top_k * h * w / layout.sequence_shards
            seconds += routed * (sizes.ep - 1) / sizes.ep / ep_link + routed * (sizes.etp - 1) / tp_link
        total += number * (seconds + KERNELS_PER_LAYER_SECONDS)
    if stage == sizes.pp - 1:
        rows = tokens * workload.mean_response_tokens / workload.mean_tokens
        total += 2 * rows * h * shape.vocab_size / shards / (MATMUL_EFFICIENCY * gpu.flops)
    if sizes.pp > 1:
        total += sizes.vpp * local * h * w / layout.sequence_shards / _link(gpu, sizes.world_size, nvlink_size)
    return total


def _gradient_seconds(shape: Shape, layout: Layout, gpu: Gpu, nvlink_size: int) -> float:
    """Seconds per mini-batch to reduce float32 gradients over the replicas, gather weights, and run Adam."""
    sizes = layout.sizes
    largest = max(
        (stage_parameters(shape, layout, stage) for stage in range(sizes.pp)),
        key=lambda parameters: parameters.total,
    )
    link = _link(gpu, sizes.tp * sizes.dp * sizes.cp, nvlink_size)
    gathered = layout.bytes_per_parameter if layout.distributed_optimizer else 4
    messages = states = 0.0
    for parameters, replicas in (
        (largest.dense, sizes.dp * sizes.cp),
        (largest.expert, layout.expert_replicas),
    ):
        messages += (4 + gathered) * parameters * (replicas - 1) / replicas / link
        states += parameters / (replicas if layout.distributed_optimizer else 1)
    if layout.cpu_offload:  # gradients go to the host, and weights come back
        messages += (4 + layout.bytes_per_parameter) * states / (LINK_EFFICIENCY * HOST_LINK_BANDWIDTH)
    # Adam reads gradient, master weight and both moments, and writes the last three.
    bandwidth = HOST_MEMORY_BANDWIDTH if layout.cpu_offload else gpu.memory_bandwidth
    return messages + 28 * states / (MEMORY_EFFICIENCY * bandwidth)


def reference_exchange_seconds(shape: Shape, layout: Layout) -> float:
    """Seconds per step to exchange the policy's weights with the reference's and back: each set moves twice."""
    largest = max(stage_parameters(shape, layout, stage).total for stage in range(layout.sizes.pp))
    return 4 * layout.bytes_per_parameter * largest / (LINK_EFFICIENCY * HOST_LINK_BANDWIDTH)


def turn_seconds(optimizer_bytes: int) -> float:
    """Seconds per step to move the optimizer's state to the host and back when trainer and engines share GPUs."""
    return 2 * optimizer_bytes / (LINK_EFFICIENCY * HOST_LINK_BANDWIDTH)


def _link(gpu: Gpu, ranks: int, nvlink_size: int) -> float:
    """Bytes per second between `ranks` neighbouring ranks: over NVLink if they fit in one domain, else the network."""
    return LINK_EFFICIENCY * (gpu.nvlink_bandwidth if ranks <= nvlink_size else gpu.network_bandwidth)


@lru_cache(maxsize=256)
def generate_seconds(
    shape: Shape,
    workload: Workload,
    gpu: Gpu,
    *,
    tp: int,
    engines: int,
    running: int,
    bytes_per_linear_weight: int = 2,
) -> float:
    """Seconds until the last response is finished.

    A decode iteration reads every weight that is active for one of its tokens, and each running response reads its own
    KV cache. With R responses per engine, of which B run concurrently, there are L_max + max(0, R/B - 1) L_mean
    iterations: when the last response starts, all others have at least started (list scheduling; L_max is
    max_response_tokens, since among thousands of responses some reach the limit). The weights are read once per
    iteration, the caches once per token.

    Args:
        running: most responses that an engine decodes concurrently (B).
        bytes_per_linear_weight: 1 in float8. Products are counted at the rate of bfloat16 all the same.
    """
    responses = workload.responses / engines
    batch = min(responses, running)
    bandwidth = MEMORY_EFFICIENCY * gpu.memory_bandwidth
    iterations = workload.max_response_tokens + max(0.0, responses / batch - 1) * workload.mean_response_tokens
    mean_batch = responses * workload.mean_response_tokens / iterations
    head = shape.hidden_size * shape.vocab_size
    linear = decode_parameters(shape, tokens=mean_batch) - head
    weights = (2 * head + bytes_per_linear_weight * linear) / tp
    overhead = DECODE_STEP_SECONDS + (DECODE_LAYER_SECONDS * shape.num_layers if tp > 1 else 0)
    context = workload.mean_prompt_tokens + workload.token_mean_length / 2
    tokens = responses * workload.mean_response_tokens
    caches = tokens * context * kv_bytes_per_token(shape, tp=tp) / bandwidth
    products = tokens * model_flops(shape, tokens=1, length=0, response_share=1) / tp / (MATMUL_EFFICIENCY * gpu.flops)
    prompts = workload.prompts_per_step / engines * workload.mean_prompt_tokens
    prefill = prompts * model_flops(shape, tokens=1, length=0, response_share=0) / tp / (MATMUL_EFFICIENCY * gpu.flops)
    return iterations * (weights / bandwidth + overhead) + caches + products + prefill


def decode_parameters(shape: Shape, *, tokens: float) -> float:
    """Parameters active for a batch of `tokens` tokens: of E experts with top-k routing, E (1 - (1 - k/E)^tokens)."""
    total = float(shape.hidden_size * shape.vocab_size)
    for layer in range(shape.num_layers):
        moe = experts(shape, layer)
        total += active_parameters(shape, layer)
        if moe is not None:
            met = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** max(1.0, tokens))
            total += (met - moe.top_k) * 3 * shape.hidden_size * moe.ffn_size
    return total


def sync_seconds(shape: Shape, layout: Layout, gpu: Gpu, *, num_parameters: int) -> float:
    """Seconds of a weight sync: every pipeline stage sends its weights in bfloat16 over one GPU's network link."""
    return 2 * num_parameters / layout.sizes.pp / (LINK_EFFICIENCY * gpu.network_bandwidth)
