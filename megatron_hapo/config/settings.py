"""All settings of a run: typed, frozen, and checked together before anything starts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from megatron_hapo.config.algorithm_settings import AlgorithmConfig
from megatron_hapo.config.data_settings import DataConfig, RewardConfig
from megatron_hapo.config.effects import not_with, only_with
from megatron_hapo.config.faults import Fault
from megatron_hapo.config.rollout_settings import (
    SAMPLES,
    AsyncConfig,
    DynamicSamplingConfig,
    EvalConfig,
    MemoryTurnsConfig,
    RolloutConfig,
    WeightSyncConfig,
)
from megatron_hapo.config.section import FilePath, NonNegativeInt, Port, PositiveInt, Seconds, Section, Seed
from megatron_hapo.config.trainer_settings import (
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainerConfig,
)


class CheckpointConfig(Section):
    """What is written while the run trains, and at its end."""

    every: NonNegativeInt = 50
    """Steps between resumable checkpoints; 0: only at the end and on interruption."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep. The disk needs room for one more, which is written before the oldest is
    removed; how much that is, is logged at the start."""
    resume: bool = True
    """Continue from the newest sound checkpoint in the run folder, if there is any; damaged ones are skipped. Settings
    that were changed since are logged, or refused where they cannot change. If false, start over; the first checkpoint
    then replaces those of the previous run."""
    hf_every: NonNegativeInt = 0
    """Steps between exports of the model as a Hugging Face folder (`hf_steps/step_*` in the run folder); 0: none."""
    hf_at_end: bool = True
    """Write the final model as a Hugging Face folder."""


class LaunchConfig(Section):
    """How the processes are started. Under torchrun all but max_restarts is read; without it start_timeout_seconds and
    max_restarts."""

    engines: Literal["trainer_nodes", "own_nodes"] = "trainer_nodes"
    """`trainer_nodes`: engines run on the nodes of the trainer ranks, on GPUs that these leave free (`placement:
    colocated`: on the same GPUs). `own_nodes`: on Ray nodes without trainer ranks, which join with `ray start --address
    HEAD:ray_port` and the same RAY_AUTH_TOKEN."""
    ray_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the Ray head on the first node; 0: any free port. The other nodes learn it from torchrun's rendezvous."""
    ray_worker_ports: tuple[Port, Port] | None = None
    """First and last port for all other connections of Ray, on every node, for use behind a firewall; at least 10 ports
    plus one per engine. `None`: any free ports."""
    start_timeout_seconds: Seconds = 300
    """The run fails if Ray, ranks, nodes or room for the engines take longer to appear. A start of Ray that times out
    on a busy machine is repeated within this time."""
    max_restarts: NonNegativeInt = 3
    """If a trainer rank dies while the run trains, everything is started again, up to this many times, and continues
    from the newest checkpoint (see checkpoint.every). A death during the start ends the run, and so does that of Ray.
    Not read under torchrun, which has --max-restarts."""

    def contradictions(self, *, placement: str, num_engines: int) -> Iterator[Fault]:
        """Why Ray cannot place the engines, or lacks ports for them."""
        if placement == "colocated" and self.engines == "own_nodes":
            yield Fault(
                "launch.engines", "must be trainer_nodes with placement=colocated, got own_nodes", ("placement",)
            )
        ports = self.ray_worker_ports
        if ports is not None and ports[1] - ports[0] + 1 < 10 + num_engines:
            yield Fault(
                "launch.ray_worker_ports",
                f"must span at least {10 + num_engines} ports, from the first to the last, got {list(ports)}",
                ("rollout.engines",),
            )


class MetricsConfig(Section):
    """Where metrics go besides the console, metrics.jsonl and TensorBoard; docs/metrics.md describes them."""

    wandb_project: str | None = None
    """Weights & Biases project that also gets the metrics; needs `pip install wandb`. Its environment variables apply,
    such as WANDB_API_KEY, WANDB_ENTITY and WANDB_MODE=offline. `None`: not used."""


class RecordConfig(Section):
    """What is kept of the responses and their tokens; docs/records.md describes the files."""

    every: NonNegativeInt = 10
    """Steps between files of records (`rollouts/step_*.parquet` in the run folder); 0: none. Evaluations are recorded
    whenever they run, unless this is 0."""
    groups: Annotated[PositiveInt | None, not_with("record.every", 0)] = 16
    """Number of groups in a file, the first of the step or evaluation; `None`: all."""
    keep: Annotated[PositiveInt, not_with("record.every", 0)] = 100
    """Number of newest files to keep."""
    max_gigabytes: Annotated[float, Field(gt=0, le=1e6), not_with("record.every", 0)] = 10.0
    """The oldest files are removed while all of them together are larger, in 10^9 bytes; the newest always stays."""


class ProfileConfig(Section):
    """Where the time of a step goes; see docs/profiling.md."""

    steps: tuple[PositiveInt, ...] = ()
    """Steps to trace into `profile/step_*` of the run folder: the operators of every trainer rank, and the whole step
    over all processes. Traced steps take longer."""

    def contradictions(self, *, last_step: int) -> Iterator[Fault]:
        """Steps that the run does not have."""
        if beyond := [step for step in self.steps if step > last_step]:
            yield Fault("profile.steps", f"must be steps of the run, 1 to steps={last_step}, got {beyond}", ("steps",))


def _folder_name(name: str) -> str:
    if name in (".", "..") or len(name.encode()) > 200:
        raise PydanticCustomError("folder_name", "must be the name of a folder, of at most 200 bytes, and not . or ..")
    return name


class Config(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$"), AfterValidator(_folder_name)]
    """Name of the run; its folder is `output_dir/name`."""
    output_dir: FilePath = Path("runs")
    """Where the folders of runs are."""
    seed: Seed = 0
    """Seed of everything random in the run."""
    steps: PositiveInt
    """Number of steps to train."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`cpu`: everything runs on CPUs. `cuda`: on GPUs. `auto`: cuda if a GPU is visible, else cpu."""
    deterministic: bool = False
    """Make a run on CPUs the same to the last bit as another one with these settings, also if it was interrupted and
    resumed, or engines were restarted, and if generation runs beside training: each step then trains on tokens that are
    exactly async.max_staleness steps old. On GPUs it sets what SGLang, Megatron and torch offer. docs/deterministic.md
    says what is left, and what it costs."""
    replay: FilePath | None = None
    """Folder with the records of another run, e.g. `runs/NAME/rollouts`: every step trains on the responses and rewards
    in them, without engines and reward workers, and nothing is evaluated. docs/records.md says what the recorded run
    needs. data, reward and algorithm.adaptive_temperature are not read. `None`: responses are sampled."""
    placement: Annotated[Literal["disaggregated", "colocated"], SAMPLES] = "disaggregated"
    """`disaggregated`: trainer ranks and engines have their own GPUs. `colocated`: engine i runs on the GPUs of trainer
    ranks i * rollout.tp and following, and they take turns holding the memory (memory_turns)."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    trainer: TrainerConfig = TrainerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    dynamic_sampling: Annotated[DynamicSamplingConfig, SAMPLES] = DynamicSamplingConfig()
    async_: Annotated[AsyncConfig, SAMPLES] = Field(AsyncConfig(), alias="async")  # Python reserves the word
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    eval: Annotated[EvalConfig, not_with("data.eval", None), SAMPLES] = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    weight_sync: Annotated[WeightSyncConfig, SAMPLES] = WeightSyncConfig()
    memory_turns: Annotated[MemoryTurnsConfig, only_with("placement", "colocated"), SAMPLES] = MemoryTurnsConfig()
    launch: LaunchConfig = LaunchConfig()
    metrics: MetricsConfig = MetricsConfig()
    record: RecordConfig = RecordConfig()
    profile: ProfileConfig = ProfileConfig()

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.output_dir / self.name

    def contradictions(self) -> Iterator[Fault]:
        """Settings that are valid on their own and cannot work together."""
        yield from self.batch.contradictions(advantage=self.algorithm.advantage)
        yield from self.parallel.contradictions()
        yield from self.trainer.contradictions()
        yield from self.optimizer.contradictions(device=self.device, trainer=self.trainer, steps=self.steps)
        yield from self.algorithm.contradictions(cp=self.parallel.cp)
        yield from self.data.contradictions()
        yield from self.profile.contradictions(last_step=self.steps)
        if self.replay is None:
            yield from self._sampling_contradictions()

    def _sampling_contradictions(self) -> Iterator[Fault]:
        """Settings of what a replay does not do."""
        yield from self.rollout.contradictions(device=self.device)
        yield from self.async_.contradictions(
            placement=self.placement, correction_level=self.algorithm.importance_correction.level
        )
        yield from self.reward.contradictions(max_response_tokens=self.rollout.max_response_tokens, data=self.data)
        yield from self.eval.contradictions(self.data, max_response_tokens=self.rollout.max_response_tokens)
        yield from self.launch.contradictions(placement=self.placement, num_engines=self.rollout.engines)
        yield from self._colocation_faults()
        if self.rollout.quantization != "none":
            yield from self._quantization_faults()
        if self.deterministic:
            yield from self._deterministic_faults()

    def _quantization_faults(self) -> Iterator[Fault]:
        """What does not work with engines that quantize the weights."""
        given = f"rollout.quantization={self.rollout.quantization}"
        if self.weight_sync.method == "gather":
            yield Fault(
                "weight_sync.method",
                f"must be direct with {given}, got gather: SGLang cannot load whole tensors over quantized ones",
                ("rollout.quantization",),
            )
        if self.trainer.quantization != "none":
            yield Fault(
                "trainer.quantization",
                f"must be none with {given}, got {self.trainer.quantization}: the engines would round its weights, "
                "which have one scale per matrix, a second time",
                ("rollout.quantization",),
            )

    def _deterministic_faults(self) -> Iterator[Fault]:
        """What would depend on time, or on others."""
        if self.async_.max_staleness and self.weight_sync.in_flight != "finish":
            yield Fault(
                "weight_sync.in_flight",
                f"must be finish with deterministic=true, got {self.weight_sync.in_flight}: how far responses are when "
                "the weights change depends on time",
                ("deterministic",),
            )
        if self.async_.stale_groups == "drop":
            yield Fault(
                "async.stale_groups",
                "must be wait with deterministic=true, got drop: which groups finish too late depends on time",
                ("deterministic",),
            )
        if self.device == "cpu" and self.rollout.tp > 2:
            yield Fault(
                "rollout.tp",
                f"must be 1 or 2 with deterministic=true and device=cpu, got {self.rollout.tp}: the order in which "
                "gloo adds the numbers of more ranks depends on how many requests run together; use more engines",
                ("deterministic", "device"),
            )
        if self.reward.judges:
            yield Fault(
                "reward.judges",
                f"must be empty with deterministic=true, got {', '.join(self.reward.judges)}: a served model need not "
                "answer the same twice",
                ("deterministic",),
            )

    def _colocation_faults(self) -> Iterator[Fault]:
        rollout, world_size = self.rollout, self.parallel.world_size
        if self.placement == "colocated" and rollout.engines * rollout.tp > world_size:
            yield Fault(
                "rollout.engines",
                f"rollout.engines * rollout.tp must be at most the {world_size} trainer ranks (parallel.tp * pp * cp * "
                f"dp) with placement=colocated, got {rollout.engines} * {rollout.tp}",
                ("placement", "rollout.tp", "parallel"),
            )
