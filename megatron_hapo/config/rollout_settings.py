"""Settings of generation: engines, how they are sampled, and how they share weights and memory with the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from megatron_hapo.config.data_settings import DataConfig, Source
from megatron_hapo.config.data_sources import EvalSet
from megatron_hapo.config.effects import not_with, only_with
from megatron_hapo.config.faults import Fault
from megatron_hapo.config.section import Bytes, Fraction, NonNegativeInt, PositiveInt, Ranks, Seconds, Section

MOST_KEPT = 4096
"""Most tokens among which SGLang (0.5.23) reports a choice: its default sampling_mask_max_tokens."""
SAMPLES = only_with("replay", None)
"""The setting is of sampling, scoring or the engines, which a replay does without."""


class RolloutConfig(Section):
    """The SGLang engines and the responses that they generate for training."""

    engines: Annotated[Ranks, SAMPLES] = 1
    """Number of SGLang engines."""
    tp: Annotated[Ranks, SAMPLES] = 1
    """Tensor parallel size of one engine."""
    ep: Annotated[Ranks, SAMPLES] = 1
    """Expert parallel size of one engine: 1 shards every expert over its tp ranks, tp gives each rank whole experts."""
    dtype: Annotated[Literal["float32", "bfloat16"], SAMPLES] = "bfloat16"
    """Data type of weights, activations and KV cache. `float32`: for CPUs and tests. `bfloat16`: for GPUs, which
    take nothing else."""
    quantization: Annotated[Literal["none", "fp8"], SAMPLES] = "none"
    """`none`: engines hold the weights in dtype. `fp8`: they hold linear weights in float8 (e4m3, one scale per row),
    quantized on their devices at each sync, and round the inputs of linear layers to float8, one scale per token.
    Embedding, norms, output head and KV cache keep dtype. The trainer stays as it is, so engine and trainer differ more
    (`rollout/mismatch_kl`): set algorithm.importance_correction. docs/quantization.md has figures."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are dropped, counted and reported."""
    max_response_tokens: PositiveInt = 10240
    """Longer responses are truncated."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Base temperature T of training rollouts; the trainer computes log-probs at this temperature too."""
    top_p: Annotated[float, Field(gt=0, le=1), SAMPLES] = 1.0
    """Sample training rollouts from the most likely tokens whose probabilities, at the token's temperature, add up to
    this. Below 1, or with top_k, each token comes with the ids of the tokens that were kept (4 bytes per kept token and
    4 per response token, at most 4096 kept tokens), and the log-probs of engine and trainer are those among them, in
    updates too. Entropies stay those of the whole vocabulary."""
    top_k: Annotated[Annotated[int, Field(ge=2, le=MOST_KEPT)] | None, SAMPLES] = None
    """Sample training rollouts from so many most likely tokens; see top_p. `None`: no limit of its own."""
    replay_routes: Annotated[bool, SAMPLES] = True
    """Models with experts: the engine returns the experts of every token in every layer, and the trainer's log-probs
    and updates use them, so that both compute the same policy. One byte per layer and chosen expert (two above 255
    experts), 384 bytes a token for Qwen3-30B-A3B. Models without experts have nothing to replay."""
    compare_routes_every: Annotated[NonNegativeInt, only_with("rollout.replay_routes", True), SAMPLES] = 20
    """Steps between log-probs without replay, for `rollout/unreplayed_*`; each costs another forward pass. 0: none."""
    stop_token_ids: Annotated[tuple[NonNegativeInt, ...], SAMPLES] = ()
    """Tokens that end a response, besides the end-of-sequence tokens of the model's generation config."""
    max_running_requests: Annotated[PositiveInt, SAMPLES] = 256
    """Requests that one engine decodes at once. It is given about an eighth more, which wait in its queue; all others
    go to whichever engine has room first."""
    memory_fraction: Annotated[Fraction, not_with("device", "cpu"), SAMPLES] = 0.8
    """Share of a GPU's memory for weights and KV cache."""
    kv_cache_tokens: Annotated[PositiveInt | None, SAMPLES] = None
    """Size of the KV cache in tokens. `None`: as large as memory_fraction allows; a CPU needs a number."""
    timeout_seconds: Annotated[Seconds, SAMPLES] = 3600
    """A generation call that takes longer fails the run with the name of the engine."""

    @property
    def precision(self) -> str:
        """The coarsest type of the engines' arithmetic: float32, bfloat16 or fp8."""
        return self.dtype if self.quantization == "none" else self.quantization

    @property
    def cuts(self) -> bool:
        """Whether the choice of training tokens is cut."""
        return self.top_p < 1 or self.top_k is not None

    def contradictions(self, *, device: str) -> Iterator[Fault]:
        """Settings of the engines that do not fit each other or the device."""
        if self.ep not in (1, self.tp):
            yield Fault("rollout.ep", f"must be 1 or rollout.tp={self.tp}, got {self.ep}", ("rollout.tp",))
        elif self.ep > 1 and device == "cpu":
            yield Fault(
                "rollout.ep", f"must be 1 with device=cpu, got {self.ep}: SGLang has no such CPU kernel", ("device",)
            )
        if self.dtype == "float32" and device == "cuda":
            yield Fault(
                "rollout.dtype",
                "must be bfloat16 with device=cuda, got float32: SGLang's attention on a GPU (Flash Attention 3) takes "
                "16-bit types only",
                ("device",),
            )
        if self.quantization == "fp8" and self.dtype != "bfloat16":
            yield Fault(
                "rollout.quantization",
                f"fp8 needs rollout.dtype=bfloat16, got {self.dtype}: SGLang's float8 layers take 16-bit inputs only",
                ("rollout.dtype",),
            )
        longest = self.max_prompt_tokens + self.max_response_tokens
        if self.kv_cache_tokens is None and device == "cpu":
            yield Fault("rollout.kv_cache_tokens", "is required with device=cpu", ("device",))
        if self.kv_cache_tokens is not None and self.kv_cache_tokens < longest:
            yield Fault(
                "rollout.kv_cache_tokens",
                f"must hold one prompt and response of max_prompt_tokens + max_response_tokens = {longest}, "
                f"got {self.kv_cache_tokens}",
                ("rollout.max_prompt_tokens", "rollout.max_response_tokens"),
            )


class DynamicSamplingConfig(Section):
    """DAPO's dynamic sampling: groups whose rewards are all equal are replaced by further generation."""

    enabled: bool = False
    """Generate until there are enough groups with differing rewards."""
    max_generation_batches: Annotated[PositiveInt, only_with("dynamic_sampling.enabled", True)] = 10
    """The run fails if this many batches do not yield enough groups."""


class AsyncConfig(Section):
    """Generation while the trainer trains."""

    max_staleness: Annotated[int, Field(ge=0, le=64)] = 0
    """Largest number of steps N by which the weights of a token may lag behind those that are trained on it. `0`:
    strictly on-policy. Otherwise groups of the next N steps are generated while this step trains; needs
    algorithm.importance_correction. weight_sync.in_flight chooses what happens to responses that are unfinished when
    the weights change."""
    stale_groups: Annotated[Literal["wait", "drop"], not_with("async.max_staleness", 0)] = "wait"
    """What happens to groups that have not finished when they are due, max_staleness steps after the weights that they
    were started with. `wait`: the step waits for them; none is lost. `drop`: it trains on others, and what finishes too
    late is dropped (`rollout/dropped_groups`), which favours short responses and fast engines."""

    def contradictions(self, *, placement: str, correction_level: str) -> Iterator[Fault]:
        """Why rollouts cannot lag behind."""
        if not self.max_staleness:
            return
        key = "async.max_staleness"
        if correction_level == "none":
            yield Fault(
                key,
                f"{self.max_staleness} needs algorithm.importance_correction.level token or sequence, got none: the "
                "weights that generate rollouts are older than those that are trained",
                ("algorithm.importance_correction",),
            )
        if placement == "colocated":
            yield Fault(
                key,
                f"must be 0 with placement=colocated, got {self.max_staleness}: engines that share the trainer's GPUs "
                "cannot generate while it trains",
                ("placement",),
            )


@dataclass(frozen=True, kw_only=True)
class SetSampling:
    """How one evaluation set is sampled and scored."""

    samples: int
    temperature: float
    top_p: float
    max_response_tokens: int
    scorer: str | None
    """None: reward.scorer."""


class EvalConfig(Section):
    """Evaluation on data.eval, during training and by `megatron-hapo eval`."""

    every: NonNegativeInt = 5
    """Steps between evaluations during training; there is also one before the first step and one after the last.
    0: none."""
    samples: Annotated[int, Field(gt=0, le=1_000_000)] = 1
    """Responses to each evaluation prompt; the accuracy is their mean."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.5
    """Sampling temperature; 0 is greedy. Evaluation never uses the adaptive temperature."""
    top_p: Annotated[float, Field(gt=0, le=1), not_with("eval.temperature", 0)] = 0.7
    """Sample from the most likely tokens whose probabilities add up to this."""

    def of_set(self, source: Source, *, max_response_tokens: int) -> SetSampling:
        """How this evaluation set is sampled: as it says itself, else as this section says."""
        own = source if isinstance(source, EvalSet) else EvalSet()
        return SetSampling(
            samples=self.samples if own.samples is None else own.samples,
            temperature=self.temperature if own.temperature is None else own.temperature,
            top_p=self.top_p if own.top_p is None else own.top_p,
            max_response_tokens=own.max_response_tokens or max_response_tokens,
            scorer=own.scorer,
        )

    def contradictions(self, data: DataConfig, *, max_response_tokens: int) -> Iterator[Fault]:
        """Settings of the evaluation that exclude each other."""
        if self.samples > 1 and self.temperature == 0:
            yield Fault(
                "eval.samples",
                f"must be 1 with eval.temperature=0, got {self.samples}: greedy responses are all the same",
                ("eval.temperature",),
            )
            return
        for name, source in data.eval_sets.items():
            if isinstance(source, EvalSet):
                yield from self._set_faults(f"data.eval.{name}", source, max_response_tokens)

    def _set_faults(self, key: str, source: Source, longest: int) -> Iterator[Fault]:
        assert isinstance(source, EvalSet)
        sampling = self.of_set(source, max_response_tokens=longest)
        if sampling.temperature == 0 and sampling.samples > 1:
            yield Fault(
                f"{key}.samples",
                f"must be 1 with {key}.temperature=0, got {sampling.samples}: greedy responses are all the same",
                (f"{key}.temperature", "eval.samples", "eval.temperature"),
            )
        if sampling.temperature == 0 and source.top_p is not None:
            yield Fault(
                f"{key}.top_p", "has no effect: the temperature is 0", (f"{key}.temperature", "eval.temperature")
            )
        if sampling.max_response_tokens > longest:
            yield Fault(
                f"{key}.max_response_tokens",
                f"must be at most rollout.max_response_tokens={longest}, for which the engines are started, got "
                f"{sampling.max_response_tokens}",
                ("rollout.max_response_tokens",),
            )
        if source.scorer == "reasoning_gym" and source.type != "reasoning_gym":
            yield Fault(f"{key}.scorer", f"reasoning_gym cannot score {key}.type={source.type}", (f"{key}.type",))


class WeightSyncConfig(Section):
    """How the engines get the trainer's weights."""

    method: Literal["direct", "gather"] = "direct"
    """`direct`: from the trainer's shards straight into the engines' own parameters. Falls back to gather, and logs the
    reason, if the engine's layout of the model is not known. `gather`: whole tensors under their Hugging Face names."""
    bucket_bytes: Bytes = 512 << 20
    """With `gather`, weights are sent in buckets of at most this size (a larger parameter is a bucket of its own). With
    `direct`, all buckets in flight take at most twice this size."""
    verify_every: PositiveInt = 10
    """Syncs between comparisons of the engines' checksums with the trainer's; the first sync is always compared."""
    in_flight: Annotated[Literal["finish", "pause", "abort"], not_with("async.max_staleness", 0)] = "finish"
    """What happens to responses that are unfinished when the weights change. `finish`: the sync waits
    for them. `pause`: they wait and continue with the new weights, with their prefix recomputed (partial rollouts; each
    token records the version of its weights). `abort`: they are generated again from the start."""
    timeout_seconds: Annotated[Seconds, only_with("weight_sync.method", "direct")] = 600
    """A phase of a direct sync that takes longer fails the run, naming the ranks and the parameter it waits for."""


class MemoryTurnsConfig(Section):
    """What trainer ranks and engines on the same GPUs release while the others work; they keep the rest."""

    trainer: Literal["all", "gradients"] = "all"
    """Released while engines generate. `all`: gradient buffers and the optimizer state, which moves to host memory.
    `gradients`: gradient buffers only."""
    engines: Literal["all", "kv_cache"] = "all"
    """Released while the trainer works. `all`: the KV cache and the weights, which the next sync sends again.
    `kv_cache`: the KV cache only."""
