"""A process that torchrun started: a trainer rank, and on rank 0 the driver beside it.

The trainer rank works in a thread of its own. The main thread drives the run (rank 0), keeps this node's part of Ray
(first rank of each node), handles signals, and ends the process when the run cannot go on, even if the rank's thread
hangs in a collective.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from megatron_hapo.checks.preflight import load_checked_config
from megatron_hapo.config import Config
from megatron_hapo.errors import ConfigError, HapoError, RolloutError, one_line
from megatron_hapo.launch.places import GpuPlacement, beside_ranks
from megatron_hapo.launch.ray import cluster
from megatron_hapo.launch.ray.cluster import RayNode
from megatron_hapo.launch.torchrun import rank_rendezvous
from megatron_hapo.launch.torchrun.control import Commander, ControlGroup, serve, serve_driver
from megatron_hapo.launch.torchrun.failure_detector import FailureDetector, exit_now
from megatron_hapo.launch.torchrun.host import interface_of, is_single_host, own_address
from megatron_hapo.launch.torchrun.rank_rendezvous import RankInfo, RankPlace
from megatron_hapo.model.rank_environment import environment, quieten
from megatron_hapo.private_folder import run_time_folder
from megatron_hapo.trainer.over_ranks import RankObject, TrainerOverRanks
from megatron_hapo.trainer.rank_process import resolve_device, start_rank

logger = logging.getLogger(__name__)

_EXIT_FAULT = 2
_EXIT_FAILED = 1
_EXIT_INTERRUPTED = 130
_SHUTDOWN_SECONDS = 60.0
_AGENT_LOST_SECONDS = 20.0
_POLL_SECONDS = 0.2
_RAY_HEAD = "ray/head"
_ENGINES_RELEASED_MEMORY = "engines/released_memory"
"""Set when the engines have released the memory of the GPUs that they share with the ranks."""


def train(path: Path, overrides: Sequence[str]) -> None:
    """Do this process's part of the run, and return when the run has ended. A failed run exits the process.

    Raises:
        HapoError: on rank 0, when the run cannot start.
    """
    place = RankPlace.from_environment()
    quieten()
    fault, config = None, None
    try:
        config = load_checked_config(path, overrides, reads_hub=place.rank == 0)
        rank_rendezvous.check_world_size(config, place.world_size)
    except ConfigError as error:
        fault = error
    if place.rank == 0:
        _run_rank_0(place, config, fault)
    else:
        _run_other_rank(place, config, fault)


@dataclass(frozen=True, kw_only=True)
class _JoinedRun:
    """The run as this rank has joined it."""

    config: Config
    place: RankPlace
    device: str
    """cpu or cuda."""
    address: str
    """IP address of this host for the other nodes."""
    store: Store
    """The store of this attempt."""
    detector: FailureDetector

    def wait_for(self, store: Store, keys: Sequence[str], *, timeout_seconds: float | None = None) -> list[bytes]:
        """The values of these keys, once all of them are in the store.

        Args:
            store: the calling thread's own connection.
            timeout_seconds: None means launch.start_timeout_seconds.
        Raises:
            RolloutError: some were not set in time. A failure of the run meanwhile is raised as it is.
        """
        if timeout_seconds is None:
            timeout_seconds = self.config.launch.start_timeout_seconds
        deadline = time.monotonic() + timeout_seconds
        for key in keys:
            while not store.check([key]):
                if self.detector.failed.wait(_POLL_SECONDS) and self.detector.error is not None:
                    raise self.detector.error
                if time.monotonic() > deadline:
                    raise RolloutError(f"starting: no {key} within {timeout_seconds:g} s")
        return [store.get(key) for key in keys]


def _run_rank_0(place: RankPlace, config: Config | None, fault: ConfigError | None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the driver runs, SIGTERM ends the run at once
    run = _lead_rendezvous(place, config, fault)
    failure = _FailureReport(run.detector)
    try:
        _drive(run, failure)
    except BaseException as error:
        code = failure.exit_code(error)
        _wait_for_lost_agents(place)
        exit_now(code)
    run.detector.wait_for_others(_SHUTDOWN_SECONDS)
    run.detector.close()


def _lead_rendezvous(place: RankPlace, config: Config | None, fault: ConfigError | None) -> _JoinedRun:
    """Rank 0's rendezvous with the other ranks, which it releases if all of them can work together."""
    store = rank_rendezvous.open_store()
    attempt = rank_rendezvous.announce(store)
    attempt_store = rank_rendezvous.attempt_store(store, attempt)
    try:
        if config is None or fault is not None:
            raise fault or AssertionError("neither a config nor a fault")
        device = resolve_device(config)
        address = _set_environment(place, config, device)
        infos = rank_rendezvous.gather_infos(
            store,
            attempt,
            world_size=place.world_size,
            own=_rank_info(place, config, None, device),
            timeout_seconds=config.launch.start_timeout_seconds,
        )
        rank_rendezvous.check_infos(infos, device=device)
        token = cluster.cluster_token()
        _prepare_ray(place, config, token)
        names = [f"trainer rank {rank} ({info.host}, process {info.process})" for rank, info in enumerate(infos)]
        FailureDetector.prepare(attempt_store, names)
    except BaseException:
        rank_rendezvous.cancel(store, attempt)
        raise
    rank_rendezvous.release(store, attempt, {"ray_token": token})
    detector = FailureDetector(attempt_store, rank=0, world_size=place.world_size)
    return _JoinedRun(
        config=config, place=place, device=device, address=address, store=attempt_store, detector=detector
    )


def _wait_for_lost_agents(place: RankPlace) -> None:
    """Give torchrun time to notice killed agents before it restarts the ranks.

    It counts a killed agent as alive for 15 s. An agent that rejoins sooner is matched with the dead one, and fails.
    """
    restarts_left = int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) - int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if place.num_nodes > 1 and restarts_left > 0:
        time.sleep(_AGENT_LOST_SECONDS)


class _FailureReport:
    """Reports the error of a failed run once, to the other ranks and to the user. On rank 0."""

    def __init__(self, detector: FailureDetector):
        self._detector = detector
        self._code: int | None = None

    def exit_code(self, error: BaseException) -> int:
        """The exit code for the first error, which is reported. From then on SIGTERM is ignored: the run is ending."""
        if self._code is None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._detector.report(error)
            self._code = _print_error(error)
        return self._code


def _drive(run: _JoinedRun, failure: _FailureReport) -> None:
    from megatron_hapo.launch.run import run_training  # imports Ray, which reads the environment at once

    launcher = TorchrunLauncher(run, failure)
    thread = launcher.start_rank()
    run_training(run.config, launcher)
    launcher.commander.stop()
    thread.join(_SHUTDOWN_SECONDS)


def _run_other_rank(place: RankPlace, config: Config | None, fault: ConfigError | None) -> None:
    logging.getLogger("megatron_hapo").setLevel(logging.WARNING)
    run, ray_token = _join_rendezvous(place, config, fault)
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 decides when the run ends
        signal.signal(number, lambda *_: run.detector.request_stop())
    thread = _RankThread(run, None)
    thread.start()
    with contextlib.ExitStack() as stack:
        try:
            if place.local_rank == 0:
                _prepare_ray(place, run.config, ray_token)
                _join_ray(stack, run)
        except Exception as error:  # any error here is reported to all ranks, and ends this one below
            run.detector.fail(error)
        while thread.is_alive() and not run.detector.failed.wait(_POLL_SECONDS):
            pass
    error = run.detector.error
    if error is not None:
        code = _EXIT_FAILED if run.detector.reported_by_another else _print_error(error)
        _wait_for_lost_agents(place)
        exit_now(code)
    run.detector.close()


def _join_rendezvous(place: RankPlace, config: Config | None, fault: ConfigError | None) -> tuple[_JoinedRun, str]:
    """The run that rank 0 starts, and Ray's token. Exits the process if rank 0 cancels the run."""
    device = "cpu" if config is None else resolve_device(config)
    address = ""
    try:
        if config is not None:
            address = _set_environment(place, config, device)
    except ConfigError as error:
        fault = error
    info = _rank_info(place, config, fault, device)
    timeout_seconds = 300.0 if config is None else config.launch.start_timeout_seconds
    try:
        store, instructions = rank_rendezvous.join(
            rank_rendezvous.open_store(), info, rank=place.rank, timeout_seconds=timeout_seconds
        )
    except rank_rendezvous.AttemptCancelledError:  # rank 0 reports the reason to the user
        exit_now(_EXIT_FAULT)
    assert config is not None, "rank 0 releases the ranks only when every rank has a config"
    detector = FailureDetector(store, rank=place.rank, world_size=place.world_size)
    run = _JoinedRun(config=config, place=place, device=device, address=address, store=store, detector=detector)
    return run, instructions["ray_token"]


def _join_ray(stack: contextlib.ExitStack, run: _JoinedRun) -> None:
    """Start this node's part of Ray, which the stack closes."""
    head = run.wait_for(run.store, [_RAY_HEAD])[0].decode()
    folder = stack.enter_context(run_time_folder())
    node = RayNode(run.config.launch, folder=folder, ip=run.address, head_address=head, gpus=_gpus_for_engines(run))
    stack.callback(node.close)
    _announce_node(run, node)


class TorchrunLauncher:
    """run.Launcher on rank 0."""

    def __init__(self, run: _JoinedRun, failure: _FailureReport):
        self._run, self._failure = run, failure
        self.device, self.commander = run.device, Commander()
        self._nodes: list[_Node] = []

    def start_rank(self) -> _RankThread:
        """The thread of rank 0's own trainer rank, started."""
        thread = _RankThread(self._run, self.commander)
        thread.start()
        return thread

    @contextlib.contextmanager
    def ray_cluster(self) -> Iterator[None]:
        run, address = self._run, cluster.address_to_join()
        with run_time_folder() as folder:
            node = RayNode(
                run.config.launch, folder=folder, ip=run.address, head_address=address, gpus=_gpus_for_engines(run)
            )
            try:
                run.store.set(_RAY_HEAD, node.address)
                _announce_node(run, node)
                with cluster.connected(node.address, ip=run.address):
                    nodes = run.wait_for(run.store, [_node_key(number) for number in range(run.place.num_nodes)])
                    self._nodes = [_Node(**json.loads(text)) for text in nodes]
                    yield
            finally:
                node.close()

    def engine_placements(self) -> list[GpuPlacement]:
        config, rollout = self._run.config, self._run.config.rollout
        if config.placement == "colocated":
            ranks = [rank for node in self._nodes for rank in node.rank_placements()]
            return beside_ranks(ranks, engines=rollout.engines, tp=rollout.tp)
        names = [node.name for node in self._nodes]
        return cluster.place_engines(config, trainer_nodes=names, device=self.device)

    def start_trainer(self) -> TorchrunTrainer:
        self._run.store.set(_ENGINES_RELEASED_MEMORY, "")
        return TorchrunTrainer(self._run.config, self.commander)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has installed its own handler
        try:
            with self._run.detector.raising_failures():
                yield
        except BaseException as error:
            self._failure.exit_code(error)  # reported before the parts are closed, which takes time
            raise


class TorchrunTrainer(TrainerOverRanks):
    """protocols.Trainer over torchrun's ranks."""

    def __init__(self, config: Config, commander: Commander):
        super().__init__(config)
        self._commander, self._timeout_seconds = commander, config.trainer.timeout_seconds

    def position(self) -> tuple[int, int]:
        """See TrainerOverRanks."""
        return self._commander.count.read()

    def weight_buckets(self, *, verify: bool) -> Iterator[Any]:
        import ray

        for bucket in self._commander.stream("weight_buckets", timeout_seconds=self._timeout_seconds, verify=verify):
            yield ray.put(bucket)

    def close(self) -> None:
        """Nothing to do: the ranks end with their processes."""

    def _all(self, verb: str, *arguments: Any, **options: Any) -> list[Any]:
        return self._commander.call(verb, *arguments, timeout_seconds=self._timeout_seconds, **options)

    def _each(self, verb: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._commander.call_each(verb, arguments, timeout_seconds=self._timeout_seconds)


class _RankThread(threading.Thread):
    """Becomes a trainer rank and serves commands until rank 0 ends the run; an error wakes the main thread."""

    def __init__(self, joined: _JoinedRun, commander: Commander | None):
        """Prepare the thread; `start` starts it.

        Args:
            commander: the driver's end of the command channel, on rank 0; None on other ranks.
        """
        super().__init__(name="rank", daemon=True)
        self._joined, self._commander = joined, commander
        self._store = joined.store.clone()

    def run(self) -> None:
        try:
            place, config = self._joined.place, self._joined.config
            # Ray's processes wait for each other only briefly: on a small machine this rank's imports must come later.
            self._joined.wait_for(self._store, [_node_key(place.node)])
            if config.placement == "colocated":
                timeout_seconds = config.rollout.timeout_seconds
                self._joined.wait_for(self._store, [_ENGINES_RELEASED_MEMORY], timeout_seconds=timeout_seconds)
            rank = start_rank(
                config,
                device=self._joined.device,
                rank=place.rank,
                world_size=place.world_size,
                init_method=PrefixStore("world", self._store),
            )
            if self._commander is not None:
                rank.count = self._commander.count
            control, target = ControlGroup(), RankObject(rank, place.rank)
            if self._commander is None:
                serve(control, target)
            else:
                serve_driver(control, target, self._commander)

            from megatron_hapo.model import parallel_layout  # imports Megatron, which start_rank prepares for

            parallel_layout.shutdown()
        except BaseException as error:
            self._joined.detector.fail(error)


def _node_key(node: int) -> str:
    return f"ray/node/{node}"


@dataclass(frozen=True)
class _Node:
    """What the driver needs to know of a node."""

    name: str
    """Ray's id of the node."""
    ranks: int
    """Number of trainer ranks on it."""
    gpus: list[str]
    """GPUs of its trainer ranks, in the order of ranks; empty on a CPU."""

    def rank_placements(self) -> list[GpuPlacement]:
        """Where each of its trainer ranks runs."""
        return [GpuPlacement(self.name, tuple(self.gpus[rank : rank + 1])) for rank in range(self.ranks)]


def _announce_node(run: _JoinedRun, node: RayNode) -> None:
    """Publish this node in the store, for the driver and for the node's ranks."""
    ranks_here = run.place.local_world_size
    gpus = _visible_gpus()[:ranks_here] if run.device == "cuda" else []
    run.store.set(_node_key(run.place.node), json.dumps(asdict(_Node(node.node_id, ranks_here, gpus))))


def _rank_info(place: RankPlace, config: Config | None, fault: ConfigError | None, device: str) -> RankInfo:
    return RankInfo(
        host=socket.gethostname(),
        process=os.getpid(),
        ranks_here=place.local_world_size,
        num_gpus=torch.cuda.device_count() if device == "cuda" else 0,
        config=None if config is None else config.model_dump(mode="json"),
        fault=None if fault is None else str(fault),
    )


def _set_environment(place: RankPlace, config: Config, device: str) -> str:
    """This host's address for the other nodes, once the environment is set up for a trainer rank."""
    single_host = is_single_host(place, config)
    address = own_address(single_host=single_host)
    os.environ |= environment(device, loopback=single_host, deterministic=config.deterministic)
    interface = interface_of(address)
    if interface is not None:  # by default gloo resolves the host's own name, which is often loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return address


def _prepare_ray(place: RankPlace, config: Config, token: str) -> None:
    cluster.prepare_environment(token, host=socket.gethostname(), loopback=is_single_host(place, config))


def _gpus_for_engines(run: _JoinedRun) -> list[str]:
    """The GPUs of this node that its trainer ranks leave free, if engines are to be placed there."""
    config = run.config
    if run.device == "cpu" or config.launch.engines == "own_nodes" or config.placement == "colocated":
        return []
    return _visible_gpus()[run.place.local_world_size :]


def _visible_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return visible.split(",")


def _print_error(error: BaseException) -> int:
    """The exit code of an error, which is printed as the command line prints it."""
    if isinstance(error, HapoError):
        for line in str(error).splitlines():
            print(one_line(line), file=sys.stderr, flush=True)
        return _EXIT_FAULT
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        return _EXIT_INTERRUPTED
    traceback.print_exception(error)
    return _EXIT_FAILED
