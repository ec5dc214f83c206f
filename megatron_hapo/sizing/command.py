"""The command `megatron-hapo plan`: ranks layouts for a config or a model."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from megatron_hapo.config import BatchConfig, Config, RolloutConfig, load_config, merge, parse_bytes, settings_of
from megatron_hapo.config.section import MAX_RANKS, path_fault
from megatron_hapo.errors import HapoError
from megatron_hapo.model.families import Shape, read_model_config, read_shape, shape_of
from megatron_hapo.sizing.from_config import (
    MEAN_OVER_MAX,
    MEAN_PROMPT_TOKENS,
    PLACEHOLDERS,
    is_automatic,
    limits_of,
    workload_of,
)
from megatron_hapo.sizing.plan_file import write_plan
from megatron_hapo.sizing.search import Cluster, Limits, search
from megatron_hapo.sizing.tables import plans_as_json, print_plans
from megatron_hapo.sizing.throughput import GPUS, Workload

ASSUMED_LAYERS = "Layers: Transformer Engine is assumed; model.spec=local plans for torch layers (needs a CONFIG)."
"""`model.spec: auto` looks for the package on the machines of the run, which the planner cannot see."""


_LIMITS = {"gpus": 2 * MAX_RANKS, "nvlink_size": MAX_RANKS, "top": 10_000}
_LONGEST = 2**31 - 1


def path_argument(text: str) -> Path:
    """The type of a command line argument that is a path.

    Raises:
        argparse.ArgumentTypeError: no file can have this path.
    """
    if (fault := path_fault(text)) is not None:
        raise argparse.ArgumentTypeError(fault)
    return Path(text)


def whole_number(text: str) -> int:
    """The type of an argument that is a whole number.

    Raises:
        argparse.ArgumentTypeError: it is none, or has more than 20 digits.
    """
    if re.fullmatch(r"-?[0-9]{1,20}", text) is None:
        raise argparse.ArgumentTypeError(f"must be a whole number of at most 20 digits, got {text[:50]!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan` to its parser."""
    parser.add_argument("config", type=path_argument, nargs="?", metavar="CONFIG", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings that override the file")
    parser.add_argument(
        "--model",
        type=path_argument,
        metavar="HF_CONFIG",
        help="model folder or config.json; overrides the config's model.path",
    )
    parser.add_argument("--gpus", type=whole_number, help="total GPUs of trainer and engines (default: CONFIG's)")
    parser.add_argument("--gpu-memory", help="memory of one GPU (default: CONFIG's parallel.gpu_memory, else 80GiB)")
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), default="h100", help="GPU model, for its peak rates (default: %(default)s)"
    )
    parser.add_argument(
        "--nvlink-size", type=whole_number, default=8, help="GPUs per NVLink domain (default: %(default)s)"
    )
    parser.add_argument(
        "--placement", choices=("disaggregated", "colocated"),
        help="separate GPUs for trainer and engines, or shared in turns (default: the config's)",
    )  # fmt: skip
    parser.add_argument("--max-prompt", type=whole_number, help="longest prompt in tokens; overrides the config")
    parser.add_argument("--max-response", type=whole_number, help="longest response in tokens; overrides the config")
    parser.add_argument(
        "--mean-response", type=float, help="expected mean in tokens (default: a quarter of the longest)"
    )
    parser.add_argument("--top", type=whole_number, default=8, help="number of plans to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--write", type=path_argument, metavar="FILE", help="write the best plan as a config that builds on CONFIG"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the plans, and write the best one if asked to.

    Raises:
        HapoError: the arguments are invalid, or nothing fits.
    """
    _check(arguments)
    config, gpus = _config_and_gpus(arguments)
    shape = shape_at(arguments.model or config.model.path)  # type: ignore[union-attr]  # one of the two is there
    cluster = Cluster(
        gpus=gpus, gpu_bytes=_gpu_bytes(config, arguments), gpu=GPUS[arguments.gpu],
        nvlink_size=arguments.nvlink_size,
        placement=arguments.placement or ("disaggregated" if config is None else config.placement),
    )  # fmt: skip
    limits = Limits(max_cp=8) if config is None else limits_of(config)
    workload = _workload(config, arguments)
    _check_lengths(workload, shape)
    plans, rejections = search(shape, workload, cluster, limits)
    if arguments.write is not None:  # before printing, since a reader such as `head` may close the pipe
        write_plan(plans[0], arguments.write, base=arguments.config, asked=_asked(arguments), cluster=cluster)
    if arguments.json:
        print(plans_as_json(plans, rejections, top=arguments.top, spec=limits.spec))
    else:
        note = ASSUMED_LAYERS if config is None or config.model.spec == "auto" else None
        print_plans(plans, rejections, cluster, top=arguments.top, note=note)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.config is None and arguments.model is None:
        raise HapoError("plan: needs a CONFIG or --model")
    for name in ("gpus", "nvlink_size", "top", "max_prompt", "max_response", "mean_response"):
        given, limit = getattr(arguments, name), _LIMITS.get(name, _LONGEST)
        if given is not None and not 1 <= given <= limit:
            allowed = f"at most {limit}, got {str(given)[:50]}" if given > limit else f"at least 1, got {given:g}"
            raise HapoError(f"--{name.replace('_', '-')}: must be {allowed}")


def _check_lengths(workload: Workload, shape: Shape) -> None:
    if workload.longest > shape.max_positions:
        raise HapoError(
            f"the longest prompt and response together have {workload.longest} tokens, more than the model's "
            f"{shape.max_positions} positions; lower --max-response"
        )
    if workload.mean_response_tokens > workload.max_response_tokens:
        raise HapoError(
            f"--mean-response: must be at most the longest response of {workload.max_response_tokens} tokens, got "
            f"{workload.mean_response_tokens:g}"
        )


def _gpu_bytes(config: Config | None, arguments: argparse.Namespace) -> int:
    try:
        return parse_bytes(arguments.gpu_memory or (config and config.parallel.gpu_memory) or "80GiB")
    except ValueError as error:
        raise HapoError(f"--gpu-memory: {error}") from None


def _config_and_gpus(arguments: argparse.Namespace) -> tuple[Config | None, int]:
    """The config to plan for, and the number of GPUs, by default that of the config's own layout."""
    if arguments.config is None:
        if arguments.gpus is None:
            raise HapoError("--gpus: is required without a CONFIG")
        return None, arguments.gpus
    automatic = is_automatic(arguments.config, arguments.overrides)
    if automatic and arguments.gpus is None:
        raise HapoError(f"--gpus: is required, because {arguments.config} has parallel: auto")
    config = load_config(arguments.config, [*arguments.overrides, *(PLACEHOLDERS if automatic else ())])
    engines = 0 if config.placement == "colocated" else config.rollout.engines * config.rollout.tp
    return config, arguments.gpus or config.parallel.world_size + engines


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line overrides, as sections of a config."""
    asked = settings_of(arguments.overrides)
    lengths = {"max_prompt_tokens": arguments.max_prompt, "max_response_tokens": arguments.max_response}
    given = {name: length for name, length in lengths.items() if length is not None}
    if given:
        asked = merge(asked, {"rollout": given})
    if arguments.gpu_memory is not None:
        asked = merge(asked, {"parallel": {"gpu_memory": arguments.gpu_memory}})
    if arguments.model is not None:
        # The setting is a folder.
        model = arguments.model.parent if arguments.model.name == "config.json" else arguments.model
        asked = merge(asked, {"model": {"path": str(model)}})
    return asked


def shape_at(path: Path) -> Shape:
    """The shape of a model, from its folder or from a config.json of any file name."""
    return shape_of(read_model_config(path)) if path.is_file() else read_shape(path)


def _workload(config: Config | None, arguments: argparse.Namespace) -> Workload:
    """The work of one step, from the arguments, the config and defaults, in this order."""
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
