"""`megatron-hapo plan`: from its arguments to ranked layouts."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_hapo.config import BatchConfig, Config, RolloutConfig, load_config, merge, parse_bytes, settings_of
from megatron_hapo.errors import HapoError
from megatron_hapo.model.families import Shape, read_shape
from megatron_hapo.sizing.from_config import (
    MEAN_OVER_MAX,
    MEAN_PROMPT_TOKENS,
    STAND_INS,
    is_automatic,
    limits_of,
    recompute_choices,
    workload_of,
)
from megatron_hapo.sizing.search import Cluster, Limits, search
from megatron_hapo.sizing.tables import plans_as_json, print_plans
from megatron_hapo.sizing.throughput import GPUS, Workload
from megatron_hapo.sizing.written import write_plan

ASSUMED_LAYERS = "Layers: Transformer Engine's are assumed; with a CONFIG model.spec=local plans for torch's."
"""Whether `model.spec: auto` finds the package is known on the machines of the run only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `plan` takes."""
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="YAML file of a run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that replace the file's"
    )
    parser.add_argument(
        "--model", type=Path, metavar="HF_CONFIG", help="model folder or config.json; replaces the config's model.path"
    )
    parser.add_argument("--gpus", type=int, help="GPUs of trainer and engines together (default: CONFIG's)")
    parser.add_argument("--gpu-memory", help="memory of one GPU (default: CONFIG's parallel.gpu_memory, else 80GiB)")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="for its rates (default: %(default)s)")
    parser.add_argument("--nvlink-size", type=int, default=8, help="GPUs of an NVLink domain (default: %(default)s)")
    parser.add_argument(
        "--placement", choices=("disaggregated", "colocated"),
        help="GPUs of their own for trainer and engines, or the same in turn (default: the config's)",
    )  # fmt: skip
    parser.add_argument("--max-prompt", type=int, help="tokens; replaces the config's")
    parser.add_argument("--max-response", type=int, help="tokens; replaces the config's")
    parser.add_argument("--mean-response", type=float, help="expected tokens; default: a quarter of the longest")
    parser.add_argument("--top", type=int, default=8, help="plans to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the best plan as a config on top of CONFIG")


def run(arguments: argparse.Namespace) -> None:
    """Print the plans.

    Raises:
        HapoError: what was asked for cannot be planned, or nothing fits.
    """
    if arguments.config is None and arguments.model is None:
        raise HapoError("plan: name a CONFIG or a model with --model")
    for name in ("gpus", "nvlink_size", "top", "max_prompt", "max_response", "mean_response"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            raise HapoError(f"--{name.replace('_', '-')}: must be at least 1, got {given:g}")
    config, gpus = _config_and_gpus(arguments)
    shape = shape_at(arguments.model or config.model.path)  # type: ignore[union-attr]  # one of the two is there
    try:
        gpu_bytes = parse_bytes(arguments.gpu_memory or (config and config.parallel.gpu_memory) or "80GiB")
    except ValueError as error:
        raise HapoError(f"--gpu-memory: {error}") from None
    cluster = Cluster(
        gpus=gpus, gpu_bytes=gpu_bytes, gpu=GPUS[arguments.gpu], nvlink_size=arguments.nvlink_size,
        placement=arguments.placement or ("disaggregated" if config is None else config.placement),
    )  # fmt: skip
    limits = Limits(max_cp=8, recompute=recompute_choices()) if config is None else limits_of(config)
    workload = _workload(config, arguments)
    if workload.longest > shape.max_positions:
        raise HapoError(
            f"prompt and response of {workload.longest} tokens are more than the model's {shape.max_positions} "
            "positions; lower --max-response"
        )
    if workload.mean_response_tokens > workload.max_response_tokens:
        raise HapoError(
            f"--mean-response: {workload.mean_response_tokens:g} tokens are more than the longest response of "
            f"{workload.max_response_tokens}"
        )
    plans, rejections = search(shape, workload, cluster, limits)
    if arguments.write is not None:  # first: whoever reads the tables may stop in their midst
        write_plan(plans, arguments.write, base=arguments.config, asked=_asked(arguments), cluster=cluster)
    if arguments.json:
        print(plans_as_json(plans, rejections, top=arguments.top, spec=limits.spec))
    else:
        note = ASSUMED_LAYERS if config is None or config.model.spec == "auto" else None
        print_plans(plans, rejections, cluster, top=arguments.top, note=note)


def _config_and_gpus(arguments: argparse.Namespace) -> tuple[Config | None, int]:
    """The config to plan for, and the GPUs: by default those that its own layout takes."""
    if arguments.config is None:
        if arguments.gpus is None:
            raise HapoError("--gpus: is needed without a CONFIG")
        return None, arguments.gpus
    automatic = is_automatic(arguments.config, arguments.overrides)
    if automatic and arguments.gpus is None:
        raise HapoError(f"--gpus: is needed, {arguments.config} says parallel: auto")
    config = load_config(arguments.config, [*arguments.overrides, *(STAND_INS if automatic else ())])
    engines = 0 if config.placement == "colocated" else config.rollout.engines * config.rollout.tp
    return config, arguments.gpus or config.parallel.world_size + engines


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line replaces of the config, as settings."""
    asked = settings_of(arguments.overrides)
    lengths = {"max_prompt_tokens": arguments.max_prompt, "max_response_tokens": arguments.max_response}
    given = {name: length for name, length in lengths.items() if length is not None}
    if given:
        asked = merge(asked, {"rollout": given})
    if arguments.gpu_memory is not None:
        asked = merge(asked, {"parallel": {"gpu_memory": arguments.gpu_memory}})
    if arguments.model is not None:
        # A config names the folder.
        model = arguments.model.parent if arguments.model.name == "config.json" else arguments.model
        asked = merge(asked, {"model": {"path": str(model)}})
    return asked


def shape_at(path: Path) -> Shape:
    """The shape of a model folder, or of a config.json under any name."""
    if not path.is_file():
        return read_shape(path)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / "config.json")
        return read_shape(Path(folder))


def _workload(config: Config | None, arguments: argparse.Namespace) -> Workload:
    rollout, batch = RolloutConfig(), BatchConfig()
    if config is not None:
        rollout, batch = config.rollout, config.batch
    lengths = {
        "max_prompt_tokens": arguments.max_prompt or rollout.max_prompt_tokens,
        "max_response_tokens": arguments.max_response or rollout.max_response_tokens,
    }
    mean = arguments.mean_response or MEAN_OVER_MAX * lengths["max_response_tokens"]
    if config is not None:
        config = config.model_copy(update={"rollout": rollout.model_copy(update=lengths)})
        return workload_of(config, mean_response_tokens=mean)
    return Workload(
        prompts_per_step=batch.prompts_per_step,
        samples_per_prompt=batch.samples_per_prompt,
        prompts_per_minibatch=batch.prompts_per_minibatch,
        mean_prompt_tokens=min(MEAN_PROMPT_TOKENS, lengths["max_prompt_tokens"]),
        mean_response_tokens=mean,
        **lengths,
    )
