"""Checks a run's model, data and layout before it starts. Imports neither torch nor Ray."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, assert_never

from megatron_hapo.checkpoint.manifest import quick_faults
from megatron_hapo.checkpoint.model_folder import is_megatron_folder
from megatron_hapo.checkpoint.safetensors_header import shape_faults
from megatron_hapo.checks.cuda_toolkit import compiler_faults
from megatron_hapo.checks.machine import machine_faults, this_machine
from megatron_hapo.config import Config, Fault, FileData, ParallelSizes, Source, TaskData, read_config
from megatron_hapo.config.output_paths import content_faults, folder_fault
from megatron_hapo.config.scorer_names import function_of, is_file, is_own
from megatron_hapo.data.hub_rows import is_hub_name
from megatron_hapo.data.problems import file_faults
from megatron_hapo.data.reasoning_tasks import import_reasoning_gym
from megatron_hapo.errors import ConfigError
from megatron_hapo.model.families import Shape, layout_faults, read_shape
from megatron_hapo.observe.metrics import METRICS_FILE, TENSORBOARD_FOLDER
from megatron_hapo.observe.record_schema import FILE_NAME, FOLDER
from megatron_hapo.resharding.layouts import unsupported_by_engine
from megatron_hapo.sizing import from_config
from megatron_hapo.sizing.memory import (
    GIB,
    EngineMemory,
    Spec,
    TrainerMemory,
    engine_memory,
    trainer_memory,
    turns_on_shared_gpu,
)
from megatron_hapo.sizing.parameters import model_parameters
from megatron_hapo.sizing.search import too_large

_OWN_FOLDERS = ("models", "runs")
"""Folders where the shipped configs expect models and where runs write."""


def load_checked_config(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    writes: bool = True,
    reads_hub: bool = True,
    starts: Literal["all", "engines"] | None = None,
) -> Config:
    """The config of a run, checked against its files, with `parallel: auto` resolved.

    Args:
        writes: whether the run will write into its folder, which is then tried.
        reads_hub: whether this process will read data from the Hub, which is then downloaded.
        starts: which processes will be started on this machine, unless RAY_ADDRESS names a cluster, and must fit it;
            None: not known.

    Raises:
        ConfigError: all faults of the config and of the files at once.
        HapoError: `parallel: auto` found no GPU, or no layout that fits.
    """
    draft = read_config(path, [*overrides, *from_config.automatic_layout(path, overrides)])
    if (config := draft.config) is not None:
        output_faults = [*_output_faults(config)] if writes else []
        draft = draft.with_checks(check_run(config, reads_hub=reads_hub)).with_checks(output_faults)
        if starts is not None and "RAY_ADDRESS" not in os.environ:
            draft = draft.with_checks([*_machine_faults(config, trains=starts == "all")])
    return draft.accept()


def check_run(config: Config, *, reads_hub: bool = True) -> list[Fault]:
    """What is wrong with the model folder, the data, the packages and the layout; empty if nothing is."""
    faults: list[Fault] = []
    try:
        faults += _model_faults(config)
    except OSError as error:  # e.g. no permission to look into the folder
        faults.append(Fault("model.path", f"{config.model.path} cannot be read: {error.strerror}"))
    if config.replay is not None:
        return [*faults, *_replay_faults(config), *_tracker_faults(config)]
    for key, source in config.data.sources:
        if reads_hub or not (isinstance(source, FileData) and any(map(is_hub_name, source.paths))):
            faults += _data_faults(key, source)
    if config.device != "cpu" and from_config.local_gpus():
        faults += _gpu_faults(config)
    return [*faults, *_reward_faults(config), *_tracker_faults(config)]


def _replay_faults(config: Config) -> Iterator[Fault]:
    """Why no records can be replayed from a folder; what is in them is checked when the run starts."""
    folder = config.replay
    assert folder is not None, "there is something to replay"
    try:
        if not folder.is_dir():
            yield Fault("replay", f"no such folder: {folder}")
        elif not any(FILE_NAME.fullmatch(path.name) for path in folder.glob("step_*.parquet")):
            yield Fault("replay", f"{folder} has no records of steps; it must be the folder rollouts of a run")
        elif folder.resolve() == (config.run_dir / FOLDER).resolve():
            yield Fault("replay", f"{folder} is in this run's own folder, which would replace it; set another name")
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        yield Fault("replay", f"{folder} cannot be read: {getattr(error, 'strerror', None) or 'not a usable path'}")


def _tracker_faults(config: Config) -> Iterator[Fault]:
    """Trackers of metrics that are not installed."""
    if config.metrics.wandb_project is not None and not is_installed("wandb"):
        yield Fault("metrics.wandb_project", "wandb is not installed: pip install wandb")


def _machine_faults(config: Config, *, trains: bool) -> Iterator[Fault]:
    """Why this machine cannot hold the run; nothing if its model cannot be read, or does not split over the layout."""
    try:
        shape = read_shape(config.model.path)
    except (ConfigError, OSError):
        return
    if not [*_layout_faults(config, shape)]:
        yield from machine_faults(config, shape, this_machine(), trains=trains)


def _gpu_faults(config: Config) -> Iterator[Fault]:
    """What keeps an engine from starting on this machine's GPUs."""
    if config.device == "auto" and config.rollout.dtype == "float32":
        message = "must be bfloat16 on this machine's GPUs, got float32; device=cpu uses none of them"
        yield Fault("rollout.dtype", message, ("device",))
    yield from (Fault("device", message) for message in compiler_faults())


def _reward_faults(config: Config) -> Iterator[Fault]:
    """Files of the user's own rewards that do not exist; what is in them is checked in a reward worker."""
    for scorer, key in config.reward.used_scorers(config.data).items():
        target, _ = function_of(scorer)
        if is_own(scorer) and is_file(target) and not Path(target).is_file():
            yield Fault(key, f"no such file: {target}")


def _output_faults(config: Config) -> Iterator[Fault]:
    """Why the run folder cannot be written; nothing is left behind."""
    if (fault := folder_fault(config.run_dir)) is not None:
        yield Fault("output_dir", fault, ("name",))
        return
    files, folders = ("config.yaml", METRICS_FILE, "curves.png"), (TENSORBOARD_FOLDER, "checkpoints", "hf", "hf_steps")
    for message in content_faults(config.run_dir, files=files, folders=(*folders, "profile")):
        yield Fault("output_dir", message, ("name",))


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    # A folder of that name in the current directory, such as wandb creates, is found too, but has no origin.
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def _model_faults(config: Config) -> Iterator[Fault]:
    """Why the model folder cannot be used, or does not fit the layout."""
    folder = config.model.path
    if not folder.is_dir():
        yield Fault("model.path", f"no such folder: {folder}{_hub_hint(folder)}")
        return
    if damaged := quick_faults(folder):  # large files are checked by those who load them
        yield from (Fault("model.path", line) for line in damaged)
        return
    if not any(folder.glob("*.safetensors")) and not is_megatron_folder(folder):
        yield Fault("model.path", f"{folder} has no safetensors file")
    if not (folder / "tokenizer_config.json").is_file():
        yield Fault("model.path", f"{folder} has no tokenizer (tokenizer_config.json)")
    try:
        shape = read_shape(folder)
    except ConfigError as error:
        for line in error.faults:
            yield Fault("model.path", line.removeprefix("model.path: "))
        return
    yield from (Fault("model.path", line) for line in shape_faults(folder, shape))
    if config.replay is None and (reason := unsupported_by_engine(shape)) is not None:
        yield Fault("model.path", f"no engine can serve {folder}: {reason}")
    yield from check_layout(config, shape)


def _hub_hint(folder: Path) -> str:
    """What to do if the path was meant as a name on the Hugging Face Hub; empty if it cannot be one."""
    if folder.is_absolute() or len(folder.parts) != 2 or folder.parts[0] in ("..", *_OWN_FOLDERS):
        return ""
    if folder.parent.is_dir():
        return ""
    local = f"models/{folder.name}"
    return f"; to use a model from the Hub: hf download {folder} --local-dir {local}, then model.path={local}"


def check_layout(config: Config, shape: Shape) -> list[Fault]:
    """Why a model of this shape does not split over the layout, or does not fit its GPUs; empty if it does both."""
    return [*_layout_faults(config, shape)] or [*_memory_faults(config, shape)]


def _layout_faults(config: Config, shape: Shape) -> Iterator[Fault]:
    """Sizes of trainer and engines that the model cannot be split over, and responses that are too long for it."""
    parallel = config.parallel
    for name, message in layout_faults(shape, parallel):
        yield Fault(f"parallel.{name}", message, ("model.path",))
    rollout = config.rollout
    # On a GPU SGLang replicates key/value heads over several ranks.
    replicates = config.device != "cpu" and rollout.tp % shape.num_kv_heads == 0
    engine_shape = replace(shape, num_kv_heads=rollout.tp) if replicates else shape
    for name, message in layout_faults(engine_shape, ParallelSizes(tp=rollout.tp, ep=rollout.ep)):
        yield Fault(f"rollout.{name}", message, ("model.path",))
    expert_tp = rollout.tp // rollout.ep
    if shape.moe is not None and expert_tp and shape.moe.ffn_size % expert_tp:
        message = f"tp / ep = {expert_tp} must divide the {shape.moe.ffn_size} feed-forward units of each expert"
        yield Fault("rollout.tp", message, ("model.path",))
    if shape.moe is not None and parallel.tp > 1 and not parallel.sequence_parallel:
        yield Fault(
            "parallel.sequence_parallel",
            f"must be true for a model with experts at parallel.tp={parallel.tp}: Megatron requires it",
            ("model.path", "parallel.tp"),
        )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > shape.max_positions:
        yield Fault(
            "rollout.max_response_tokens",
            f"max_prompt_tokens + max_response_tokens = {longest} is more than the model's {shape.max_positions} "
            "positions (max_position_embeddings in its config.json)",
            ("model.path", "rollout.max_prompt_tokens"),
        )


def _memory_faults(config: Config, shape: Shape) -> Iterator[Fault]:
    """Why trainer or engines do not fit their GPUs; nothing on a CPU, or if the memory of a GPU is unknown."""
    gpu_bytes = from_config.gpu_memory(config)
    if gpu_bytes is None:
        return
    rollout, spec = config.rollout, from_config.spec_here(config)
    trainer = trainer_memory(
        shape,
        from_config.layout_of(config),
        gpu_bytes=gpu_bytes,
        spec=spec,
        bucket_bytes=config.weight_sync.bucket_bytes,
    )
    engine = engine_memory(
        shape,
        tp=rollout.tp,
        gpu_bytes=gpu_bytes,
        memory_fraction=rollout.memory_fraction,
        num_parameters=model_parameters(shape),
        max_running_requests=rollout.max_running_requests,
        bytes_per_element=2 if rollout.dtype == "bfloat16" else 4,
        quantization=rollout.quantization,
    )
    match config.placement:
        case "colocated":
            yield from _shared_gpu_faults(config, trainer, engine, gpu_bytes, spec)
        case "disaggregated":
            if trainer.total > gpu_bytes:
                yield _trainer_fault(config, too_large(trainer, gpu_bytes), spec)
        case _:
            assert_never(config.placement)
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if config.replay is None and engine.kv_tokens < longest:
        yield Fault(
            "rollout.tp",
            f"does not fit: at tp={rollout.tp} the weights take {engine.weights / GIB:.1f} GiB of a GPU of "
            f"{gpu_bytes / GIB:.1f} GiB, which leaves a KV cache of {max(0, engine.kv_tokens)} tokens at "
            f"rollout.memory_fraction={rollout.memory_fraction}; one response can need {longest}",
            ("model.path", "rollout.memory_fraction", "rollout.max_response_tokens"),
        )


def _shared_gpu_faults(
    config: Config, trainer: TrainerMemory, engine: EngineMemory, gpu_bytes: int, spec: Spec
) -> Iterator[Fault]:
    """The first turn on a GPU shared by trainer and engine that does not fit."""
    rollout = config.rollout
    turns = turns_on_shared_gpu(
        trainer,
        engine,
        keeps_optimizer=config.memory_turns.trainer == "gradients",
        keeps_weights=config.memory_turns.engines == "kv_cache",
    )
    training = turns.pop("training")
    turn, needed = max(turns.items(), key=lambda item: item[1])
    if training > gpu_bytes:
        yield _trainer_fault(config, too_large(trainer, gpu_bytes, beside_engine=training - trainer.total), spec)
    elif needed > gpu_bytes:
        yield Fault(
            "rollout.memory_fraction",
            f"does not fit: an engine with {rollout.memory_fraction} of a GPU of {gpu_bytes / GIB:.1f} GiB needs "
            f"{needed / GIB:.1f} GiB together with a resting trainer rank ({turn}); "
            "`megatron-hapo plan --placement colocated` finds a fraction that fits",
            ("model.path", "parallel", "rollout.tp"),
        )


def _trainer_fault(config: Config, reason: str, spec: Spec) -> Fault:
    layers = " without Transformer Engine" if spec == "local" else ""
    # The planner may run on another machine, and assumes Transformer Engine for `auto`.
    command = "plan CONFIG model.spec=local" if layers and config.model.spec == "auto" else "plan"
    return Fault(
        "parallel",
        f"does not fit: a trainer rank{layers} {reason}; `megatron-hapo {command}` finds layouts that fit",
        ("model.path", "model.spec", "trainer", "rollout.max_response_tokens"),
    )


def _data_faults(key: str, source: Source) -> Iterator[Fault]:
    """Why data cannot be read.

    Args:
        key: the setting that names the data, e.g. data.train.
    """
    if isinstance(source, FileData):
        for message in file_faults(source):
            yield Fault(f"{key}.path", message)
    elif isinstance(source, TaskData):
        names = import_reasoning_gym().factory.DATASETS
        if source.name not in names:
            near = difflib.get_close_matches(source.name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield Fault(f"{key}.name", f"reasoning-gym has no dataset {source.name!r}{hint}")
