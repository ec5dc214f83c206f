"""Brings the trainer's weights into the engines without a checkpoint: into their parameters, or as whole tensors."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_hapo.config import Config
from megatron_hapo.errors import HapoError, RankDiedError, WeightSyncError
from megatron_hapo.model.families import read_shape
from megatron_hapo.private_folder import SHARED_MEMORY, shared_memory_prefix
from megatron_hapo.protocols import RolloutEngine, RolloutPool, Trainer, TrainerWorker, WeightSync
from megatron_hapo.resharding.channel_ends import ChannelId
from megatron_hapo.resharding.expected import merge_checksums
from megatron_hapo.resharding.hosts import this_host
from megatron_hapo.resharding.layouts import engine_parameters, matrix_sizes, shards_of_ranks
from megatron_hapo.resharding.plan import Channel, Parameter, Piece, ReshardingPlan, SendingTask, make_plan
from megatron_hapo.resharding.process_group import open_store
from megatron_hapo.resharding.receiving import ReceiveRequest, receiver_plan
from megatron_hapo.resharding.transfer import Rendezvous, Transfer, TransferStoppedError

logger = logging.getLogger(__name__)

SLOT_BYTES = 4 << 20
"""Maximum size of one of a channel's two slots: small enough that a bucket is read while it is in the CPU's cache."""
GPU_SLOT_BYTES = 32 << 20
"""The same between GPUs, where a bucket should be large beside the cost of its copies and of its announcement."""
_GRACE_SECONDS = 30
"""Added to the ranks' own deadline, whose errors are more specific."""


@contextmanager
def open_weight_sync(
    config: Config, trainer: Trainer, pool: RolloutPool, *, address: str = "127.0.0.1"
) -> Iterator[WeightSync]:
    """The sync that `weight_sync.method` asks for, or GatherSync with a logged reason.

    Args:
        address: of this host, for ranks on other hosts.
    Raises:
        WeightSyncError: only `direct` works with these settings, and it does not know the engines' layout.
    """
    settings = config.weight_sync
    if settings.method == "gather":
        yield GatherSync(trainer, pool, num_engines=config.rollout.engines, verify_every=settings.verify_every)
        return
    shared = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    # Readable by this user only; the path is short because it must fit a socket's.
    with tempfile.TemporaryDirectory(prefix=shared_memory_prefix(), dir=shared) as folder:
        try:
            weight_sync: WeightSync = DirectSync(config, trainer, pool, folder=Path(folder), address=address)
        except ValueError as reason:  # a layout that direct does not know
            if config.rollout.quantization != "none":
                raise WeightSyncError(
                    f"rollout.quantization={config.rollout.quantization} needs weight_sync.method=direct, which does "
                    f"not know the engines' layout of this model: {reason}; set rollout.quantization=none"
                ) from reason
            logger.warning("weight_sync.method: gather is used instead of direct: %s", reason)
            weight_sync = GatherSync(
                trainer, pool, num_engines=config.rollout.engines, verify_every=settings.verify_every
            )
        yield weight_sync


def with_living_engines(
    attempt: Callable[[], None], replace_dead: Callable[[], list[int]], *, num_engines: int, error: type[HapoError]
) -> None:
    """Makes an attempt, and repeats it as long as it fails because engines have died, at most once per engine.

    Args:
        attempt: raises `error` if an engine dies in it; must be complete for all engines to be of use.
        replace_dead: the indices of the engines that it has replaced. If there are none, the failure is raised.
    """
    for number in range(num_engines + 1):
        try:
            attempt()
            return
        except error as failed:
            replaced = replace_dead()
            if not replaced or number == num_engines:
                raise
            logger.warning("engines %s died in the weight sync and were replaced: %s", replaced, failed)


class GatherSync:
    """Every tensor is gathered from its tensor-parallel shards and loaded under its Hugging Face name.

    The engines' parameters are compared with the trainer's checksums on the first and every `verify_every`-th sync. An
    engine that dies meanwhile, or has died since the last sync, is replaced; all of them then receive everything again.
    """

    def __init__(self, trainer: Trainer, pool: RolloutPool, *, num_engines: int, verify_every: int):
        self._trainer, self._pool, self._verify_every = trainer, pool, verify_every
        self._num_engines, self._num_syncs = num_engines, 0

    def sync(self, *, policy_version: int) -> None:
        is_due = self._num_syncs % self._verify_every == 0
        self._num_syncs += 1
        self._replace_dead()
        with_living_engines(
            lambda: self._attempt(policy_version, verify=is_due or bool(self._pool.new_engines)),
            self._replace_dead,
            num_engines=self._num_engines,
            error=WeightSyncError,
        )

    def _replace_dead(self) -> list[int]:
        return self._pool.replace_dead_engines(patience_seconds=_GRACE_SECONDS)

    def _attempt(self, policy_version: int, *, verify: bool) -> None:
        with self._pool.weight_update(policy_version=policy_version):
            self._pool.broadcast(RolloutEngine.begin_weight_update)
            buckets = self._trainer.weight_buckets(verify=verify)
            try:
                for bucket in buckets:
                    self._pool.broadcast(RolloutEngine.load_bucket, bucket)
            except WeightSyncError:
                for _ in buckets:  # the ranks take no other command before they have delivered all
                    pass
                raise


class DirectSync:
    """Every trainer rank sends each engine rank the pieces of its parameters, by a plan made once.

    Phases of a sync: all engine ranks open their parameters and all trainer ranks send, at the same time; on the first
    and every `verify_every`-th sync the engines compare what they hold with the trainer's checksums; only when all
    have confirmed do they take the new version. An engine that dies meanwhile is replaced, and the sync starts again;
    one that died since the last sync is replaced before it.

    Args:
        folder: an empty folder that all processes of this host can write; it must outlive the sync.
        address: of this host, for ranks on other hosts.
    Raises:
        ValueError: (constructor) the plan does not know a layout of this model.
    """

    def __init__(
        self, config: Config, trainer: Trainer, pool: RolloutPool, *, folder: Path, address: str = "127.0.0.1"
    ):
        self._config, self._trainer, self._pool, self._folder = config, trainer, pool, folder
        self._settings, self._rollout = config.weight_sync, config.rollout
        self._num_syncs = self._num_attempts = 0
        shape = read_shape(config.model.path)
        engine = engine_parameters(shape, config.rollout.tp, config.rollout.ep)
        shards = shards_of_ranks(trainer.broadcast(TrainerWorker.own_parameters))
        num_ranks = sum(len(shard.ranks) for shard in shards)
        channels = num_ranks * config.rollout.engines * config.rollout.tp
        most = GPU_SLOT_BYTES if self._on_gpus() else SLOT_BYTES
        self._slot_bytes = min(most, max(1, config.weight_sync.bucket_bytes // channels))
        self.plan = make_plan(
            shards,
            engine,
            matrix_sizes(shape),
            engines=config.rollout.engines,
            itemsize={"float32": 4, "bfloat16": 2}[config.rollout.dtype],
            max_copy_bytes=self._slot_bytes,
        )
        described = repr((self.plan.shards, engine, self._slot_bytes))
        self._fingerprint = hashlib.blake2b(described.encode()).hexdigest()[:16]
        moving = list(self.plan.channels())
        trainer.scatter(TrainerWorker.prepare_sending, _sending_tasks(self.plan, moving, num_ranks))
        self._receiver_plans = _receiver_plans(moving, engine, engines=config.rollout.engines)
        pool.scatter(RolloutEngine.prepare_receiving, self._receiver_plans)
        self._rendezvous: Rendezvous | None = None
        self._trainer_hosts = trainer.broadcast(TrainerWorker.host)
        if {*self._trainer_hosts, *pool.broadcast(RolloutEngine.host)} != {this_host()}:
            self._store, self._rendezvous = self._open_rendezvous(address, self._hosts_of_group())
        logger.info("direct weight sync by %s: %d copies an engine", self._describe(moving), len(self.plan.copies))

    def _hosts_of_group(self) -> tuple[int, ...]:
        """The number of the host of each trainer rank and then of each engine rank; an engine's ranks share a host."""
        engines = [host for host in self._pool.broadcast(RolloutEngine.host) for _ in range(self._rollout.tp)]
        hosts = [*self._trainer_hosts, *engines]
        return tuple(hosts.index(host) for host in hosts)

    def _open_rendezvous(self, address: str, hosts: tuple[int, ...]) -> tuple[Any, Rendezvous]:
        store, port = open_store(address)
        rollout = self._rollout
        return store, Rendezvous(
            host=address, port=port, generation=0, trainer_ranks=len(self._trainer_hosts),
            engine_ranks=rollout.engines * rollout.tp, ranks_per_engine=rollout.tp,
            backend="nccl" if self._on_gpus() else "gloo", hosts=hosts,
        )  # fmt: skip

    def _on_gpus(self) -> bool:
        return self._config.device != "cpu" and torch.cuda.is_available()

    def _describe(self, channels: Sequence[Channel]) -> str:
        if self._rendezvous is None:
            return "shared memory"
        near = sum(self._rendezvous.on_one_host(*ChannelId.of(channel)) for channel in channels)
        return f"messages ({self._rendezvous.backend}) and, for {near} of {len(channels)} channels, shared memory"

    def sync(self, *, policy_version: int) -> None:
        is_due = self._num_syncs % self._settings.verify_every == 0
        self._num_syncs += 1
        self._prepare_new_engines()  # for those that died since the last sync
        with_living_engines(
            lambda: self._attempt(policy_version, verify=is_due or bool(self._pool.new_engines)),
            self._replace_after_failure,
            num_engines=self._rollout.engines,
            error=WeightSyncError,
        )

    def _replace_after_failure(self) -> list[int]:
        self._leave_group()
        return self._prepare_new_engines()

    def _prepare_new_engines(self) -> list[int]:
        """Replaces dead engines, and gives the plan to all if any are new; the indices of those replaced now."""
        replaced = self._pool.replace_dead_engines(patience_seconds=max(_GRACE_SECONDS, self._settings.timeout_seconds))
        if self._pool.new_engines:
            self._leave_group()
            if self._rendezvous is not None:  # a new engine may be on another host
                self._rendezvous = replace(self._rendezvous, hosts=self._hosts_of_group())
            self._pool.scatter(RolloutEngine.prepare_receiving, self._receiver_plans)
        return replaced

    def _leave_group(self) -> None:
        """The next attempt opens a new process group."""
        if self._rendezvous is not None:
            self._rendezvous = replace(self._rendezvous, generation=self._rendezvous.generation + 1)

    def _attempt(self, policy_version: int, *, verify: bool) -> None:
        self._num_attempts += 1
        transfer = Transfer(
            folder=str(self._folder),
            number=self._num_attempts,
            plan=self._fingerprint,
            dtype=self._rollout.dtype,
            slot_bytes=self._slot_bytes,
            deadline_seconds=self._settings.timeout_seconds,
            rendezvous=self._rendezvous,
        )
        requests = [ReceiveRequest(transfer=transfer, engine=index) for index in range(self._rollout.engines)]
        late = self._settings.timeout_seconds + _GRACE_SECONDS
        with self._pool.weight_update(policy_version=policy_version):
            parts, _ = _together(
                transfer,
                lambda: self._trainer.broadcast(TrainerWorker.send_weights, transfer, verify=verify),
                lambda: self._pool.scatter(RolloutEngine.receive_weights, requests, timeout_seconds=late),
            )
            if verify:
                checksums = merge_checksums(part for part in parts if part is not None)
                self._pool.broadcast(RolloutEngine.verify, checksums)


def _sending_tasks(plan: ReshardingPlan, channels: Sequence[Channel], num_ranks: int) -> list[SendingTask]:
    """Each trainer rank's part of the plan."""
    outgoing: dict[int, list[Channel]] = defaultdict(list)
    for channel in channels:
        outgoing[channel.source_rank].append(channel)
    owned_blocks = plan.owned_blocks()
    return [SendingTask(tuple(outgoing[rank]), tuple(owned_blocks.get(rank, ()))) for rank in range(num_ranks)]


def _receiver_plans(
    channels: Sequence[Channel], engine: Sequence[tuple[Parameter, ...]], *, engines: int
) -> list[list[str]]:
    """The parts of the plan of each engine's ranks.

    Args:
        channels: all of the plan's.
        engine: parameters of each rank of an engine.
    """
    incoming: dict[tuple[int, int], dict[int, tuple[Piece, ...]]] = defaultdict(dict)
    for channel in channels:
        incoming[channel.engine, channel.engine_rank][channel.source_rank] = channel.targets
    return [
        [receiver_plan(parameters, incoming[index, rank]) for rank, parameters in enumerate(engine)]
        for index in range(engines)
    ]


def _together(transfer: Transfer, *calls: Callable[[], Any]) -> list[Any]:
    """Results of calls that depend on each other; a failure stops the others, and its cause is raised."""

    def guarded(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BaseException:
            transfer.abort()
            raise

    with ThreadPoolExecutor(len(calls)) as threads:
        futures = [threads.submit(guarded, call) for call in calls]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, HapoError) or isinstance(error, RankDiedError):
            raise error
    causes = [error for error in errors if not isinstance(error, TransferStoppedError)] or errors
    if causes:
        raise WeightSyncError("; ".join(dict.fromkeys(str(error) for error in causes))) from causes[0]
    return [future.result() for future in futures]
