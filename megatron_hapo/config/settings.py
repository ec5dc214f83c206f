"""All settings of a run: typed, frozen, checked together before anything starts. Imports no torch.

A config is a YAML file; `base:` names the file (or files) that it builds on, and `key=value` arguments come last.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from megatron_hapo.config.pipeline import Pipeline

NonNegativeInt = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=1024, le=65535)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def parse_bytes(text: str) -> int:
    """Bytes of a size like 80GiB, 141GB or 1024.

    Raises:
        ValueError: not a number with one of the units B, KB, MB, GB, TB, KiB, MiB, GiB, TiB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B|B)?\s*", text)
    if match is None:
        raise ValueError(f"must be a size like 80GiB or 141GB, got {text!r}")
    number, prefix, binary = match.groups()
    exponent = "KMGT".index(prefix) + 1 if prefix else 0
    return round(float(number) * (1024 if binary else 1000) ** exponent)


def _byte_size(text: str) -> str:
    parse_bytes(text)
    return text


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, serialize_by_alias=True)


class ModelConfig(Section):
    path: Path
    """Hugging Face model folder: config.json, safetensors, tokenizer."""
    spec: Literal["auto", "te", "local"] = "auto"
    """Layer implementation: Transformer Engine, or torch SDPA (`local`). `auto` takes Transformer Engine where a
    GPU and the package are present."""


class ParallelConfig(Section):
    """Sizes of the trainer's process grid; the number of trainer ranks is their product. `parallel: auto` in the place
    of the section lets `train` choose them, and the engines, for the GPUs of its machine."""

    tp: PositiveInt = 1
    """Tensor parallel size."""
    pp: PositiveInt = 1
    """Pipeline parallel size."""
    vpp: PositiveInt = 1
    """Interleaved pipeline: every stage holds so many chunks of the layers in turn, which shrinks the pipeline's bubble
    to 1 / vpp and sends vpp times as many messages."""
    first_stage_layers: PositiveInt | None = None
    """Layers of the first pipeline stage, which holds the embedding too. `None`: as many as the stages between."""
    last_stage_layers: PositiveInt | None = None
    """Layers of the last pipeline stage, which holds the output head and the loss too. `None`: as many as the stages
    between."""
    cp: PositiveInt = 1
    """Context parallel size: each sequence is cut over so many ranks."""
    dp: PositiveInt = 1
    """Data parallel size."""
    ep: PositiveInt = 1
    """Expert parallel size: the experts of a mixture-of-experts model are dealt out over so many groups of the tp x dp
    ranks of a pipeline stage."""
    etp: PositiveInt = 1
    """Expert tensor parallel size: each expert is cut over so many neighbouring ranks of a tp group, which then share
    its tokens too. 1 leaves experts whole: small ones compute faster so, and need ep for the memory."""
    sequence_parallel: bool = True
    """Shard norms and residuals over the tp ranks; has an effect only with tp > 1."""
    gpu_memory: Annotated[str, AfterValidator(_byte_size)] | None = None
    """Memory of one GPU, e.g. 80GiB. A layout that cannot fit is refused before anything is loaded. `None`: as the
    driver of this machine says, if there is one."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline.of(self)


class TrainerConfig(Section):
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter and activation dtype; with bfloat16 the optimizer keeps float32 master weights."""
    max_tokens_per_microbatch: PositiveInt = 16384
    """Token budget of one packed micro-batch on one data parallel rank; its context parallel ranks share it."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over the dp ranks (ZeRO-1)."""
    overlap_communication: bool = False
    """Reduce gradients while the last micro-batch's backward pass runs; with distributed_optimizer, gather the updated
    weights while the next forward pass runs."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it. `selective`: feed-forward blocks, and the inner part
    of the attention where it is not fused. `full`: whole layers, of which only the inputs are kept."""
    output_head: Literal["logits", "fused"] = "logits"
    """`logits`: the logits of a micro-batch's response tokens exist once, and their gradient overwrites them. `fused`:
    those of one chunk of tokens at a time, at the cost of a second product in the backward pass: for long responses
    and large micro-batches."""
    quantization: Literal["none", "fp8"] = "none"
    """`fp8`: quantization-aware training. Trainer and engines work with linear weights rounded to float8 (e4m3, one
    scale a matrix), the optimizer with the exact ones. Activations and the KV cache are not rounded."""
    timeout_seconds: PositiveFloat = 1800
    """A collective or a remote call that takes longer fails the run with the names of the missing ranks."""


class OptimizerConfig(Section):
    lr: PositiveFloat = 1e-6
    """Peak learning rate of Adam."""
    warmup_steps: NonNegativeInt = 10
    """Steps (not mini-batches) over which the rate rises linearly; the first step already has lr/warmup_steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    clip_grad: PositiveFloat = 1.0
    """Largest global L2 norm of the gradient."""
    cpu_offload: bool = False
    """Masters and moments stay in host memory, and Adam runs there (Megatron's HybridDeviceOptimizer): 12 bytes a
    parameter less on the GPUs, about 16 on the hosts, and a slower update. Needs GPUs."""


class BatchConfig(Section):
    prompts_per_step: PositiveInt = 512
    """Prompts sampled in one step."""
    samples_per_prompt: PositiveInt = 16
    """Responses to one prompt (the group size n of the paper)."""
    prompts_per_minibatch: PositiveInt = 32
    """Prompts in one optimizer update; prompts_per_step / prompts_per_minibatch updates a step."""


class RolloutConfig(Section):
    engines: PositiveInt = 1
    """Number of SGLang engines."""
    tp: PositiveInt = 1
    """Tensor parallel size of one engine."""
    ep: PositiveInt = 1
    """Expert parallel size of one engine: 1 cuts every expert over its tp ranks, tp gives each rank whole experts."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are left out, counted and reported."""
    max_response_tokens: PositiveInt = 10240
    temperature: PositiveFloat = 1.0
    """Base temperature T of training rollouts; also the temperature at which the trainer takes log-probs."""
    stop_token_ids: tuple[int, ...] = ()
    """Beside the end-of-sequence tokens of the model's generation config."""
    max_running_requests: PositiveInt = 256
    """Requests that one engine decodes together. It is given about an eighth more, which wait in it; what is left goes
    to whichever engine has room first."""
    memory_fraction: Fraction = 0.8
    """Share of a GPU's memory for weights and KV cache."""
    kv_cache_tokens: PositiveInt | None = None
    """Size of the KV cache in tokens; required on a CPU, on a GPU `None` lets the memory fraction decide."""
    timeout_seconds: PositiveFloat = 3600
    """A generation call that takes longer fails the run with the name of the engine."""


class AdaptiveTemperatureConfig(Section):
    """Adaptive temperature sampling: T_t = T (1 + tau h_t)."""

    enabled: bool = True
    tau: Annotated[float, Field(ge=0, lt=1)] = 0.05


class AdaptiveClipConfig(Section):
    """Asymmetric adaptive clipping: wider to the left at low entropy, to the right at high entropy."""

    enabled: bool = True
    alpha: Annotated[float, Field(ge=0)] = 1.0


class RedistributionConfig(Section):
    """Differential advantage redistribution."""

    enabled: bool = True
    beta: Annotated[float, Field(ge=0)] = 1.0


class EntropyConfig(Section):
    pivot: Fraction = 0.8
    """Quantile of log entropy that separates high from low (rho)."""
    sign: Literal["signed", "reference"] = "signed"
    """`signed`: h in [-1, 1], as the method is described. `reference`: low entropy comes out positive, as in the
    authors' released code."""
    floor: Annotated[float, Field(ge=1e-30)] = 1e-6
    """Entropies are raised to this many nats before the logarithm, in trainer and sampler alike."""
    source: Literal["old", "current", "micro_batch"] = "old"
    """Entropies behind h in the loss. `old`: of the policy before the step's first update. `current`: of the policy
    being updated, against the step's statistics. `micro_batch`: as the authors' released code, statistics per
    micro-batch of current entropies; the result then depends on the layout."""
    scale_quantile: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the tokens beyond which log entropies no longer stretch the scale of h, at either end, e.g. 0.001;
    0 takes the largest and the smallest."""


class ForkingTokensConfig(Section):
    """Gradient of the most uncertain tokens of the step only (arXiv:2506.01939)."""

    enabled: bool = False
    share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the response tokens that is kept (rho)."""


class DualConstraintConfig(Section):
    """Archer's constraints (arXiv:2507.15778): tokens above an entropy quantile of their response are reasoning tokens,
    the others knowledge tokens, which keep algorithm.clip_low and clip_high."""

    enabled: bool = False
    quantile: Fraction = 0.8
    clip_low: Fraction = 0.5
    """Of reasoning tokens."""
    clip_high: PositiveFloat = 0.5
    """Of reasoning tokens."""
    kl: Annotated[float, Field(ge=0)] = 0.001
    """Coefficient of the KL of knowledge tokens, to the policy before the step's first update."""


class ImportanceCorrectionConfig(Section):
    """Truncated importance sampling: weights pi_old / pi_engine on the loss."""

    level: Literal["none", "token", "sequence"] = "none"
    mode: Literal["clip", "mask"] = "clip"
    """`clip`: at most max_weight. `mask`: weights outside [1 / max_weight, max_weight] become 0."""
    max_weight: Annotated[float, Field(ge=1)] = 2.0


class AlgorithmConfig(Section):
    advantage: Literal["token_level_group_average", "group_mean", "entropy_driven"] = "token_level_group_average"
    """`token_level_group_average` (HAPO), `group_mean` (GRPO), or `entropy_driven` (EDGE-GRPO)."""
    norm_by_std: bool = True
    """Divide advantages by the group's standard deviation."""
    advantage_fallback: PositiveFloat = 5.0
    """A group with a normalised |advantage| of at least this much takes the GRPO advantage."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or of its whole response (GSPO)."""
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"] = "token_mean"
    """Over a mini-batch: mean over tokens (DAPO, HAPO); mean over responses of their token means (GRPO, GSPO); mean
    over responses of token sums / rollout.max_response_tokens (Dr.GRPO)."""
    clip_low: Fraction = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] = 10.0
    """Bound c on the loss of tokens with negative advantage."""
    entropy: EntropyConfig = EntropyConfig()
    adaptive_temperature: AdaptiveTemperatureConfig = AdaptiveTemperatureConfig()
    adaptive_clip: AdaptiveClipConfig = AdaptiveClipConfig()
    redistribution: RedistributionConfig = RedistributionConfig()
    forking_tokens: ForkingTokensConfig = ForkingTokensConfig()
    dual_constraint: DualConstraintConfig = DualConstraintConfig()
    importance_correction: ImportanceCorrectionConfig = ImportanceCorrectionConfig()


class DynamicSamplingConfig(Section):
    """DAPO's dynamic sampling: groups whose rewards are all equal are replaced by further generation."""

    enabled: bool = False
    max_generation_batches: PositiveInt = 10
    """The run stops with an error when this many batches do not give enough groups."""


class FileData(Section):
    type: Literal["file"]
    path: Path
    """Parquet or JSONL in the DAPO-Math layout: prompt (messages), reward_model.ground_truth, data_source."""
    limit: PositiveInt | None = None
    """Only the first rows."""


class TaskData(Section):
    type: Literal["reasoning_gym"]
    name: str
    """A dataset of reasoning-gym, e.g. chain_sum."""
    size: PositiveInt
    seed: int = 0
    options: dict[str, Any] = {}
    """Passed on to the dataset, e.g. {min_terms: 2, max_terms: 4}."""


class ArithmeticData(Section):
    type: Literal["arithmetic"]
    size: PositiveInt
    seed: int = 0
    min_terms: Annotated[int, Field(ge=2)] = 3
    max_terms: Annotated[int, Field(ge=2)] = 5
    max_number: PositiveInt = 9


DataSource = Annotated[FileData | TaskData | ArithmeticData, Field(discriminator="type")]


class DataConfig(Section):
    train: DataSource
    eval: DataSource | None = None
    chat_template: bool = True
    """Render prompts with the tokenizer's chat template; without it the messages' contents are joined as they are."""
    shuffle: bool = True


class OverlongConfig(Section):
    """DAPO's soft overlong penalty (arXiv:2503.14476, equation 13)."""

    buffer_tokens: NonNegativeInt = 0
    """Length of the zone before max_response_tokens in which the penalty rises linearly to `factor`; 0 is off."""
    factor: PositiveFloat = 1.0


class RewardConfig(Section):
    scorer: Literal["auto", "math", "exact", "reasoning_gym"] = "auto"
    """`math`: math-verify; `exact`: the text after the last 'answer'; `auto`: by the data source."""
    correct: float = 1.0
    wrong: float = -1.0
    workers: PositiveInt = 2
    """Reward processes."""
    timeout_seconds: PositiveFloat = 10.0
    """A reward call that takes longer scores as wrong; its process is replaced."""
    memory_bytes: PositiveInt = 2 << 30
    """Address space limit of a reward process."""
    allow_unisolated: bool = False
    """Evaluate answers even where the system offers neither user namespaces nor Landlock nor seccomp to confine them.
    A response can then run code with the rights of the user who trains."""
    overlong: OverlongConfig = OverlongConfig()


class AsyncConfig(Section):
    """Generation beside training."""

    max_staleness: Literal[0, 1] = 0
    """Steps by which the weights of rollouts may lag behind. 0: strictly on-policy. 1: the next step's rollouts are
    generated while this step trains; needs algorithm.importance_correction, and weight_sync.in_flight says what becomes
    of those that training overtakes."""


class EvalConfig(Section):
    every: NonNegativeInt = 5
    """Evaluate every so many steps, and before the first and after the last; 0: never."""
    samples: PositiveInt = 1
    """Responses for each evaluation prompt; the accuracy is their mean."""
    temperature: Annotated[float, Field(ge=0)] = 0.5
    """0 is greedy. Evaluation never uses the adaptive temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.7


class CheckpointConfig(Section):
    every: NonNegativeInt = 50
    """Steps between resumable checkpoints; 0: only at the end and when interrupted."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""
    resume: bool = True
    """Continue from the newest checkpoint in the run folder, if there is one. false: start over; the first checkpoint
    then replaces those of the run before."""
    hf_every: NonNegativeInt = 0
    """Steps between exports of the model as a Hugging Face folder (`hf_steps/step_*` in the run folder); 0: none."""
    hf_at_end: bool = True
    """Write the final model as a Hugging Face folder."""


class WeightSyncConfig(Section):
    method: Literal["direct", "gather"] = "direct"
    """`direct`: from the trainer's shards straight into the engines' own parameters, where the engine's layout of the
    model is known; else, with a logged reason, `gather`: whole tensors under their Hugging Face names."""
    bucket_bytes: PositiveInt = 512 << 20
    """`gather`: weights travel in buckets of at most this size (one larger parameter is a bucket of its own).
    `direct`: the buckets in flight together are of at most twice this size."""
    verify_every: PositiveInt = 10
    """Compare a checksum of the engine's weights with the trainer's on the first and every so many syncs."""
    in_flight: Literal["finish", "pause", "abort"] = "finish"
    """Responses of the next step that are unfinished when the weights change, with async.max_staleness=1. `finish`: the
    sync waits for them. `pause`: they wait, and go on from the new weights, with their prefix computed anew (partial
    rollouts: each token carries the version of its weights). `abort`: they are generated anew."""
    timeout_seconds: PositiveFloat = 600
    """`direct`: a phase of a sync that takes longer fails the run, with the ranks and the parameter it waits for."""


class MemoryTurnsConfig(Section):
    """What trainer ranks and engines on the same GPUs give back while the others work; each keeps the rest."""

    trainer: Literal["all", "gradients"] = "all"
    """While engines generate. `all`: gradient buffers, and the optimizer's state, which waits in host memory."""
    engines: Literal["all", "kv_cache"] = "all"
    """While the trainer works. `all`: the KV cache, and the weights, which the next sync brings again."""


class LaunchConfig(Section):
    """Ray under torchrun; without effect where Ray starts the trainer."""

    engines: Literal["trainer_nodes", "own_nodes"] = "trainer_nodes"
    """`trainer_nodes`: engines stand on the nodes of the trainer ranks, on GPUs that these leave free (`placement:
    colocated`: on theirs). `own_nodes`: on Ray nodes without trainer ranks, which join with `ray start --address
    HEAD:ray_port` and the same RAY_AUTH_TOKEN."""
    ray_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the Ray head on the first node; 0: any that is free. The others learn it from torchrun's rendezvous."""
    ray_worker_ports: tuple[Port, Port] | None = None
    """First and last port for everything else of Ray, on every node, where a firewall asks for it; at least 10 and one
    for each engine. `None`: any that are free."""
    start_timeout_seconds: PositiveFloat = 300
    """The run fails if ranks, Ray nodes or room for the engines take longer to come."""


class MetricsConfig(Section):
    """Where metrics go beside the console, metrics.jsonl and TensorBoard; docs/metrics.md says what they are."""

    wandb_project: str | None = None
    """Project of Weights & Biases that gets them too; needs `pip install wandb`. Its own variables apply, such as
    WANDB_API_KEY, WANDB_ENTITY and WANDB_MODE=offline."""


class ProfileConfig(Section):
    """Where the time of a step goes; see docs/profiling.md."""

    steps: tuple[PositiveInt, ...] = ()
    """Steps that are traced into `profile/step_*` of the run folder: the operators of every trainer rank, and the whole
    step over all processes. They take longer than others."""


class Config(Section):
    """One run."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Run folder is `output_dir/name`."""
    output_dir: Path = Path("runs")
    seed: int = 0
    steps: PositiveInt
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: cuda where a GPU is visible, else cpu."""
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """`disaggregated`: trainer ranks and engines have GPUs of their own. `colocated`: engine i stands on the GPUs of
    trainer ranks i * rollout.tp and following, and they hold the memory in turn (memory_turns)."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    trainer: TrainerConfig = TrainerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    overlap: AsyncConfig = Field(AsyncConfig(), alias="async")  # a word that Python keeps for itself
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    memory_turns: MemoryTurnsConfig = MemoryTurnsConfig()
    launch: LaunchConfig = LaunchConfig()
    metrics: MetricsConfig = MetricsConfig()
    profile: ProfileConfig = ProfileConfig()

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name
