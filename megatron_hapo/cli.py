"""The command line. A command imports heavy packages itself, after its config has been checked."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from megatron_hapo.config.section import MAX_RANKS
from megatron_hapo.errors import HapoError, one_line
from megatron_hapo.private_folder import keep_compile_cache
from megatron_hapo.sizing.command import add_arguments as add_plan_arguments
from megatron_hapo.sizing.command import path_argument, whole_number
from megatron_hapo.sizing.command import run as plan_command

type _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_FAULT = 2
"""The run cannot work as requested: a fault in the config, the data or a part of the run, reported in one line."""
EXIT_INTERRUPTED = 130
"""The exit code that a shell reports for a process interrupted by Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Unexpected errors keep their traceback."""
    arguments = _parse(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("megatron_hapo").setLevel(logging.INFO)
    keep_compile_cache()
    try:
        arguments.run(arguments)
    except HapoError as error:
        for line in str(error).splitlines():
            print(one_line(line), file=sys.stderr)
        return EXIT_FAULT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of one command. key=value arguments may also follow options, which argparse does not support."""
    parser = _parser()
    arguments, others = parser.parse_known_args(argv)
    if others and ("overrides" not in arguments or any(argument.startswith("-") for argument in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        arguments.overrides = [*arguments.overrides, *others]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-hapo", description="HAPO reinforcement learning at Megatron scale")
    parser.add_argument("--version", action="version", version=f"megatron-hapo {version('megatron-hapo')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    init = commands.add_parser(
        "init",
        help="write a first job, ready to run",
        description="Write data, a reward, a config and a small model into a new folder; each can be replaced by your "
        "own.",
    )
    init.add_argument("folder", type=path_argument, metavar="FOLDER", help="new folder")
    init.set_defaults(run=_init)

    completion = commands.add_parser(
        "completion",
        help="print a script for shell completion",
        description='Print a script for shell completion. In ~/.bashrc: eval "$(megatron-hapo completion bash)"',
    )
    completion.add_argument("shell", choices=["bash", "zsh"])
    completion.set_defaults(run=_completion)

    train = commands.add_parser("train", help="train a model", description="Check a config, then train.")
    _add_config(train)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check and print the whole job, with its processes and their memory, and start nothing",
    )
    train.set_defaults(run=_train)

    check = commands.add_parser(
        "check",
        help="rehearse a run",
        description="Check a config, start every part of its run and use each part once. Nothing is trained.",
    )
    _add_config(check)
    check.add_argument(
        "--prompts", type=_up_to(100_000), default=8, help="number of prompts to try (default: %(default)s)"
    )
    check.set_defaults(run=_check)

    evaluation = commands.add_parser(
        "eval",
        help="measure the accuracy of one or more models",
        description="Evaluate model folders on the data.eval of a config, with the settings in eval. Every response is "
        "written to a file; an interrupted evaluation goes on where it stopped.",
    )
    _add_config(evaluation)
    evaluation.add_argument(
        "--model",
        action="append",
        default=[],
        type=path_argument,
        metavar="FOLDER",
        help="model to evaluate instead of model.path, or a run's folder hf_steps; given several times, the models are "
        "compared with the first",
    )
    evaluation.add_argument(
        "--output",
        type=path_argument,
        metavar="FOLDER",
        help="where the responses go (default: eval in the run folder)",
    )
    evaluation.set_defaults(run=_eval)

    _add_generate(commands)
    _add_score(commands)
    _add_convert(commands)
    _add_quantize(commands)

    plan = commands.add_parser(
        "plan",
        help="choose a layout",
        description="Show which layouts fit, how fast they would be, and why the others do not fit.",
    )
    add_plan_arguments(plan)
    plan.set_defaults(run=plan_command)

    report = commands.add_parser(
        "report",
        help="draw the curves of one or more runs",
        description="Draw the curves of one or more runs into one picture.",
    )
    report.add_argument(
        "run_dirs", nargs="+", type=path_argument, metavar="RUN_DIR", help="folder of a run, e.g. runs/demo_cpu"
    )
    report.add_argument("--html", action="store_true", help="also write an interactive page: report.html")
    report.add_argument("--watch", action="store_true", help="draw again whenever a run has made a step, until Ctrl-C")
    report.set_defaults(run=_report)
    _add_view(commands)

    compare = commands.add_parser(
        "compare",
        help="train several methods on one job, and compare them",
        description="Run the methods, settings and seeds of an experiment, and write tables, a figure and RESULTS.md "
        "into its folder. A second call goes on where the first one stopped.",
    )
    compare.add_argument("experiment", type=path_argument, metavar="EXPERIMENT", help="YAML file of an experiment")
    compare.add_argument(
        "--commands",
        action="store_true",
        help="print the commands of the runs that are not finished, to start them elsewhere, and run nothing",
    )
    compare.set_defaults(run=_compare)
    return parser


def _add_view(commands: _Commands) -> None:
    view = commands.add_parser(
        "view",
        help="look at the recorded responses of one or more runs, token by token",
        description="Write static pages that show the recorded responses of one or more runs.",
    )
    view.add_argument(
        "run_dirs", nargs="+", type=path_argument, metavar="RUN", help="folder of a run that records responses"
    )
    where = view.add_mutually_exclusive_group()
    where.add_argument(
        "--out",
        type=path_argument,
        metavar="FOLDER",
        help="where the pages go (default: view in the first run's folder)",
    )
    where.add_argument(
        "--serve",
        action="store_true",
        help="write nothing; serve the pages on this machine and read the records when a page needs them",
    )
    view.set_defaults(run=_view)


def _add_generate(commands: _Commands) -> None:
    generate = commands.add_parser(
        "generate",
        help="only sample and score",
        description="Sample responses to every training prompt of a config once, and score them, without training. The "
        "responses are written as records, which `view` shows and `train ... replay=FOLDER/rollouts` trains on; an "
        "interrupted generation goes on where it stopped.",
    )
    _add_config(generate)
    generate.add_argument(
        "--prompts", type=_up_to(2**31 - 1), help="only the first so many prompts (default: all of data.train)"
    )
    generate.add_argument(
        "--out",
        type=path_argument,
        metavar="FOLDER",
        help="where the records go, as FOLDER/rollouts (default: generated in the run folder)",
    )
    generate.set_defaults(run=_generate)


def _add_score(commands: _Commands) -> None:
    score = commands.add_parser(
        "score",
        help="score a file of responses",
        description="Score the responses of a JSONL file by the rewards of a config. No model is needed.",
    )
    score.add_argument("config", type=path_argument, metavar="CONFIG", help="YAML file with the settings of rewards")
    score.add_argument(
        "file", type=path_argument, metavar="FILE", help="JSONL: response, ground_truth, data_source, other columns"
    )
    score.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings that override CONFIG")
    score.add_argument(
        "--output", type=path_argument, metavar="FILE", help="write each row with its reward and the reward's parts"
    )
    score.set_defaults(run=_score)


def _add_convert(commands: _Commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="convert a Hugging Face folder to a Megatron checkpoint, or back",
        description="Convert the weights of a model.",
    )
    directions = convert.add_subparsers(title="directions", required=True, metavar="DIRECTION", dest="direction")
    for direction, source, target in (
        ("hf-to-megatron", "Hugging Face model folder", "Megatron checkpoint (torch_dist, loads at any layout)"),
        (
            "megatron-to-hf",
            "converted model, or checkpoint of a run (runs/NAME/checkpoints/step_*)",
            "Hugging Face folder",
        ),
    ):
        parser = directions.add_parser(direction, help=f"write a {target}")
        parser.add_argument("source", type=path_argument, metavar="SRC", help=source)
        parser.add_argument("target", type=path_argument, metavar="DST", help=f"folder to write: {target}")
        for axis in ("tp", "pp", "ep"):
            parser.add_argument(
                f"--{axis}", type=_up_to(MAX_RANKS), default=1, help=f"{axis} size of the processes that convert"
            )
        parser.add_argument(
            "--dtype",
            choices=["float32", "bfloat16", "float16"],
            help="dtype of the written weights (default: as in SRC)",
        )
        parser.add_argument("--verify", action="store_true", help="compare the logits of SRC and DST")
        parser.set_defaults(run=_convert)


def _add_quantize(commands: _Commands) -> None:
    quantize = commands.add_parser(
        "quantize",
        help="write a quantized copy of a model for serving",
        description="Quantize a model with nvidia-modelopt into a folder that SGLang can serve, and compare the two.",
    )
    quantize.add_argument(
        "source", type=path_argument, metavar="SRC", help="Hugging Face folder or Megatron checkpoint"
    )
    quantize.add_argument("target", type=path_argument, metavar="DST", help="folder to write")
    quantize.add_argument("--format", choices=["fp8", "int8", "nvfp4"], required=True, help="nvfp4 needs a GPU")
    quantize.add_argument(
        "--calibration",
        type=path_argument,
        required=True,
        metavar="DATA",
        help="Parquet or JSONL file with prompts, as for training",
    )
    quantize.set_defaults(run=_quantize)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=path_argument, metavar="CONFIG", help="YAML file, e.g. configs/demo_cpu.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings that override the file, e.g. optimizer.lr=1e-6",
    )


def _init(arguments: argparse.Namespace) -> None:
    from megatron_hapo.data.new_job import write_job

    write_job(arguments.folder)
    print(f"next: cd {shlex.quote(str(arguments.folder))} && megatron-hapo train config.yaml")


def _train(arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        _dry_run(arguments)
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from megatron_hapo.launch.torchrun.torchrun_rank import train

        train(arguments.config, arguments.overrides)
        return
    from megatron_hapo.checks.preflight import load_checked_config

    config = load_checked_config(arguments.config, arguments.overrides, starts="all")

    from megatron_hapo.launch.run import run_training

    run_training(config)


def _dry_run(arguments: argparse.Namespace) -> None:
    from megatron_hapo.checks.dry_run import dry_run
    from megatron_hapo.checks.machine import this_machine
    from megatron_hapo.checks.preflight import load_checked_config
    from megatron_hapo.model.families import read_shape

    config = load_checked_config(arguments.config, arguments.overrides, writes=False)
    print(dry_run(config, read_shape(config.model.path), this_machine()), end="")


def _check(arguments: argparse.Namespace) -> None:
    from megatron_hapo.checks.preflight import load_checked_config

    config = load_checked_config(arguments.config, arguments.overrides, writes=False, starts="all")

    from megatron_hapo.launch.run import run_check

    findings = run_check(config, prompts=arguments.prompts)
    for finding in findings:
        print(f"{finding.verdict + ':':<9} {finding.message}")
    if any(finding.verdict == "fault" for finding in findings):
        raise HapoError(f"{arguments.config}: this run would fail")


def _eval(arguments: argparse.Namespace) -> None:
    from megatron_hapo.checks.evaluated_models import check_output, evaluated_configs

    configs = evaluated_configs(arguments.config, arguments.overrides, arguments.model)
    output = arguments.output or next(iter(configs.values())).run_dir / "eval"
    check_output(output)

    from megatron_hapo.launch.evaluate_models import run_evaluations, write_summary
    from megatron_hapo.rollout.eval_table import as_json, compare, print_table
    from megatron_hapo.rollout.evaluation import evaluation_metrics

    with _progress():
        evaluated = run_evaluations(configs, output)
    results = compare(evaluated)
    print_table(results)
    if len(evaluated) == 1:
        for name, value in evaluation_metrics(*evaluated.values()).items():
            print(f"{name + ':':<21} {value:.4g}")
    write_summary(output / "summary.json", as_json(results))
    print(f"responses and summary.json: {output}")


def _compare(arguments: argparse.Namespace) -> None:
    from megatron_hapo.config.experiment import plan_runs, read_experiment

    experiment = read_experiment(arguments.experiment)
    runs = plan_runs(experiment, arguments.experiment)

    from rich.console import Console

    from megatron_hapo.launch.compare.results import write_results
    from megatron_hapo.launch.compare.runs import is_finished, run_all

    if arguments.commands:
        for run in runs:
            if not is_finished(run):
                print(shlex.join(["megatron-hapo", "train", str(run.file)]))
        return
    try:
        run_all(runs, parallel=experiment.parallel, console=Console(stderr=True))
    except HapoError:
        with contextlib.suppress(HapoError):  # what is finished can be looked at already
            print(write_results(experiment, runs))
        raise
    print(write_results(experiment, runs))


def _generate(arguments: argparse.Namespace) -> None:
    from megatron_hapo.checks.evaluated_models import check_output, generating_config

    config = generating_config(arguments.config, arguments.overrides)
    output = arguments.out or config.run_dir / "generated"
    check_output(output)

    from megatron_hapo.launch.generate import run_generation

    with _progress():
        summary = run_generation(config, output, prompts=arguments.prompts)
    for name, value in vars(summary).items():
        print(f"{name + ':':<11} {value:.4g}" if isinstance(value, float) else f"{name + ':':<11} {value}")
    print(f"responses: {output}")


def _progress() -> contextlib.AbstractContextManager[object]:
    """Shows the running stages on stderr: the results go to stdout."""
    from rich.console import Console

    from megatron_hapo.observe.progress_display import showing_progress

    return showing_progress(Console(stderr=True))


def _score(arguments: argparse.Namespace) -> None:
    from megatron_hapo.config import load_config
    from megatron_hapo.reward.score_file import score_file

    config = load_config(arguments.config, arguments.overrides)
    scored = score_file(config, arguments.file)
    for name, value in scored.summary().items():
        print(f"{name + ':':<21} {value:.4g}")
    if arguments.output is not None:
        try:
            arguments.output.write_text("".join(f"{line}\n" for line in scored.lines()))
        except OSError as error:
            raise HapoError(f"{arguments.output}: cannot be written: {error.strerror}") from None
        print(arguments.output)


def _up_to(limit: int) -> Callable[[str], int]:
    """The type of an argument that must be a whole number from 1 to a limit."""

    def convert(text: str) -> int:
        number = whole_number(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text[:50]!r}")
        if number > limit:
            raise argparse.ArgumentTypeError(f"must be at most {limit}, got {number}")
        return number

    return convert


def _convert(arguments: argparse.Namespace) -> None:
    from megatron_hapo.checkpoint.convert import Conversion, convert

    settings = {name: value for name, value in vars(arguments).items() if name != "run"}
    convert(Conversion(**settings))
    print(arguments.target)


def _quantize(arguments: argparse.Namespace) -> None:
    from megatron_hapo.checkpoint.quantize import Quantization, quantize

    settings = {name: value for name, value in vars(arguments).items() if name != "run"}
    agreement = quantize(Quantization(**settings))
    print(
        f"KL {agreement.kl:.3g} nats per token, greedy agreement {agreement.greedy:.1%} "
        f"({agreement.num_prompts} held-out prompts, {agreement.num_tokens} tokens)"
    )
    print(arguments.target)


def _completion(arguments: argparse.Namespace) -> None:
    from megatron_hapo.completion import completion_script

    print(completion_script(_parser(), arguments.shell))


def _report(arguments: argparse.Namespace) -> None:
    from megatron_hapo.observe.report import write_report
    from megatron_hapo.observe.report_page import watch, write_report_page

    def draw(*, live: bool) -> list[Path]:
        pages = [write_report_page(arguments.run_dirs, live=live)] if arguments.html else []
        return [write_report(*arguments.run_dirs), *pages]

    if arguments.watch:
        watch(arguments.run_dirs, draw)
    else:
        print(*draw(live=False), sep="\n")


def _view(arguments: argparse.Namespace) -> None:
    from megatron_hapo.observe.view.build_view import serve_view, write_view

    if arguments.serve:
        serve_view(arguments.run_dirs)
    else:
        print(write_view(arguments.run_dirs, arguments.out))
