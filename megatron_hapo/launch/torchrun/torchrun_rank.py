"""A process that torchrun started: a trainer rank, and on rank 0 the driver beside it.

The rank works in a thread of its own. The main thread drives (rank 0), keeps the node's part of Ray (first rank of each
node), takes signals, and ends the process when the run cannot go on, even if the rank hangs in a collective.
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
from megatron_hapo.errors import ConfigError, HapoError, RolloutError
from megatron_hapo.launch.places import GpuPlacement, beside_ranks
from megatron_hapo.launch.ray import cluster
from megatron_hapo.launch.ray.cluster import RayNode
from megatron_hapo.launch.torchrun import attempt
from megatron_hapo.launch.torchrun.attempt import Facts, Place
from megatron_hapo.launch.torchrun.control import Commander, ControlGroup, serve, serve_driver
from megatron_hapo.launch.torchrun.host import interface_of, is_alone, own_address
from megatron_hapo.launch.torchrun.watch import Watch, leave
from megatron_hapo.model.rank_environment import environment, quieten
from megatron_hapo.trainer.over_ranks import RankObject, TrainerOverRanks
from megatron_hapo.trainer.rank_process import start_rank

logger = logging.getLogger(__name__)

_EXIT_FAULT = 2
_EXIT_FAILED = 1
_EXIT_INTERRUPTED = 130
_END_SECONDS = 60.0
_RENDEZVOUS_SECONDS = 20.0
_POLL_SECONDS = 0.2
_RAY_HEAD = "ray/head"
_ENGINES_AWAY = "engines/away"
"""Set when engines have given back the memory of GPUs that they share with the ranks."""


def train(path: Path, overrides: Sequence[str]) -> None:
    """All that this process has to do in the run; a failed run ends the process.

    Raises:
        HapoError: on rank 0, when the run cannot start.
    """
    place = Place.from_environment()
    quieten()
    fault, config = None, None
    try:
        config = load_checked_config(path, overrides)
        attempt.check_world_size(config, place.world_size)
    except ConfigError as error:
        fault = error
    if place.rank == 0:
        _lead(place, config, fault)
    else:
        _follow(place, config, fault)


def _lead(place: Place, config: Config | None, fault: ConfigError | None) -> None:
    """Rank 0."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # before the driver runs, a wish to stop is an end
    store = attempt.open_store()
    name = attempt.announce(store)
    run_store = attempt.run_store(store, name)
    try:
        if config is None or fault is not None:
            raise fault or AssertionError("neither a config nor a fault")
        device = _device_of(config)
        address = _set_environment(place, config, device)
        facts = attempt.gather_facts(
            store,
            name,
            world_size=place.world_size,
            own=_facts(place, config, None, device),
            timeout_seconds=config.launch.start_timeout_seconds,
        )
        attempt.check_facts(facts, device=device)
        token = cluster.cluster_token()
        _prepare_ray(place, config, token)
        Watch.prepare(
            run_store, [f"trainer rank {rank} ({f.host}, process {f.process})" for rank, f in enumerate(facts)]
        )
    except BaseException:
        attempt.call_off(store, name)
        raise
    attempt.begin(store, name, {"token": token})
    watch = Watch(run_store, rank=0, world_size=place.world_size)
    end = _End(watch)
    try:
        _drive(config, TorchrunLauncher(config, place, device, address, run_store, watch, end))
    except BaseException as error:
        code = end.because(error)
        _wait_for_rendezvous(place)
        leave(code)
    watch.wait_for_others(_END_SECONDS)
    watch.close()


def _wait_for_rendezvous(place: Place) -> None:
    """Where torchrun will restart: it counts an agent that was killed among the living for 15 s, and whoever comes back
    sooner is given it as a partner and fails."""
    restarts_left = int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) - int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if place.num_nodes > 1 and restarts_left > 0:
        time.sleep(_RENDEZVOUS_SECONDS)


class _End:
    """Of a failed run on rank 0: its error is told once, to the other ranks and to the user."""

    def __init__(self, watch: Watch):
        self._watch = watch
        self._code: int | None = None

    def because(self, error: BaseException) -> int:
        """The exit code. From here on a signal is no wish to stop any more."""
        if self._code is None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._watch.report(error)
            self._code = _tell(error)
        return self._code


def _drive(config: Config, launcher: TorchrunLauncher) -> None:
    from megatron_hapo.launch.run import run_training  # imports Ray, which reads the environment at once

    thread = launcher.start_rank()
    run_training(config, launcher)
    launcher.commander.stop()
    thread.join(_END_SECONDS)


def _follow(place: Place, config: Config | None, fault: ConfigError | None) -> None:
    """The other ranks."""
    logging.getLogger("megatron_hapo").setLevel(logging.WARNING)
    device = "cpu" if config is None else _device_of(config)
    address = ""
    try:
        if config is not None:
            address = _set_environment(place, config, device)
    except ConfigError as error:
        fault = error
    facts = _facts(place, config, fault, device)
    timeout_seconds = 300.0 if config is None else config.launch.start_timeout_seconds
    try:
        store, orders = attempt.join(attempt.open_store(), facts, rank=place.rank, timeout_seconds=timeout_seconds)
    except attempt.RefusedError:  # rank 0 tells why
        leave(_EXIT_FAULT)
    assert config is not None, "rank 0 begins only when every rank has a config"
    watch = Watch(store, rank=place.rank, world_size=place.world_size)
    for number in (signal.SIGINT, signal.SIGTERM):  # the end of the run is rank 0's to decide
        signal.signal(number, lambda *_: watch.ask_to_stop())
    thread = _RankThread(place, config, device, store, watch, None)
    thread.start()
    with contextlib.ExitStack() as stack:
        try:
            if place.local_rank == 0:
                _prepare_ray(place, config, orders["token"])
                _join_ray(stack, place, config, device, address, store, watch)
        except Exception as error:  # whatever it is, all ranks are told, and this one ends with it below
            watch.fail(error)
        while thread.is_alive() and not watch.failed.wait(_POLL_SECONDS):
            pass
    if watch.error is not None:
        code = _EXIT_FAILED if watch.told_by_another else _tell(watch.error)
        _wait_for_rendezvous(place)
        leave(code)
    watch.close()


def _join_ray(
    stack: contextlib.ExitStack,
    place: Place,
    config: Config,
    device: str,
    address: str,
    store: Store,
    watch: Watch,
) -> None:
    head = wait_for(store, [_RAY_HEAD], watch, timeout_seconds=config.launch.start_timeout_seconds)[0].decode()
    node = RayNode(config.launch, ip=address, head_address=head, gpus=_gpus_for_engines(place, config, device))
    stack.callback(node.close)
    _announce_node(store, place, node, device)


class TorchrunLauncher:
    """run.Launcher on rank 0."""

    def __init__(self, config: Config, place: Place, device: str, address: str, store: Store, watch: Watch, end: _End):
        self._end = end
        self.device, self.commander = device, Commander()
        self._config, self._place, self._address, self._store, self._watch = config, place, address, store, watch
        self._nodes: list[_Node] = []

    def start_rank(self) -> _RankThread:
        """Rank 0's own part of the trainer."""
        thread = _RankThread(self._place, self._config, self.device, self._store, self._watch, self.commander)
        thread.start()
        return thread

    @contextlib.contextmanager
    def ray_cluster(self) -> Iterator[None]:
        place, config = self._place, self._config
        node = RayNode(
            config.launch,
            ip=self._address,
            head_address=cluster.address_to_join(),
            gpus=_gpus_for_engines(place, config, self.device),
        )
        try:
            self._store.set(_RAY_HEAD, node.address)
            _announce_node(self._store, place, node, self.device)
            with cluster.connected(node.address, ip=self._address):
                keys = [_node_key(number) for number in range(place.num_nodes)]
                nodes = wait_for(self._store, keys, self._watch, timeout_seconds=config.launch.start_timeout_seconds)
                self._nodes = [_Node(**json.loads(text)) for text in nodes]
                yield
        finally:
            node.close()

    def engine_placements(self) -> list[GpuPlacement]:
        if self._config.placement == "colocated":
            rollout = self._config.rollout
            ranks = [rank for node in self._nodes for rank in node.rank_placements()]
            return beside_ranks(ranks, engines=rollout.engines, tp=rollout.tp)
        names = [node.name for node in self._nodes]
        return cluster.place_engines(self._config, trainer_nodes=names, device=self.device)

    def start_trainer(self) -> TorchrunTrainer:
        self._store.set(_ENGINES_AWAY, "")
        return TorchrunTrainer(self._config, self.commander)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set its own
        try:
            with self._watch.interrupting():
                yield
        except BaseException as error:
            self._end.because(error)  # before the parts are closed, which takes time
            raise


class TorchrunTrainer(TrainerOverRanks):
    """protocols.Trainer over torchrun's ranks."""

    def __init__(self, config: Config, commander: Commander):
        super().__init__(config)
        self._commander, self._timeout_seconds = commander, config.trainer.timeout_seconds

    def weight_buckets(self, *, verify: bool) -> Iterator[Any]:
        import ray

        for bucket in self._commander.stream("weight_buckets", timeout_seconds=self._timeout_seconds, verify=verify):
            yield ray.put(bucket)

    def close(self) -> None:
        """The ranks end with their processes."""

    def _all(self, verb: str, *arguments: Any, **options: Any) -> list[Any]:
        return self._commander.call(verb, *arguments, timeout_seconds=self._timeout_seconds, **options)

    def _each(self, verb: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._commander.call_each(verb, arguments, timeout_seconds=self._timeout_seconds)


class _RankThread(threading.Thread):
    """Becomes a trainer rank and serves until rank 0 ends the run; an error wakes the main thread."""

    def __init__(
        self,
        place: Place,
        config: Config,
        device: str,
        store: Store,
        watch: Watch,
        commander: Commander | None,
    ):
        super().__init__(name="rank", daemon=True)
        self._place, self._config, self._device = place, config, device
        self._store, self._watch, self._commander = store.clone(), watch, commander

    def run(self) -> None:
        try:
            place, config = self._place, self._config
            # Ray's processes do not wait long for each other: on a small machine the imports of the ranks come after.
            own_node = [_node_key(place.node)]
            wait_for(self._store, own_node, self._watch, timeout_seconds=config.launch.start_timeout_seconds)
            if config.placement == "colocated":
                wait_for(self._store, [_ENGINES_AWAY], self._watch, timeout_seconds=config.rollout.timeout_seconds)
            rank = start_rank(
                self._config,
                device=self._device,
                rank=place.rank,
                world_size=place.world_size,
                init_method=PrefixStore("world", self._store),
            )
            control, target = ControlGroup(), RankObject(rank, place.rank)
            if self._commander is None:
                serve(control, target)
            else:
                serve_driver(control, target, self._commander)

            from megatron_hapo.model import parallel_layout  # imports Megatron, which start_rank prepares for

            parallel_layout.shutdown()
        except BaseException as error:
            self._watch.fail(error)


def wait_for(store: Store, keys: Sequence[str], watch: Watch, *, timeout_seconds: float) -> list[bytes]:
    """The values of these keys.

    Raises:
        RolloutError: some did not come in time. What made the run fail meanwhile comes as it is.
    """
    deadline = time.monotonic() + timeout_seconds
    for key in keys:
        while not store.check([key]):
            if watch.failed.wait(_POLL_SECONDS) and watch.error is not None:
                raise watch.error
            if time.monotonic() > deadline:
                raise RolloutError(f"starting: no {key} within {timeout_seconds:g} s")
    return [store.get(key) for key in keys]


def _node_key(node: int) -> str:
    return f"ray/node/{node}"


@dataclass(frozen=True)
class _Node:
    """What the driver must know of a node."""

    name: str
    """Ray's id."""
    ranks: int
    gpus: list[str]
    """Of its trainer ranks, in their order; none on a CPU."""

    def rank_placements(self) -> list[GpuPlacement]:
        return [GpuPlacement(self.name, tuple(self.gpus[rank : rank + 1])) for rank in range(self.ranks)]


def _announce_node(store: Store, place: Place, node: RayNode, device: str) -> None:
    gpus = _visible_gpus()[: place.local_world_size] if device == "cuda" else []
    store.set(_node_key(place.node), json.dumps(asdict(_Node(node.node_id, place.local_world_size, gpus))))


def _device_of(config: Config) -> str:
    return config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def _facts(place: Place, config: Config | None, fault: ConfigError | None, device: str) -> Facts:
    return Facts(
        host=socket.gethostname(),
        process=os.getpid(),
        ranks_here=place.local_world_size,
        num_gpus=torch.cuda.device_count() if device == "cuda" else 0,
        config=None if config is None else config.model_dump(mode="json"),
        fault=None if fault is None else str(fault),
    )


def _set_environment(place: Place, config: Config, device: str) -> str:
    """Makes the environment a rank's; its address for the other nodes."""
    alone = is_alone(place, config)
    address = own_address(alone=alone)
    os.environ |= environment(device, loopback=alone)
    interface = interface_of(address)
    if interface is not None:  # gloo would ask for the address of the host's name, which is often loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return address


def _prepare_ray(place: Place, config: Config, token: str) -> None:
    cluster.prepare_environment(token, host=socket.gethostname(), loopback=is_alone(place, config))


def _gpus_for_engines(place: Place, config: Config, device: str) -> list[str]:
    """The GPUs of this node that its trainer ranks leave free, if engines are to stand there."""
    if device == "cpu" or config.launch.engines == "own_nodes" or config.placement == "colocated":
        return []
    return _visible_gpus()[place.local_world_size :]


def _visible_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return visible.split(",")


def _tell(error: BaseException) -> int:
    """Says it as the command line would; the exit code."""
    if isinstance(error, HapoError):
        print(error, file=sys.stderr, flush=True)
        return _EXIT_FAULT
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        return _EXIT_INTERRUPTED
    traceback.print_exception(error)
    return _EXIT_FAILED
