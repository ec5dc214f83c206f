"""Settings of the model, the trainer's ranks and the update."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megatron_hapo.config.effects import any_of, not_with, only_with
from megatron_hapo.config.faults import Fault
from megatron_hapo.config.parallel_sizes import ParallelSizes
from megatron_hapo.config.section import FilePath, Fraction, NonNegativeInt, PositiveInt, Seconds, Section, Strength


def parse_bytes(text: str) -> int:
    """The number of bytes of a size like 80GiB, 141GB or 1024.

    Raises:
        ValueError: not a number with one of the units B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, or not of a real memory.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*(?:([KMGT])(i?)B|B)?\s*", text)
    if match is None:
        raise ValueError(f"must be a size like 80GiB or 141GB, got {text[:100]!r}")
    number, prefix, binary = match.groups()
    exponent = "KMGT".index(prefix) + 1 if prefix else 0
    size = round(float(number) * (1024 if binary else 1000) ** exponent)
    if not 1 <= size <= 1 << 50:
        raise ValueError(f"must be a size from 1B to 1024TiB, got {text[:100]!r}")
    return size


def _byte_size(text: str) -> str:
    parse_bytes(text)
    return text


class ModelConfig(Section):
    """The model to train."""

    path: FilePath
    """Hugging Face model folder: config.json, safetensors files, tokenizer."""
    spec: Annotated[Literal["auto", "te", "local"], not_with("device", "cpu")] = "auto"
    """Implementation of the layers on a GPU. `te`: Transformer Engine. `local`: torch's attention, as on a CPU, which
    computes a prompt once for all of its responses. `auto`: Transformer Engine if the package is installed."""


class ParallelConfig(ParallelSizes):
    """Sizes of the trainer's process grid; tp * pp * cp * dp is the number of trainer ranks. With `parallel: auto` in
    place of the section, `train` chooses the sizes, and the engines, for the GPUs of its machine."""

    sequence_parallel: Annotated[bool, not_with("parallel.tp", 1)] = True
    """Shard norms and residuals over the tp ranks."""
    gpu_memory: Annotated[Annotated[str, AfterValidator(_byte_size)] | None, not_with("device", "cpu")] = None
    """Memory of one GPU, e.g. 80GiB. A layout that cannot fit is rejected before anything is loaded. `None`: what the
    driver of this machine reports, if it has GPUs."""

    def contradictions(self) -> Iterator[Fault]:
        """Sizes that do not fit each other."""
        yield from self.grid_faults("parallel.")


class TrainerConfig(Section):
    """How a trainer rank computes."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of parameters and activations. `float32`: for CPUs and tests. `bfloat16`: the optimizer keeps float32
    master weights."""
    max_tokens_per_microbatch: PositiveInt = 16384
    """Token budget of one packed micro-batch on one data parallel rank; its context parallel ranks share it. Counts the
    prompt with each of its responses, even where they share it."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over the dp ranks (ZeRO-1)."""
    overlap_communication: Annotated[bool, any_of(not_with("parallel.dp", 1), not_with("parallel.cp", 1))] = False
    """Reduce gradients while the last micro-batch's backward pass runs; with distributed_optimizer, gather the updated
    weights while the next forward pass runs."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes instead of storing. `none`: nothing is recomputed. `selective`:
    feed-forward blocks, and the inner part of attention where it is not fused. `full`: whole layers; only their inputs
    are stored."""
    output_head: Literal["logits", "fused"] = "logits"
    """`logits`: the logits of all response tokens of a micro-batch are held once, and their gradient overwrites them.
    `fused`: one chunk of tokens at a time, at the cost of a second matrix product in the backward pass; for long
    responses and large micro-batches."""
    float32_logits: Annotated[bool, only_with("trainer.dtype", "bfloat16")] = False
    """Keep logits in float32, in trainer and engines, as the product of bfloat16 hidden states and weights is summed
    anyway. Rounded to bfloat16, a logit above 16 has steps of 0.125: noise in log-probs, in low entropies, and in the
    ratio of trainer and engines. The logits take twice the memory."""
    quantization: Literal["none", "fp8"] = "none"
    """`none`: no quantization. `fp8`: quantization-aware training. Trainer and engines use linear weights rounded to
    float8 (e4m3, one scale per matrix); the optimizer keeps the exact weights. Activations and the KV cache are not
    rounded."""
    timeout_seconds: Seconds = 1800
    """A collective or a remote call that takes longer fails the run with the names of the missing ranks."""

    def contradictions(self) -> Iterator[Fault]:
        """Settings of the trainer that exclude each other."""
        if self.quantization != "none" and self.dtype != "bfloat16":
            yield Fault(
                "trainer.quantization",
                f"{self.quantization} needs trainer.dtype=bfloat16, got {self.dtype}: the optimizer's float32 master "
                "weights are the exact weights",
                ("trainer.dtype",),
            )


_FALLING = only_with("optimizer.schedule", "linear", "cosine", "wsd")


class OptimizerConfig(Section):
    """Adam, and its learning rate."""

    lr: Annotated[float, Field(gt=0, le=10)] = 1e-6
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 10
    """Steps (not mini-batches) over which the learning rate rises linearly; the first step already has lr/warmup_steps.
    """
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """What the learning rate does after the warm-up. `constant`: stays. `linear`, `cosine`: falls over all remaining
    steps, to min_lr at the end of the run (`steps`). `wsd`: stays, then falls linearly over the last decay_steps
    (warm-up, stable, decay)."""
    min_lr: Annotated[float, Field(ge=0, le=10), _FALLING] = 0.0
    """Learning rate that the schedule reaches when the last step has been made; the last step's is still above it."""
    decay_steps: Annotated[PositiveInt | None, only_with("optimizer.schedule", "wsd")] = None
    """Steps over which the learning rate falls at the end of the run. `None`: a tenth of `steps`, at least one."""
    weight_decay: Strength = 0.1
    """Decoupled weight decay, of all parameters: norms and biases are not spared. It is multiplied by the learning
    rate, and falls with it."""
    beta1: Fraction = 0.9
    """Decay rate of the first moment."""
    beta2: Fraction = 0.999
    """Decay rate of the second moment."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Added to the denominator of the update."""
    clip_grad: Annotated[float, Field(gt=0, le=1e12)] = 1.0
    """Largest global L2 norm of the gradient."""
    cpu_offload: bool = False
    """Keep master weights and moments in host memory and run Adam there (Megatron's HybridDeviceOptimizer): 12 bytes
    per parameter less on the GPUs, about 16 more on the hosts, and a slower update. Needs GPUs."""

    def num_decay_steps(self, steps: int) -> int:
        """Steps of the decay of `wsd` in a run of `steps` steps."""
        return self.decay_steps or max(1, steps // 10)

    def contradictions(self, *, device: str, trainer: TrainerConfig, steps: int) -> Iterator[Fault]:
        """Why the schedule does not fit into the run, and why the optimizer cannot be offloaded."""
        yield from self._schedule_faults(steps)
        if not self.cpu_offload:
            return
        key, dtype = "optimizer.cpu_offload", trainer.dtype
        if device == "cpu":
            yield Fault(key, "needs GPUs, got device=cpu: all memory is the host's", ("device",))
        if not trainer.distributed_optimizer:
            yield Fault(key, "needs trainer.distributed_optimizer=true, got false", ("trainer.distributed_optimizer",))
        if dtype != "bfloat16":
            message = f"needs trainer.dtype=bfloat16, got {dtype}: Megatron cannot load its checkpoints of other dtypes"
            yield Fault(key, message, ("trainer.dtype",))

    def _schedule_faults(self, steps: int) -> Iterator[Fault]:
        if self.schedule == "constant":
            return
        if self.min_lr > self.lr:
            yield Fault(
                "optimizer.min_lr", f"must be at most optimizer.lr={self.lr}, got {self.min_lr}", ("optimizer.lr",)
            )
        remaining, decay = steps - self.warmup_steps, self.num_decay_steps(steps)
        if remaining < 1:
            yield Fault(
                "optimizer.warmup_steps",
                f"must be less than steps={steps} with optimizer.schedule={self.schedule}, got {self.warmup_steps}: no "
                "step is left for the schedule",
                ("steps", "optimizer.schedule"),
            )
        elif self.schedule == "wsd" and decay > remaining:
            yield Fault(
                "optimizer.decay_steps",
                f"must be at most steps - optimizer.warmup_steps = {remaining}, got {decay}"
                + ("" if self.decay_steps else ", a tenth of steps"),
                ("steps", "optimizer.warmup_steps"),
            )


class BatchConfig(Section):
    """Sizes of a step."""

    prompts_per_step: Annotated[int, Field(gt=0, le=1_000_000)] = 512
    """Prompts sampled in one step."""
    samples_per_prompt: Annotated[int, Field(gt=0, le=1_000_000)] = 16
    """Responses to each prompt (the group size n of the paper)."""
    prompts_per_minibatch: Annotated[int, Field(gt=0, le=1_000_000)] = 32
    """Prompts in one optimizer update; a step has prompts_per_step / prompts_per_minibatch updates."""

    def contradictions(self, *, advantage: str) -> Iterator[Fault]:
        """Sizes that do not fit each other or the advantage."""
        if self.prompts_per_step % self.prompts_per_minibatch:
            yield Fault(
                "batch.prompts_per_minibatch",
                f"must divide batch.prompts_per_step={self.prompts_per_step}, got {self.prompts_per_minibatch}",
                ("batch.prompts_per_step",),
            )
        if self.samples_per_prompt == 1:
            yield Fault(
                "batch.samples_per_prompt",
                f"must be at least 2, got 1: algorithm.advantage={advantage} compares the responses to one prompt with "
                "each other",
                ("algorithm.advantage",),
            )
