"""Memory model: bytes that a trainer rank and an engine rank hold on a GPU, and the peak of each phase of a step.

Letters in the formulas: `h` hidden size, `q` and `k` width of all query heads and of all key heads, `f` feed-forward
units, `t` tokens of a micro-batch on the rank, `w` bytes of an activation. All sizes are in bytes.
The approach follows Korthikanti et al., arXiv:2205.05198, section 4, with grouped queries, gated units and packed
sequences; no term is quadratic in the length, because attention keeps only its log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_hapo.model.families import MoeShape, Shape, padded_vocab_size
from megatron_hapo.sizing.parameters import (
    Layout,
    experts,
    layer_kinds,
    linear_weights,
    stage_layers,
    stage_parameters,
)

GIB = 1 << 30

Spec = Literal["te", "local", "local_cpu"]
"""`te`: Transformer Engine layers. `local`: torch layers on a GPU, whose attention in 16 bits takes sequences of any
length without padding. `local_cpu`: torch layers on a CPU, where RMSNorm is a fused operator in float32 only."""

FIXED_RESERVE_BYTES = 3 * GIB
"""CUDA context, NCCL buffers, cuBLAS workspace."""
FRAGMENTATION = 0.05
"""Share of a GPU's memory lost to fragmentation in the caching allocator."""
EXPERT_IMBALANCE = 1.25
"""Ratio of the busiest expert rank's tokens to the mean."""
PADDING_OF_GROUPS = 1.33
"""Growth of the tokens when the local attention pads groups of sequences of similar length, as it does in float32:
about this on average, 2 at worst."""
ENGINE_RESTING_BYTES = 3 * GIB
"""What an engine cannot release, besides CUDA graphs: CUDA context, NCCL buffers, workspaces. An estimate."""
MAX_GRAPH_REQUESTS = 256
"""Largest decoding batch for which SGLang (0.5.23) captures a CUDA graph at tp below 4 on a GPU of 60 to 160 GB."""
GRAPH_BYTES_PER_LAYER = 256 << 10
"""Memory of a CUDA graph's kernels for one layer. An estimate."""
ENGINE_STAGED_BYTES = 1 << 30
"""16-bit matrices on an engine rank that quantizes, before a channel waits (`resharding.staging.STAGED_BYTES`)."""
HEAD_CHUNKS = 3
"""Float32 copies of a chunk of logits rows that megatron_hapo.logprobs holds at the same time."""
FUSED_CHUNK_BYTES = 256 << 20
"""Bytes of the chunk of logits that megatron_hapo.logprobs.fused_head holds at a time."""
ROUNDED_BYTES = 64 << 20
"""Bytes of the part of a float32 gradient that megatron_hapo.logprobs.head_products has rounded to bfloat16."""


@dataclass(frozen=True, kw_only=True)
class TrainerMemory:
    """Bytes on one trainer rank, by part."""

    weights: int
    gradients: int
    optimizer: int
    """Float32 master weights and Adam's two moments; 0 with cpu_offload."""
    activations: int
    """What is saved for the backward pass of all micro-batches in flight, and the largest temporary of a layer."""
    logits_head: int
    optimizer_step: int
    """Temporaries of the optimizer step."""
    sync_buckets: int
    """Gathered tensors and the bucket in flight during a weight sync."""
    reserve: int
    host_reference: int = 0
    """In host memory, and so in no total: the reference model's weights."""

    @property
    def phases(self) -> dict[str, int]:
        """Bytes of each phase in addition to weights, gradients, optimizer and reserve; only the largest counts."""
        return {
            "update": self.activations + self.logits_head,
            "optimizer step": self.optimizer_step,
            "weight sync": self.sync_buckets,
        }

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return self.weights + self.gradients + self.optimizer + self.reserve + max(self.phases.values())

    def resting(self, *, keeps_optimizer: bool = False) -> int:
        """Bytes held while the engines use this GPU: caches are released, the CUDA context is not."""
        return self.weights + min(self.reserve, FIXED_RESERVE_BYTES) + (self.optimizer if keeps_optimizer else 0)

    @property
    def largest(self) -> tuple[str, int]:
        """Name and bytes of the largest part at the peak."""
        peak = max(self.phases, key=self.phases.__getitem__)
        present = {"update": ("activations", "logits_head"), "optimizer step": ("optimizer_step",)}
        names = ["weights", "gradients", "optimizer", *present.get(peak, ("sync_buckets",))]
        name = max(names, key=lambda part: getattr(self, part))
        return name.replace("_", " "), getattr(self, name)


def trainer_memory(
    shape: Shape,
    layout: Layout,
    *,
    gpu_bytes: int = 0,
    spec: Spec = "te",
    num_microbatches: int | None = None,
    response_share: float = 1.0,
    bucket_bytes: int = 512 << 20,
) -> TrainerMemory:
    """Bytes on the rank that needs the most memory.

    Args:
        gpu_bytes: memory of a GPU, which determines the loss to fragmentation. 0 (a CPU): no reserve.
        num_microbatches: micro-batches of a mini-batch on one rank. None: at least as many as pipeline stages.
        response_share: share of response tokens in a micro-batch; only these reach the output head.
    """
    stages = [
        _stage_memory(shape, layout, stage, gpu_bytes, spec, num_microbatches, response_share, bucket_bytes)
        for stage in range(layout.sizes.pp)
    ]
    return max(stages, key=lambda memory: memory.total)


def _stage_memory(
    shape: Shape,
    layout: Layout,
    stage: int,
    gpu_bytes: int,
    spec: Spec,
    num_microbatches: int | None,
    response_share: float,
    bucket_bytes: int,
) -> TrainerMemory:
    """Bytes on a rank of one pipeline stage."""
    parameters = stage_parameters(shape, layout, stage)
    sharded = optimizer_elements(shape, layout, stage)
    in_flight = microbatches_in_flight(layout, stage, num_microbatches)
    last = stage == layout.sizes.pp - 1
    return TrainerMemory(
        weights=layout.bytes_per_parameter * parameters.total,
        gradients=4 * parameters.total,
        optimizer=0 if layout.cpu_offload else optimizer_bytes_per_element(layout) * sharded,
        activations=activation_bytes(shape, layout, stage, in_flight=in_flight, spec=spec),
        logits_head=head_bytes(shape, layout, rows=round(response_share * layout.tokens_per_rank)) if last else 0,
        # torch's multi-tensor Adam allocates a temporary as large as a moment; Transformer Engine's and apex's do not.
        optimizer_step=0 if spec == "te" or layout.cpu_offload else 4 * sharded,
        sync_buckets=sync_bytes(shape, layout, bucket_bytes=bucket_bytes),
        reserve=FIXED_RESERVE_BYTES + round(FRAGMENTATION * gpu_bytes) if gpu_bytes else 0,
        host_reference=layout.bytes_per_parameter * parameters.total if layout.has_reference else 0,
    )


def microbatches_in_flight(layout: Layout, stage: int, num_microbatches: int | None = None) -> float:
    """Number of micro-batches whose activations a stage holds at its peak; a multiple of 1 / vpp.

    It is the stage's number of forward passes before its first backward pass, plus one (Megatron's
    `get_pp_rank_microbatches`).
    """
    sizes = layout.sizes
    chunks = sizes.pp - stage
    if sizes.vpp > 1:
        chunks = 2 * (sizes.pp - stage - 1) + (sizes.vpp - 1) * sizes.pp + 1
    return min(chunks / sizes.vpp, num_microbatches or chunks)


def optimizer_elements(shape: Shape, layout: Layout, stage: int) -> int:
    """Number of parameters whose optimizer state a rank holds: all of its own, or a shard with distributed_optimizer.

    Dense parameters are sharded over dp x cp ranks, expert parameters over all ranks with the same shards of experts.
    """
    parameters = stage_parameters(shape, layout, stage)
    if not layout.distributed_optimizer:
        return parameters.total
    return -(-parameters.dense // (layout.sizes.dp * layout.sizes.cp)) + -(-parameters.expert // layout.expert_replicas)


def optimizer_bytes_per_element(layout: Layout) -> int:
    """Bytes of optimizer state per parameter: two float32 moments, and a float32 master weight of a bfloat16 weight."""
    return 12 if layout.bytes_per_parameter == 2 else 8


def head_bytes(shape: Shape, layout: Layout, *, rows: int) -> int:
    """Bytes of the output head for `rows` response tokens; bfloat16 logits take 2.75 bytes per element, float32 ones
    of bfloat16 weights 4.75.

    The gradient overwrites the logits. Chunks of a sixteenth of the rows, at most 1,024, are processed in float32. Also
    counted are the hidden states of all tokens (gathered under sequence parallelism), those of the selected rows and
    their gradient, and the gradient of the output weight before it is added to the float32 buffer. The fused head holds
    one chunk of logits and two float32 tiles of a sixteenth of it, and adds to that buffer directly. So does
    either head with float32 logits, whose gradient it rounds to bfloat16 for the products, a part at a time.
    """
    w, h = layout.bytes_per_parameter, shape.hidden_size
    of_logit = 4 if layout.float32_logits else w
    widened = of_logit > w
    columns = padded_vocab_size(shape.vocab_size, layout.sizes.tp) // layout.sizes.tp
    gathered = layout.tokens_per_rank * h * w if layout.sequence_shards > 1 else 0
    hidden = gathered + 2 * rows * h * w
    if layout.output_head == "fused":
        chunk = min(rows * columns * of_logit, FUSED_CHUNK_BYTES)
        tiles = 2 * 4 * chunk // of_logit // 16
        return hidden + chunk + max(tiles, chunk // 2 if widened else 0)
    chunk = min(1024, -(-rows // 16))
    logits, tiles = rows * columns * of_logit, HEAD_CHUNKS * 4 * chunk * columns
    if widened:
        return hidden + logits + max(tiles, min(rows * columns * w, ROUNDED_BYTES))
    return hidden + logits + tiles + columns * h * w


def sync_bytes(shape: Shape, layout: Layout, *, bucket_bytes: int) -> int:
    """Bytes of a full tensor gathered from the tp ranks, its copy in the engines' order, and a bucket."""
    largest = shape.vocab_size * shape.hidden_size * layout.bytes_per_parameter
    return bucket_bytes + (2 if layout.sizes.tp > 1 else 1) * largest


def activation_bytes(shape: Shape, layout: Layout, stage: int, *, in_flight: float, spec: Spec) -> int:
    """Bytes of activations at the peak of a stage.

    With full recomputation every layer keeps only its input, and one layer at a time has all of its activations. With
    selective recomputation the same holds for its feed-forward block and the inner part of an unfused attention.

    Args:
        in_flight: number of micro-batches between their forward and their backward pass.
    """
    tokens = layout.tokens_per_rank
    kinds = layer_kinds(shape, stage_layers(shape, layout, stage))
    layers, numbers = [layer for layer, _ in kinds], [number for _, number in kinds]
    saved = [layer_activation_bytes(shape, layout, layer, spec=spec) for layer in layers]
    total_saved = sum(number * size for number, size in zip(numbers, saved, strict=True))
    temporary = max(layer_temporary_bytes(shape, layout, layer, spec=spec) for layer in layers)
    w, h = layout.bytes_per_parameter, shape.hidden_size
    residual = w * h / layout.sequence_shards
    ends = residual * (stage == 0) + _norm(h, w, spec) / layout.sequence_shards * (stage == layout.sizes.pp - 1)
    if layout.recompute == "full":
        kept, working = residual * sum(numbers) + ends, max(saved) + temporary
    elif layout.recompute == "selective":
        again = [recomputed_bytes(shape, layout, layer, spec=spec) for layer in layers]
        total_again = sum(number * size for number, size in zip(numbers, again, strict=True))
        kept, working = total_saved - total_again + ends, max(again) + temporary
    else:
        kept, working = total_saved + ends, temporary
    return round(tokens * (in_flight * kept + working))


def layer_activation_bytes(shape: Shape, layout: Layout, layer: int, *, spec: Spec) -> float:
    """Bytes that a layer saves for its backward pass, per token of the rank.

    Attention: two norms, the input and output of the qkv product, queries, keys and values again after their norm and
    rotation, the attention's output. Feed-forward: its input, the gate and up products, what the activation saves.
    """
    w, h, tp = layout.bytes_per_parameter, shape.hidden_size, layout.sizes.tp
    q, k = shape.num_heads * shape.head_dim / tp, shape.num_kv_heads * shape.head_dim / tp
    fused = spec == "te"
    hidden = (2 * _norm(h, w, spec) + 2 * w * h) / layout.sequence_shards
    attended = _attention_bytes(shape, layout, spec=spec)
    attention = w * (q + 2 * k)
    if shape.qk_norm and not fused:
        attention += _norm(q + k, w, spec)
    halves = 1 if _has_cpu_kernels(w, spec) else 2
    attention += attended + (0 if fused else w * 2 * halves * shape.head_dim)  # cosines and sines
    moe = experts(shape, layer)
    # The local spec saves silu(gate), up + 0 and their product; the fused operator saves only the product.
    units = 3 if fused else 5
    if moe is None:
        return hidden + attention + w * units * shape.ffn_size / tp
    return hidden + attention + _expert_bytes(shape, layout, moe, units)


def recomputed_bytes(shape: Shape, layout: Layout, layer: int, *, spec: Spec) -> float:
    """The part of `layer_activation_bytes` that selective recomputation does not save."""
    w, tp = layout.bytes_per_parameter, layout.sizes.tp
    fused, moe = spec == "te", experts(shape, layer)
    units = 3 if fused else 5
    if moe is None:
        block = w * units * shape.ffn_size / tp
    else:
        block = _expert_bytes(shape, layout, moe, units)
    if fused:
        return block
    # Kept are attention's inputs and, as the input of o_proj, its output; not the copies of them that it makes.
    q, k = shape.num_heads * shape.head_dim / tp, shape.num_kv_heads * shape.head_dim / tp
    copies = not _takes_any_lengths(layout, spec) or layout.sizes.cp > 1
    kept = w * q if copies else w * (2 * q + 2 * k)
    return block + _attention_bytes(shape, layout, spec=spec) - kept


def _takes_any_lengths(layout: Layout, spec: Spec) -> bool:
    return spec == "local" and layout.bytes_per_parameter == 2


def _attention_bytes(shape: Shape, layout: Layout, *, spec: Spec) -> float:
    """Bytes that the inner part of attention saves, per token of the rank: queries, keys, values and output.

    Transformer Engine exchanges keys and values between context-parallel ranks without keeping them. The local layers
    keep those that a rank's queries see: of each sequence's 2 cp chunks, r + 1 for the front piece of rank r, and
    2 cp - r for the back piece. In padded rectangles they keep whole sequences.
    """
    w, tp, cp = layout.bytes_per_parameter, layout.sizes.tp, layout.sizes.cp
    q, k = shape.num_heads * shape.head_dim / tp, shape.num_kv_heads * shape.head_dim / tp
    if spec == "te":
        return w * (2 * q + 2 * k)
    if _takes_any_lengths(layout, spec):
        keys = 1 if cp == 1 else (2 * cp + 1) / 2
        return w * (2 * q + 2 * k * keys + (q if cp > 1 else 0))  # the output also in the order of the slice
    padding = PADDING_OF_GROUPS if spec == "local" else 1.0
    return w * (padding * (2 * q + 2 * k * cp) + q)  # the output also without padding


def _expert_bytes(shape: Shape, layout: Layout, moe: MoeShape, units: int) -> float:
    """Bytes of the router's scores and of what the selected experts save, per token of the rank.

    A rank sends its share of the tokens to their experts. If experts are sharded, each etp rank of an expert receives
    the full hidden states of all their tokens, and computes its shard of the feed-forward units.
    """
    w, h, shards = layout.bytes_per_parameter, shape.hidden_size, layout.sequence_shards
    routed = moe.top_k * EXPERT_IMBALANCE * w * (2 * h * layout.sizes.etp + units * moe.ffn_size) / shards
    return routed + 8 * moe.num_experts / shards


def layer_temporary_bytes(shape: Shape, layout: Layout, layer: int, *, spec: Spec) -> float:
    """Bytes of the largest gradients alive together in a layer's backward pass, per token: of gate, up and hidden."""
    moe = experts(shape, layer)
    units = shape.ffn_size if moe is None else moe.top_k * EXPERT_IMBALANCE * moe.ffn_size
    return layout.bytes_per_parameter * (2 * units / layout.sizes.tp + shape.hidden_size)


def _norm(h: float, w: int, spec: Spec) -> float:
    """Bytes that RMSNorm saves besides its output: its input, or a float32 input and quotient if unfused."""
    return 8 * h if spec == "local_cpu" and not _has_cpu_kernels(w, spec) else w * h


def _has_cpu_kernels(w: int, spec: Spec) -> bool:
    """See `model.cpu_kernels`."""
    return spec == "local_cpu" and w == 4


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes on one engine rank."""

    weights: int
    kv_cache: int
    """The rest of the engine's share of the GPU."""
    kv_tokens: int
    """Tokens that the cache can hold; negative if the weights alone exceed the share."""
    runtime: int
    """Activations of the largest batch, CUDA graphs and the reserve: the GPU's memory outside the engine's share, less
    what a resting trainer rank holds."""
    graphs: int = 0
    """CUDA graphs of decoding, part of `runtime`; an engine cannot release them."""
    staged: int = 0
    """During a weight sync, in place of activations: 16-bit matrices whose last piece has not arrived (`fp8`)."""

    @property
    def total(self) -> int:
        """Bytes while the engine generates."""
        return self.weights + self.kv_cache + self.runtime

    def resting(self, *, keeps_weights: bool = False) -> int:
        """Bytes held while a trainer rank uses this GPU."""
        return ENGINE_RESTING_BYTES + self.graphs + (self.weights if keeps_weights else 0)


def engine_memory(
    shape: Shape, *, tp: int, gpu_bytes: int, memory_fraction: float, num_parameters: int, bytes_per_element: int = 2,
    quantization: Literal["none", "fp8"] = "none", beside: int = 0, max_running_requests: int = MAX_GRAPH_REQUESTS,
) -> EngineMemory:  # fmt: skip
    """Bytes on an engine rank.

    SGLang uses `memory_fraction` of the GPU for weights and KV cache, and the rest for activations and graphs.

    Args:
        bytes_per_element: of the KV cache, and of weights that are not quantized.
        beside: bytes that a resting trainer rank holds on the same GPU.
    """
    weights = bytes_per_element * num_parameters // tp
    staged = 0
    if quantization == "fp8":
        weights -= saved_by_float8(shape, tp=tp, bytes_per_element=bytes_per_element)
        staged = staged_bytes(shape, tp=tp)
    share = round(memory_fraction * gpu_bytes)
    per_token = kv_bytes_per_token(shape, tp=tp, bytes_per_element=bytes_per_element)
    room = share - weights
    return EngineMemory(
        weights=weights,
        kv_cache=max(0, room),
        kv_tokens=room // per_token,
        runtime=gpu_bytes - max(share, weights) - beside,
        graphs=decode_graph_bytes(shape, tp=tp, max_running_requests=max_running_requests),
        staged=staged,
    )


def saved_by_float8(shape: Shape, *, tp: int, bytes_per_element: int = 2) -> int:
    """Bytes that float8 saves on an engine rank: a linear weight takes one byte, and each row a float32 scale."""
    linear = linear_weights(shape)
    scales = 4 * (linear.cut_rows // tp + linear.whole_rows)
    return (bytes_per_element - 1) * linear.elements // tp - scales


def staged_bytes(shape: Shape, *, tp: int) -> int:
    """Most bytes in 16 bits on an engine rank that quantizes at a sync; never more than all of its linear weights."""
    linear = linear_weights(shape)
    return min(2 * linear.elements, ENGINE_STAGED_BYTES * tp + 2 * linear.largest) // tp


def decode_graph_bytes(shape: Shape, *, tp: int, max_running_requests: int) -> int:
    """Bytes of an engine's CUDA graphs: for batches of 1, 2, 4, 8, 12, 16 and then every eighth size up to the largest.

    They share one pool of activations, whose largest are the logits of a batch, in 16 and in 32 bits. Graphs of
    prefills are disabled.
    """
    largest = min(max_running_requests, MAX_GRAPH_REQUESTS)
    number = sum(size <= largest for size in (1, 2, 4, 8, 12)) + max(0, largest // 8 - 1)
    return number * shape.num_layers * GRAPH_BYTES_PER_LAYER + largest * shape.vocab_size * 6 // tp


def turns_on_shared_gpu(
    trainer: TrainerMemory, engine: EngineMemory, *, keeps_optimizer: bool = False, keeps_weights: bool = False
) -> dict[str, int]:
    """Bytes on a GPU that a trainer rank and an engine rank share, by turn (`memory_turns`).

    During the sync the trainer already rests, and the engine has its weights but no KV cache yet.
    """
    rest = trainer.resting(keeps_optimizer=keeps_optimizer)
    return {
        "training": trainer.total + engine.resting(keeps_weights=keeps_weights),
        "weight sync": rest + trainer.sync_buckets + engine.resting(keeps_weights=True) + engine.staged,
        "generation": rest + engine.resting(keeps_weights=True) + engine.kv_cache,
    }


def kv_bytes_per_token(shape: Shape, *, tp: int, bytes_per_element: int = 2) -> int:
    """Bytes of a token's keys and values of all layers on one engine rank, which holds at least one key/value head."""
    heads = max(1, shape.num_kv_heads // tp)
    return 2 * shape.num_layers * heads * shape.head_dim * bytes_per_element
