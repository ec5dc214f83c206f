"""Rendezvous of a run's ranks in torchrun's store, which may outlive several attempts to run.

After a restart the store may still hold the keys of the earlier attempt, and agents do not always agree on the number
of restarts. So rank 0 gives every attempt a new name, and a rank never joins an attempt that was joined by its
predecessor.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megatron_hapo.config import Config
from megatron_hapo.errors import ConfigError, HapoError, TrainingError

_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """This process's position among the ranks and nodes of torchrun."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    num_nodes: int

    @classmethod
    def from_environment(cls) -> RankPlace:
        """The position that torchrun's environment variables state."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
        rank, world_size, local_rank, local_world_size, node, num_nodes = (int(os.environ[name]) for name in names)
        return cls(
            rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size,
            node=node, num_nodes=num_nodes,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """What a rank reports to rank 0 when it joins."""

    host: str
    process: int
    """Process id."""
    ranks_here: int
    """Number of ranks on its node."""
    num_gpus: int
    """Number of GPUs visible on its node."""
    config: dict[str, Any] | None
    """The config as this rank read it; None if it could not."""
    fault: str | None = None
    """Why this rank cannot take part; None if it can."""


class AttemptCancelledError(HapoError):
    """Rank 0 cancelled the attempt; it reports the reason to the user."""


def open_store() -> Store:
    """The store that torchrun names. Its first agent hosts it, or rank 0 (TORCH_DISABLE_SHARE_RDZV_TCP_STORE)."""
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=60)))
    return store


def announce(store: Store) -> str:
    """The name of a new attempt, which rank 0 publishes for the other ranks."""
    name = secrets.token_hex(8)
    store.set("megatron_hapo/attempt", name)
    return name


def gather_infos(
    store: Store, attempt: str, *, world_size: int, own: RankInfo, timeout_seconds: float
) -> list[RankInfo]:
    """What every rank reports, in the order of ranks, once all have joined. Called on rank 0.

    Raises:
        TrainingError: some ranks did not join in time.
    """
    infos, deadline = [own], time.monotonic() + timeout_seconds
    for rank in range(1, world_size):
        key = _key(attempt, f"info/{rank}")
        while not store.check([key]):
            if time.monotonic() > deadline:
                late = [r for r in range(rank, world_size) if not store.check([_key(attempt, f"info/{r}")])]
                raise TrainingError(f"trainer ranks {late} did not start within {timeout_seconds:g} s")
            time.sleep(_POLL_SECONDS)
        infos.append(RankInfo(**json.loads(store.get(key))))
    return infos


def attempt_store(store: Store, attempt: str) -> Store:
    """A view of the store for this attempt alone."""
    return PrefixStore(_key(attempt, "run"), store)


def release(store: Store, attempt: str, instructions: dict[str, Any]) -> None:
    """Let the other ranks start, with instructions for them. Called on rank 0."""
    store.set(_key(attempt, "instructions"), json.dumps(instructions))


def cancel(store: Store, attempt: str) -> None:
    """Let no rank start: their `join` raises AttemptCancelledError. Called on rank 0."""
    store.set(_key(attempt, "instructions"), "null")


def join(store: Store, info: RankInfo, *, rank: int, timeout_seconds: float) -> tuple[Store, dict[str, Any]]:
    """The attempt's own store and rank 0's instructions. Called on every rank but 0.

    Raises:
        AttemptCancelledError: rank 0 cancelled the attempt.
        TrainingError: rank 0 did not start the run in time.
    """
    deadline = time.monotonic() + timeout_seconds
    attempt, earlier = "", set()
    while time.monotonic() < deadline:
        newest = store.get("megatron_hapo/attempt").decode() if store.check(["megatron_hapo/attempt"]) else ""
        if newest != attempt and newest not in earlier:
            if store.add(_key(newest, f"joined/{rank}"), 1) > 1:
                earlier.add(newest)
            else:
                attempt = newest
                store.set(_key(attempt, f"info/{rank}"), json.dumps(asdict(info)))
        if attempt and store.check([_key(attempt, "instructions")]):
            instructions = json.loads(store.get(_key(attempt, "instructions")))
            if instructions is None:
                raise AttemptCancelledError("rank 0 cancelled the run")
            return attempt_store(store, attempt), instructions
        time.sleep(_POLL_SECONDS)
    raise TrainingError(f"{socket.gethostname()}: rank 0 did not start the run within {timeout_seconds:g} s")


def check_world_size(config: Config, world_size: int) -> None:
    """Check that torchrun started as many ranks as the config's layout has.

    Raises:
        ConfigError: it did not.
    """
    parallel = config.parallel
    if parallel.world_size == world_size:
        return
    model_parallel = parallel.tp * parallel.pp * parallel.cp
    if world_size % model_parallel == 0:
        hint = f"set parallel.dp={world_size // model_parallel}, or start {parallel.world_size} ranks"
    else:
        hint = f"the number of ranks must be a multiple of tp x pp x cp = {model_parallel}"
    raise ConfigError(
        [
            f"parallel: tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} x dp={parallel.dp} are "
            f"{parallel.world_size} ranks, torchrun started {world_size}; {hint}"
        ]
    )


def check_infos(infos: Sequence[RankInfo], *, device: str) -> None:
    """Check that the ranks can work together, from what each of them reports.

    Raises:
        ConfigError: they cannot; it lists every fault once.
    """
    faults: list[str] = []
    for info in infos:
        if info.fault is not None:
            faults += [f"{info.host}: {line}" for line in info.fault.splitlines()]
        elif device == "cuda" and info.num_gpus < info.ranks_here:
            faults.append(
                f"{info.host}: {info.num_gpus} GPUs for {info.ranks_here} trainer ranks; start torchrun there with "
                f"--nproc-per-node {info.num_gpus or '1 and device=cpu everywhere'}"
            )
        else:
            faults += [f"{info.host}: {difference}" for difference in _differences(infos[0].config, info.config)]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))


def _differences(ours: Any, theirs: Any, key: str = "") -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted(ours.keys() | theirs.keys()):
            yield from _differences(ours.get(name), theirs.get(name), f"{key}.{name}" if key else name)
    elif ours != theirs:
        yield f"its config has {key}={theirs}, rank 0's has {key}={ours}; start every node with the same config"


def _key(attempt: str, name: str) -> str:
    return f"megatron_hapo/{attempt}/{name}"
