"""A whole run: load the data, open the parts, run the driver, report where the results are."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import ray

from megatron_hapo.checkpoint.disk_space import check_disk_space
from megatron_hapo.checkpoint.model_folder import model_fingerprint
from megatron_hapo.checkpoint.run_checkpoints import Checkpoints
from megatron_hapo.checks.own_rewards import ROWS, check_own_rewards
from megatron_hapo.checks.rehearsal import Finding, hub_findings, rehearse
from megatron_hapo.config import Config, dump_config
from megatron_hapo.data.job_prompts import evaluation_prompts, training_prompts
from megatron_hapo.data.prompts import load_tokenizer
from megatron_hapo.data.sampling import PromptSource
from megatron_hapo.driver import Driver
from megatron_hapo.errors import HapoError, RankDiedError
from megatron_hapo.launch.places import GpuPlacement
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.ray_launcher import RayLauncher
from megatron_hapo.launch.run_lock import owned_run_folder
from megatron_hapo.launch.torchrun.failure_detector import STOP_SIGNAL
from megatron_hapo.memory_turns import MemoryTurns, make_room_for_trainer
from megatron_hapo.model import determinism
from megatron_hapo.model.families import num_parameters, read_shape
from megatron_hapo.observe.metrics import MetricsLogger
from megatron_hapo.observe.profiling import StepProfiler
from megatron_hapo.observe.record_schema import Origin, vocabulary_fingerprint
from megatron_hapo.observe.records import open_records
from megatron_hapo.observe.report import write_report
from megatron_hapo.observe.token_text import decoder
from megatron_hapo.protocols import RewardPool, RolloutPool, Trainer
from megatron_hapo.reward.pool import ProcessRewardPool
from megatron_hapo.rollout.collect import GroupSource
from megatron_hapo.rollout.evaluation import EvaluationSet, evaluation_sets
from megatron_hapo.rollout.first_samples import FirstSamples
from megatron_hapo.rollout.group_stream import GroupStream
from megatron_hapo.rollout.no_engines import NoEngines, NoRewards, NoWeightSync
from megatron_hapo.rollout.replay import RecordedGroups
from megatron_hapo.sizing.from_config import peak_flops, spec_here
from megatron_hapo.sizing.utilization import Utilization
from megatron_hapo.trainer.rank_process import resolve_device
from megatron_hapo.weight_sync import open_weight_sync

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CONTINUE = "the same command continues from the newest checkpoint, or starts over if there is none"


class LaunchedTrainer(Trainer, Protocol):
    """A trainer whose processes the run must close."""

    def close(self) -> None:
        """Ends the ranks, unless their launcher does."""
        ...


class Launcher(Protocol):
    """How the processes of a run are started and placed."""

    @property
    def device(self) -> str:
        """cpu or cuda."""
        ...

    def ray_cluster(self) -> AbstractContextManager[object]:
        """Ray, with this process as a driver, while the context is open."""
        ...

    def engine_placements(self) -> Sequence[GpuPlacement] | None:
        """The placement of each engine; None leaves it to Ray."""
        ...

    def start_trainer(self) -> LaunchedTrainer:
        """The trainer, whose ranks may still be loading their weights. Until then colocated ranks use no GPU memory."""
        ...

    def running(self) -> AbstractContextManager[object]:
        """A context around everything that needs the trainer; it ends before the parts are closed."""
        ...


def run_training(config: Config, launcher: Launcher | None = None) -> None:
    """Trains as a checked config says; continues from the run folder's newest sound checkpoint.

    Args:
        launcher: None: Ray alone, which starts again up to `launch.max_restarts` times if a trainer rank dies.
    Raises:
        ConfigError: all checkpoints are damaged, or the newest does not go with the config; nothing was started.
        HapoError: a part failed, another process owns the run folder, or the disk is full.
    """
    with _full_disk_in_one_line(config.run_dir), owned_run_folder(config.run_dir):
        _train_with_restarts(config, launcher)


def _train_with_restarts(config: Config, launcher: Launcher | None) -> None:
    """Trains, from the newest checkpoint again after the death of a trainer rank that Ray has started."""
    if config.deterministic:
        determinism.announce(resolve_device(config))
    shape = read_shape(config.model.path)
    tokenizer = load_tokenizer(config.model.path, vocab_size=shape.vocab_size)
    origin = Origin(model_fingerprint(config.model.path), vocabulary_fingerprint(tokenizer))
    resume, restarts = config.checkpoint.resume, 0
    checkpoints = _open_checkpoints(config, resume=resume)
    if config.replay is None:
        source = training_prompts(config, tokenizer)
        eval_sets = evaluation_sets(config, evaluation_prompts(config, tokenizer))
        first = source.state()
        tried = [*source.next(ROWS), *(prompt for part in eval_sets for prompt in part.prompts[:ROWS])]
        check_own_rewards(config, tried)
    else:
        source, eval_sets = RecordedGroups(config, origin, vocab_size=shape.vocab_size), []
        source.check(first_step=checkpoints.newest_step())
        first = 0
    check_disk_space(
        num_parameters(shape),
        config,
        first_step=checkpoints.newest_step(),
        existing_bytes=checkpoints.bytes_on_disk(),
    )
    dump_config(config, config.run_dir / "config.yaml")
    while True:
        if not isinstance(source, RecordedGroups):  # which finds a step's records by its number
            source.restore(first)
        own = launcher or RayLauncher(config, device=resolve_device(config), advice=_CONTINUE)
        driver, death = _train(config, own, source, eval_sets, checkpoints, tokenizer, origin)
        if death is None:
            break
        if launcher is not None or driver.stop_requested or restarts == config.launch.max_restarts:
            raise death
        restarts += 1
        resume = resume or driver.saved_step > 0  # not from checkpoints of a previous run that this one replaces
        checkpoints = _open_checkpoints(config, resume=resume)
        logger.warning("%s; restart %d of launch.max_restarts=%d", death, restarts, config.launch.max_restarts)
    if driver.stop_requested:
        logger.warning("stopped on request; the same command continues from %s", config.run_dir / "checkpoints")
        return
    _report(config)


def _open_checkpoints(config: Config, *, resume: bool) -> Checkpoints:
    """The run's checkpoints, checked as far as that is quick."""
    folder = config.run_dir.absolute() / "checkpoints"
    checkpoints = Checkpoints(folder, keep=config.checkpoint.keep, resume=resume, config=config)
    checkpoints.check()
    return checkpoints


@contextlib.contextmanager
def _full_disk_in_one_line(folder: Path) -> Iterator[None]:
    """Turns the operating system's error about a disk that takes no more into a HapoError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        place = error.filename or folder
        raise HapoError(f"{place}: cannot be written: {error.strerror}; checkpoints so far are kept") from error


def _train(
    config: Config,
    launcher: Launcher,
    source: PromptSource | RecordedGroups,
    eval_sets: list[EvaluationSet],
    checkpoints: Checkpoints,
    tokenizer: PreTrainedTokenizerBase,
    origin: Origin,
) -> tuple[Driver, RankDiedError | None]:
    """Opens the parts, trains and exports the model; the driver, and the death of a rank that ended the training.

    A death before the training, while the parts start, is raised: it would most likely happen again.
    """
    with contextlib.ExitStack() as stack:
        parts = stack.enter_context(open_parts(config, launcher))
        checkpoints.verify(parts.trainer)
        metrics = stack.enter_context(
            MetricsLogger(
                config.run_dir,
                total_steps=config.steps,
                start_step=checkpoints.newest_step(),
                wandb_project=config.metrics.wandb_project,
            )
        )
        records = stack.enter_context(open_records(config, tokenizer, origin, start_step=checkpoints.newest_step()))
        groups: GroupSource
        if isinstance(source, RecordedGroups):
            groups = source
        else:
            stream = GroupStream(config, parts.pool, parts.rewards, source, restore_engines=parts.turns.restore_engines)
            stack.callback(stream.close)
            groups = FirstSamples(stream, decoder(tokenizer), metrics.show_between)
        device = resolve_device(config)
        driver = Driver(
            records=records,
            config=config, groups=groups, eval_sets=eval_sets, logger=metrics, checkpoints=checkpoints,
            utilization=Utilization(
                config=config, shape=read_shape(config.model.path), peak_flops=peak_flops(device),
                transformer_engine=device != "cpu" and spec_here(config) == "te",
            ),
            profiler=StepProfiler(
                config.profile.steps, config.run_dir.absolute() / "profile",
                trainer=parts.trainer, pool=parts.pool, rewards=parts.rewards,
            ),
            trainer=parts.trainer, pool=parts.pool, turns=parts.turns, rewards=parts.rewards,
        )  # fmt: skip
        try:
            with _graceful_stop(driver):
                driver.run()
            if config.checkpoint.hf_at_end and not driver.stop_requested:
                parts.trainer.export_hf(config.run_dir.absolute() / "hf")
        except RankDiedError as death:
            return driver, death
    return driver, None


def run_check(config: Config, *, prompts: int) -> list[Finding]:
    """What a run on this many prompts finds, with every part started and used once; nothing is trained or written."""
    if config.replay is not None:
        raise HapoError("replay: a replay has nothing to rehearse; `megatron-hapo train` checks its records first")
    tokenizer = load_tokenizer(config.model.path, vocab_size=read_shape(config.model.path).vocab_size)
    sampler = training_prompts(config, tokenizer)
    findings = list(hub_findings(config.model.path))
    if any(finding.verdict == "fault" for finding in findings):
        return findings
    prompts_tried = sampler.next(prompts)
    findings += [Finding("warning", warning) for warning in check_own_rewards(config, prompts_tried)]
    with open_parts(config, RayLauncher(config, device=resolve_device(config))) as parts:
        return findings + rehearse(
            config, parts.trainer, parts.pool, parts.turns, parts.rewards, prompts_tried, tokenizer=tokenizer
        )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The running parts of a job."""

    trainer: Trainer
    pool: RolloutPool
    turns: MemoryTurns
    rewards: RewardPool


@contextlib.contextmanager
def open_parts(config: Config, launcher: Launcher) -> Iterator[Parts]:
    """Trainer ranks, engines, reward workers and the weight sync, all of them ready; a replay has ranks only."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(launcher.ray_cluster())
        with launcher.running():
            if config.replay is not None:
                trainer = launcher.start_trainer()
                stack.callback(trainer.close)
                turns = MemoryTurns(config, trainer, NoEngines(), NoWeightSync())
                yield Parts(trainer=trainer, pool=NoEngines(), turns=turns, rewards=NoRewards())
                return
            # Engines start in their own processes while the trainer builds its model, unless that needs their GPUs.
            pool, rewards = stack.enter_context(open_rollouts(config, launcher.engine_placements()))
            make_room_for_trainer(config, pool, device=launcher.device)
            trainer = launcher.start_trainer()
            stack.callback(trainer.close)
            pool.wait_until_ready()
            address = ray.util.get_node_ip_address()
            weight_sync = stack.enter_context(open_weight_sync(config, trainer, pool, address=address))
            turns = MemoryTurns(config, trainer, pool, weight_sync)
            pool.restore_with(turns.restore_engines)
            yield Parts(trainer=trainer, pool=pool, turns=turns, rewards=rewards)


@contextlib.contextmanager
def open_rollouts(
    config: Config, placements: Sequence[GpuPlacement] | None = None, *, read_weights: bool = False
) -> Iterator[tuple[RayRolloutPool, ProcessRewardPool]]:
    """Engines, which are still starting, and reward workers.

    Args:
        placements: of each engine; None leaves it to Ray.
        read_weights: whether the engines read the model folder; otherwise a sync must bring the weights.
    """
    scorers = config.reward.used_scorers(config.data)
    longest = config.rollout.max_response_tokens
    with ProcessRewardPool(config.reward, config.model.path, longest, scorers=scorers) as rewards:
        pool = RayRolloutPool(config, device=resolve_device(config), placements=placements, read_weights=read_weights)
        try:
            yield pool, rewards
        finally:
            pool.close()


@contextlib.contextmanager
def _graceful_stop(driver: Driver) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; the second ends it at once.

    Requests of other ranks do not count as a second one: torchrun signals them mostly together with this one.
    """
    asked_here = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked_here
        if asked_here and number != STOP_SIGNAL:
            raise KeyboardInterrupt
        asked_here = asked_here or number != STOP_SIGNAL
        if not driver.stop_requested:
            name = "another rank was asked to stop" if number == STOP_SIGNAL else signal.strsignal(number)
            logger.warning("%s: stopping after this step, with a checkpoint; repeat to stop at once", name)
            driver.stop_requested = True

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM, STOP_SIGNAL)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            # A request of another rank that arrives now has been fulfilled already.
            signal.signal(number, signal.SIG_IGN if number == STOP_SIGNAL else handler)


def _report(config: Config) -> None:
    """Prints where the run's results are."""
    picture = write_report(config.run_dir)
    results: list[tuple[str, Path]] = [("metrics", config.run_dir / "metrics.jsonl"), ("curves", picture)]
    if config.checkpoint.hf_at_end:
        results.append(("final model", config.run_dir / "hf"))
    for what, path in results:
        print(f"{what + ':':<13} {path}")
