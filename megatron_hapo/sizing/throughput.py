"""Seconds of a step from a roofline: every part takes its operations or its bytes over what the hardware sustains.

It ranks layouts; it does not promise seconds. docs/sizing.md has the formulas and compares them with published runs.
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
    stage_layers,
    stage_parameters,
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peak rates of one GPU, as its maker states them."""

    name: str
    flops: float
    """Dense bfloat16 operations a second."""
    memory_bandwidth: float
    """Bytes a second."""
    nvlink_bandwidth: float
    """Bytes a second, each way, between GPUs of one NVLink domain."""
    network_bandwidth: float
    """Bytes a second, each way, for each GPU between nodes."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100", flops=312e12, memory_bandwidth=2.04e12, nvlink_bandwidth=300e9, network_bandwidth=25e9),
        Gpu(name="h100", flops=989e12, memory_bandwidth=3.35e12, nvlink_bandwidth=450e9, network_bandwidth=50e9),
        Gpu(name="h200", flops=989e12, memory_bandwidth=4.8e12, nvlink_bandwidth=450e9, network_bandwidth=50e9),
        Gpu(name="b200", flops=2250e12, memory_bandwidth=7.7e12, nvlink_bandwidth=900e9, network_bandwidth=50e9),
    )
}
"""SXM parts, 200 or 400 Gbit/s of network a GPU. Source: NVIDIA's data sheets (dense rates, half of those with
sparsity; NVLink's total over two)."""

MATMUL_EFFICIENCY = 0.6
"""Share of peak that large bfloat16 matrix products reach."""
ATTENTION_EFFICIENCY = 0.4
GROUPED_MATMUL_EFFICIENCY = 0.4
"""Of the experts' products: many, and small."""
MEMORY_EFFICIENCY = 0.7
LINK_EFFICIENCY = 0.7
HOST_LINK_BANDWIDTH = 55e9
"""Bytes a second, each way, between a GPU and its host: PCIe 5 with 16 lanes."""
HOST_MEMORY_BANDWIDTH = 50e9
"""Bytes a second of the host's memory for each of its GPUs: eight share a host of about 400e9."""
KERNELS_PER_LAYER_SECONDS = 60e-6
"""Launches and small operators of a layer's forward pass that no roofline sees, for each micro-batch."""
DECODE_STEP_SECONDS = 4e-3
"""Scheduler, sampler and hook of one decode iteration, beside the model."""
DECODE_LAYER_SECONDS = 8e-6
"""All-reduce latency of one layer in a decode iteration, with tp > 1."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one step of the run is asked to do."""

    prompts_per_step: int
    samples_per_prompt: int
    prompts_per_minibatch: int
    mean_prompt_tokens: float
    mean_response_tokens: float
    max_prompt_tokens: int
    max_response_tokens: int

    @property
    def responses(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def responses_per_minibatch(self) -> int:
        return self.prompts_per_minibatch * self.samples_per_prompt

    @property
    def minibatches(self) -> int:
        return self.prompts_per_step // self.prompts_per_minibatch

    @property
    def mean_tokens(self) -> float:
        """Of prompt and response."""
        return self.mean_prompt_tokens + self.mean_response_tokens

    @property
    def longest(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def token_mean_length(self) -> float:
        """Length of the sequence that an average token is in: twice the mean, as for an exponential law, cut off."""
        return min(self.longest, 2 * self.mean_tokens)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of the parts of a step, and what they mean for the hardware."""

    generate: float
    log_probs: float
    update: float
    sync: float
    """With the turns of trainer and engines on shared GPUs."""
    bubble_share: float
    """Of the update: stages that wait for the pipeline to fill and drain."""
    mfu: float
    """Model operations of scoring and update over what the trainer's GPUs could do in that time; recomputation does
    not count as work."""

    @property
    def total(self) -> float:
        return self.generate + self.log_probs + self.update + self.sync


@lru_cache(maxsize=256)
def model_flops(shape: Shape, *, tokens: float, length: float, response_share: float) -> float:
    """Operations of a forward pass: 2 for each weight a token meets, 2 L q a layer for causal attention, the head."""
    layers = sum(
        2 * active_parameters(shape, layer) + 2 * length * shape.num_heads * shape.head_dim
        for layer in range(shape.num_layers)
    )
    return tokens * (layers + 2 * response_share * shape.hidden_size * shape.vocab_size)


def train_seconds(
    shape: Shape, layout: Layout, workload: Workload, gpu: Gpu, *, nvlink_size: int
) -> tuple[float, float, float]:
    """Seconds of scoring and of all updates of a step, and the bubble's share of an update."""
    sizes = layout.sizes
    tokens_of_rank = workload.responses_per_minibatch * workload.mean_tokens / sizes.dp
    microbatches = max(1, math.ceil(tokens_of_rank / layout.tokens_per_microbatch))
    if sizes.vpp > 1:  # taken in groups of as many as there are stages
        microbatches = math.ceil(microbatches / sizes.pp) * sizes.pp
    tokens = tokens_of_rank / microbatches
    forward = [
        _stage_forward_seconds(shape, layout, workload, gpu, stage, tokens, nvlink_size) for stage in range(sizes.pp)
    ]
    fill = (sizes.pp - 1) / sizes.vpp
    slots = microbatches + fill
    update = slots * max(forward) * (3 + _recomputed_share(shape, layout))
    update += _gradient_seconds(shape, layout, gpu, nvlink_size)
    # Scoring takes the whole step's responses at once, so that its pipeline fills only once.
    score = (workload.minibatches * microbatches + fill) * max(forward)
    busy = microbatches * sum(forward) / len(forward)
    return score, workload.minibatches * update, 1 - busy / (slots * max(forward))


def _recomputed_share(shape: Shape, layout: Layout) -> float:
    """Of a forward pass, what the backward pass does again; of selective recomputation the feed-forward blocks."""
    if layout.recompute != "selective":
        return 1.0 if layout.recompute == "full" else 0.0
    layers = range(shape.num_layers)
    blocks = sum(feed_forward_parameters(shape, layer) for layer in layers)
    return blocks / sum(active_parameters(shape, layer) for layer in layers)


def _stage_forward_seconds(
    shape: Shape, layout: Layout, workload: Workload, gpu: Gpu, stage: int, tokens: float, nvlink_size: int
) -> float:
    """One micro-batch of `tokens` through one stage: products, attention, and the messages of tp, cp, ep and pp."""
    sizes = layout.sizes
    shards = sizes.tp * sizes.cp
    length, w, h = workload.token_mean_length, layout.bytes_per_parameter, shape.hidden_size
    keys = shape.num_kv_heads * shape.head_dim
    local = tokens / sizes.cp
    tp_link = _link(gpu, sizes.tp, nvlink_size)
    cp_link = _link(gpu, shards, nvlink_size)
    ep_link = _link(gpu, sizes.etp * sizes.ep, nvlink_size)
    seconds = 0.0
    for layer in stage_layers(shape, layout, stage):
        moe = experts(shape, layer)
        efficiency = MATMUL_EFFICIENCY if moe is None else GROUPED_MATMUL_EFFICIENCY
        seconds += 2 * active_parameters(shape, layer) * tokens / shards / (efficiency * gpu.flops)
        attention = 2 * length * shape.num_heads * shape.head_dim * tokens / shards
        seconds += attention / (ATTENTION_EFFICIENCY * gpu.flops)
        # An all-gather and a reduce-scatter of the hidden states for attention, and for a dense feed-forward block.
        messages = 2 if moe is not None else 4
        seconds += messages * (sizes.tp - 1) / sizes.tp * local * h * w / tp_link
        # Keys and values travel once around the ring.
        seconds += 2 * (sizes.cp - 1) * local * keys / sizes.tp * w / cp_link
        if moe is not None:
            # A rank's tokens to their experts and back; those of a cut expert to all its ranks and back, in sums.
            routed = 2 * local * moe.top_k * h * w / layout.sequence_shards
            seconds += routed * (sizes.ep - 1) / sizes.ep / ep_link + routed * (sizes.etp - 1) / tp_link
        seconds += KERNELS_PER_LAYER_SECONDS
    if stage == sizes.pp - 1:
        rows = tokens * workload.mean_response_tokens / workload.mean_tokens
        seconds += 2 * rows * h * shape.vocab_size / shards / (MATMUL_EFFICIENCY * gpu.flops)
    if sizes.pp > 1:
        seconds += sizes.vpp * local * h * w / layout.sequence_shards / _link(gpu, sizes.world_size, nvlink_size)
    return seconds


def _gradient_seconds(shape: Shape, layout: Layout, gpu: Gpu, nvlink_size: int) -> float:
    """Once a mini-batch: float32 gradients reduced over the replicas, weights gathered, and Adam's memory traffic."""
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
    if layout.cpu_offload:  # the gradient goes to the host, and the weight comes back
        messages += (4 + layout.bytes_per_parameter) * states / (LINK_EFFICIENCY * HOST_LINK_BANDWIDTH)
    # Read gradient, master weight and both moments, write the last three.
    bandwidth = HOST_MEMORY_BANDWIDTH if layout.cpu_offload else gpu.memory_bandwidth
    return messages + 28 * states / (MEMORY_EFFICIENCY * bandwidth)


def turn_seconds(optimizer_bytes: int) -> float:
    """The optimizer's state to the host and back, once a step, where trainer and engines share their GPUs."""
    return 2 * optimizer_bytes / (LINK_EFFICIENCY * HOST_LINK_BANDWIDTH)


def _link(gpu: Gpu, ranks: int, nvlink_size: int) -> float:
    """Bytes a second between `ranks` neighbouring ranks: NVLink where they lie in one domain."""
    return LINK_EFFICIENCY * (gpu.nvlink_bandwidth if ranks <= nvlink_size else gpu.network_bandwidth)


@lru_cache(maxsize=256)
def generate_seconds(shape: Shape, workload: Workload, gpu: Gpu, *, tp: int, engines: int, running: int) -> float:
    """Seconds until the last response is done.

    A decode iteration reads all weights that its tokens meet, and each running response reads its own KV cache. With R
    responses an engine, of which B run together, it takes L_max + max(0, R/B - 1) L_mean iterations: when the last one
    starts, all others are at least under way (list scheduling; L_max is max_response_tokens, since among thousands of
    responses some run into the limit). The weights are read once an iteration, the caches once for every token.
    """
    responses = workload.responses / engines
    batch = min(responses, running)
    bandwidth = MEMORY_EFFICIENCY * gpu.memory_bandwidth
    iterations = workload.max_response_tokens + max(0.0, responses / batch - 1) * workload.mean_response_tokens
    mean_batch = responses * workload.mean_response_tokens / iterations
    weights = 2 * decode_parameters(shape, tokens=mean_batch) / tp
    overhead = DECODE_STEP_SECONDS + (DECODE_LAYER_SECONDS * shape.num_layers if tp > 1 else 0)
    context = workload.mean_prompt_tokens + workload.token_mean_length / 2
    tokens = responses * workload.mean_response_tokens
    caches = tokens * context * kv_bytes_per_token(shape, tp=tp) / bandwidth
    products = tokens * model_flops(shape, tokens=1, length=0, response_share=1) / tp / (MATMUL_EFFICIENCY * gpu.flops)
    prompts = workload.prompts_per_step / engines * workload.mean_prompt_tokens
    prefill = prompts * model_flops(shape, tokens=1, length=0, response_share=0) / tp / (MATMUL_EFFICIENCY * gpu.flops)
    return iterations * (weights / bandwidth + overhead) + caches + products + prefill


def decode_parameters(shape: Shape, *, tokens: float) -> float:
    """Parameters that a batch of `tokens` tokens meets: of E experts with k chosen, E (1 - (1 - k/E)^tokens)."""
    total = float(shape.hidden_size * shape.vocab_size)
    for layer in range(shape.num_layers):
        moe = experts(shape, layer)
        total += active_parameters(shape, layer)
        if moe is not None:
            met = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** max(1.0, tokens))
            total += (met - moe.top_k) * 3 * shape.hidden_size * moe.ffn_size
    return total


def sync_seconds(shape: Shape, layout: Layout, gpu: Gpu, *, num_parameters: int) -> float:
    """Every trainer pipeline stage sends its weights, in bfloat16, over one GPU's network link."""
    return 2 * num_parameters / layout.sizes.pp / (LINK_EFFICIENCY * gpu.network_bandwidth)
