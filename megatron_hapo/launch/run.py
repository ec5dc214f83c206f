"""A whole run: Ray, the trainer ranks, the engines, the data, the driver, and what is left for the user."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import torch
from ray._private import ray_constants

from megatron_hapo.checkpoint.run_checkpoints import Checkpoints
from megatron_hapo.checks.rehearsal import Finding, rehearse
from megatron_hapo.config import Config, dump_config
from megatron_hapo.data.prompts import PromptSampler, load_prompts, load_tokenizer
from megatron_hapo.driver import Driver
from megatron_hapo.launch.places import Place, beside_ranks, check_gpus
from megatron_hapo.launch.ray import cluster
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.rank_actors import RankProcesses, RayTrainer
from megatron_hapo.launch.torchrun.failure_detector import STOP_SIGNAL
from megatron_hapo.memory_turns import MemoryTurns, make_room_for_trainer
from megatron_hapo.model.families import read_shape
from megatron_hapo.observe.metrics import MetricsLogger
from megatron_hapo.observe.profiling import StepProfiler
from megatron_hapo.observe.report import write_report
from megatron_hapo.protocols import RolloutPool, Trainer
from megatron_hapo.reward.pool import ProcessRewardPool
from megatron_hapo.rollout.evaluation import evaluate
from megatron_hapo.sizing.from_config import peak_flops
from megatron_hapo.sizing.utilization import Utilization
from megatron_hapo.types import Prompt
from megatron_hapo.weight_sync import open_weight_sync

logger = logging.getLogger(__name__)


class LaunchedTrainer(Trainer, Protocol):
    def close(self) -> None: ...


class Launcher(Protocol):
    """How the processes of a run come to be."""

    @property
    def device(self) -> str:
        """cpu or cuda."""
        ...

    def ray_cluster(self) -> AbstractContextManager[object]:
        """Ray is up within it, with this process as a driver."""
        ...

    def engine_places(self) -> Sequence[Place] | None:
        """Of each engine; None leaves it to Ray."""
        ...

    def start_trainer(self) -> LaunchedTrainer:
        """The trainer, whose ranks may still be loading their weights. Colocated ranks take no GPU memory before."""
        ...

    def running(self) -> AbstractContextManager[object]:
        """Around everything that needs the trainer; ends before the parts are closed."""
        ...


class RayLauncher:
    """Trainer ranks and engines are Ray actors; Ray places them."""

    def __init__(self, config: Config):
        self._config, self.device = config, _device(config)
        self._processes: RankProcesses | None = None

    @contextlib.contextmanager
    def ray_cluster(self) -> Iterator[None]:
        with local_ray():
            if self.device == "cuda":
                check_gpus(
                    self._config, here=_gpus_of_this_node(), everywhere=int(ray.cluster_resources().get("GPU", 0))
                )
            # Before the engines, which Ray might else put on the GPUs that the ranks need.
            self._processes = RankProcesses(self._config, device=self.device)
            yield

    def engine_places(self) -> list[Place] | None:
        if self._config.placement == "disaggregated":
            return None
        assert self._processes is not None, "Ray is not up"
        rollout = self._config.rollout
        return beside_ranks(self._processes.places(), engines=rollout.engines, tp=rollout.tp)

    def start_trainer(self) -> RayTrainer:
        assert self._processes is not None, "Ray is not up"
        return RayTrainer(self._config, self._processes)

    def running(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()


def run_training(config: Config, launcher: Launcher | None = None) -> None:
    """Train as a checked config says; continues from the run folder's newest checkpoint.

    Args:
        launcher: None is Ray's.
    """
    prompts, eval_prompts = _load_data(config)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    dump_config(config, config.run_dir / "config.yaml")
    checkpoints = Checkpoints(
        config.run_dir.absolute() / "checkpoints", keep=config.checkpoint.keep, resume=config.checkpoint.resume
    )
    with contextlib.ExitStack() as stack:
        parts = stack.enter_context(open_parts(config, launcher or RayLauncher(config)))
        metrics = stack.enter_context(
            MetricsLogger(
                config.run_dir,
                total_steps=config.steps,
                start_step=checkpoints.newest_step(),
                wandb_project=config.metrics.wandb_project,
            )
        )
        driver = Driver(
            config=config, prompts=prompts, eval_prompts=eval_prompts, logger=metrics, checkpoints=checkpoints,
            utilization=Utilization(
                config=config, shape=read_shape(config.model.path), peak_flops=peak_flops(_device(config))
            ),
            profiler=StepProfiler(
                config.profile.steps, config.run_dir.absolute() / "profile",
                trainer=parts.trainer, pool=parts.pool, rewards=parts.rewards,
            ),
            trainer=parts.trainer, pool=parts.pool, turns=parts.turns, rewards=parts.rewards,
        )  # fmt: skip
        with _graceful_stop(driver):
            driver.run()
        if driver.stop_requested:
            logger.warning("stopped on request; the same command goes on from %s", config.run_dir / "checkpoints")
            return
        if config.checkpoint.hf_at_end:
            parts.trainer.export_hf(config.run_dir.absolute() / "hf")
    _tell_what_is_left(config)


def run_evaluation(config: Config) -> dict[str, float]:
    """Evaluate the model folder's own weights on the evaluation data. Starts engines only."""
    _, prompts = _load_data(config)
    with local_ray(), open_rollouts(config, read_weights=True) as (pool, rewards):
        pool.wait_until_ready()
        return evaluate(pool, rewards, prompts, config)


def run_check(config: Config, *, prompts: int) -> list[Finding]:
    """Start every part of the run and let each work once, on this many prompts; nothing is trained or written."""
    sampler, _ = _load_data(config)
    with open_parts(config, RayLauncher(config)) as parts:
        return rehearse(config, parts.trainer, parts.pool, parts.turns, parts.rewards, sampler.next(prompts))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The running parts of a job."""

    trainer: Trainer
    pool: RolloutPool
    turns: MemoryTurns
    rewards: ProcessRewardPool


@contextlib.contextmanager
def open_parts(config: Config, launcher: Launcher) -> Iterator[Parts]:
    """Trainer ranks, engines, reward workers and the way of the weights, all of them ready."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(launcher.ray_cluster())
        with launcher.running():
            # Engines start in their own processes while the trainer builds its model, unless that needs their GPUs.
            pool, rewards = stack.enter_context(open_rollouts(config, launcher.engine_places()))
            make_room_for_trainer(config, pool, device=launcher.device)
            trainer = launcher.start_trainer()
            stack.callback(trainer.close)
            pool.wait_until_ready()
            address = ray.util.get_node_ip_address()
            weight_sync = stack.enter_context(open_weight_sync(config, trainer, pool, address=address))
            turns = MemoryTurns(config, trainer, pool, weight_sync)
            yield Parts(trainer=trainer, pool=pool, turns=turns, rewards=rewards)


@contextlib.contextmanager
def open_rollouts(
    config: Config, places: Sequence[Place] | None = None, *, read_weights: bool = False
) -> Iterator[tuple[RayRolloutPool, ProcessRewardPool]]:
    """Engines, which are still starting, and reward workers.

    Args:
        places: of each engine; None leaves it to Ray.
        read_weights: the engines are to read the model folder; else a sync must bring the weights.
    """
    with ProcessRewardPool(config.reward, config.model.path, config.rollout.max_response_tokens) as rewards:
        pool = RayRolloutPool(config, device=_device(config), places=places, read_weights=read_weights)
        try:
            yield pool, rewards
        finally:
            pool.close()


def _gpus_of_this_node() -> int:
    own = ray.get_runtime_context().get_node_id()
    return next(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["NodeID"] == own)


def _device(config: Config) -> str:
    return config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def _load_data(config: Config) -> tuple[PromptSampler, list[Prompt]]:
    tokenizer = load_tokenizer(config.model.path)
    sources = [config.data.train] if config.data.eval is None else [config.data.train, config.data.eval]
    train, *rest = [
        list(
            load_prompts(
                source,
                tokenizer,
                chat_template=config.data.chat_template,
                max_prompt_tokens=config.rollout.max_prompt_tokens,
            ).prompts
        )
        for source in sources
    ]
    return PromptSampler(train, seed=config.seed, shuffle=config.data.shuffle), rest[0] if rest else []


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of our own on the loopback interface, or the cluster that RAY_ADDRESS names."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    _end_on_sigterm()
    with _own_ray() if address is None else cluster.connected(address):
        _end_on_sigterm()  # Ray has set a handler of its own, which leaves its processes behind
        yield


@contextlib.contextmanager
def _own_ray() -> Iterator[None]:
    # Ray's switch for "one node, on loopback", which it turns on by itself only on Windows and macOS: the constant for
    # this process, the variable for those that it starts.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    # No actor asks for a CPU, and Ray would start an idle worker for each.
    _start_ray(
        {
            "address": "local", "include_dashboard": False, "num_cpus": 0,
            "log_to_driver": False, "logging_level": logging.ERROR,
        }
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(options: dict[str, Any]) -> None:
    """Ray's processes wait half a minute for each other, which a busy machine may exceed: they get a second chance."""
    for last in (False, True):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises a bare Exception
            if last or "timed out during startup" not in str(error):
                raise
            logger.warning("Ray was too slow to start; trying once more")
            ray.shutdown()


def _end_on_sigterm() -> None:
    """SIGTERM ends the process as Ctrl-C does: whatever was started is closed."""

    def on_signal(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_signal)


@contextlib.contextmanager
def _graceful_stop(driver: Driver) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run after the step under way, with a checkpoint; the second at once.

    What other ranks wish does not count: they are mostly told together with this one.
    """
    asked_here = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked_here
        if asked_here and number != STOP_SIGNAL:
            raise KeyboardInterrupt
        asked_here = asked_here or number != STOP_SIGNAL
        if not driver.stop_requested:
            name = "another rank is to end" if number == STOP_SIGNAL else signal.strsignal(number)
            logger.warning("%s: stopping after this step, with a checkpoint; once more to stop at once", name)
            driver.stop_requested = True

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM, STOP_SIGNAL)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            # A wish that comes late is fulfilled already.
            signal.signal(number, signal.SIG_IGN if number == STOP_SIGNAL else handler)


def _tell_what_is_left(config: Config) -> None:
    picture = write_report(config.run_dir)
    left: list[tuple[str, Path]] = [("metrics", config.run_dir / "metrics.jsonl"), ("curves", picture)]
    if config.checkpoint.hf_at_end:
        left.append(("final model", config.run_dir / "hf"))
    for what, path in left:
        print(f"{what + ':':<13} {path}")
