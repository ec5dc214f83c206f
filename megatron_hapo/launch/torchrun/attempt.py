"""One attempt of torchrun's ranks: they find each other in the rendezvous store, which may outlive attempts.

After a restart the store may still hold what the earlier attempt left, and agents need not count restarts alike. So
rank 0 names every attempt anew, and an attempt in which a rank has been before is not the one that it belongs to.
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
class Place:
    """Where torchrun put this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    num_nodes: int

    @classmethod
    def from_environment(cls) -> Place:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
        rank, world_size, local_rank, local_world_size, node, num_nodes = (int(os.environ[name]) for name in names)
        return cls(
            rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size,
            node=node, num_nodes=num_nodes,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a rank says of itself when it comes."""

    host: str
    process: int
    ranks_here: int
    """On its node."""
    num_gpus: int
    """Visible on its node."""
    config: dict[str, Any] | None
    """As this rank read it; None where it could not."""
    fault: str | None = None
    """Why this rank cannot work."""


class RefusedError(HapoError):
    """Rank 0 has called the attempt off, and tells the user why."""


def open_store() -> Store:
    """The store that torchrun names; of its first agent, or of rank 0 itself (TORCH_DISABLE_SHARE_RDZV_TCP_STORE)."""
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=60)))
    return store


def announce(store: Store) -> str:
    """Rank 0: the name of a new attempt, for which the others look."""
    name = secrets.token_hex(8)
    store.set("megatron_hapo/attempt", name)
    return name


def gather_facts(store: Store, attempt: str, *, world_size: int, own: Facts, timeout_seconds: float) -> list[Facts]:
    """Rank 0: what every rank says, in the order of ranks, once all have come.

    Raises:
        TrainingError: some did not come in time.
    """
    facts, deadline = [own], time.monotonic() + timeout_seconds
    for rank in range(1, world_size):
        key = _key(attempt, f"facts/{rank}")
        while not store.check([key]):
            if time.monotonic() > deadline:
                late = [r for r in range(rank, world_size) if not store.check([_key(attempt, f"facts/{r}")])]
                raise TrainingError(f"trainer ranks {late} did not start within {timeout_seconds:g} s")
            time.sleep(_POLL_SECONDS)
        facts.append(Facts(**json.loads(store.get(key))))
    return facts


def run_store(store: Store, attempt: str) -> Store:
    """A store for this attempt alone."""
    return PrefixStore(_key(attempt, "run"), store)


def begin(store: Store, attempt: str, orders: dict[str, Any]) -> None:
    """Rank 0: let the others begin, with what they are to know."""
    store.set(_key(attempt, "orders"), json.dumps(orders))


def call_off(store: Store, attempt: str) -> None:
    """Rank 0: nobody is to begin."""
    store.set(_key(attempt, "orders"), "null")


def join(store: Store, facts: Facts, *, rank: int, timeout_seconds: float) -> tuple[Store, dict[str, Any]]:
    """The other ranks: the attempt's own store, and rank 0's orders.

    Raises:
        RefusedError: rank 0 called it off.
        TrainingError: rank 0 did not come in time.
    """
    deadline = time.monotonic() + timeout_seconds
    attempt, of_another_time = "", set()
    while time.monotonic() < deadline:
        newest = store.get("megatron_hapo/attempt").decode() if store.check(["megatron_hapo/attempt"]) else ""
        if newest != attempt and newest not in of_another_time:
            if store.add(_key(newest, f"came/{rank}"), 1) > 1:
                of_another_time.add(newest)
            else:
                attempt = newest
                store.set(_key(attempt, f"facts/{rank}"), json.dumps(asdict(facts)))
        if attempt and store.check([_key(attempt, "orders")]):
            orders = json.loads(store.get(_key(attempt, "orders")))
            if orders is None:
                raise RefusedError("rank 0 called the run off")
            return run_store(store, attempt), orders
        time.sleep(_POLL_SECONDS)
    raise TrainingError(f"rank 0 did not begin within {timeout_seconds:g} s on {socket.gethostname()}")


def check_world_size(config: Config, world_size: int) -> None:
    """Raises ConfigError if the layout is not for so many ranks."""
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


def check_facts(facts: Sequence[Facts], *, device: str) -> None:
    """Raises ConfigError with everything that keeps the ranks from working together, from what each says of itself."""
    faults: list[str] = []
    for fact in facts:
        if fact.fault is not None:
            faults += [f"{fact.host}: {line}" for line in fact.fault.splitlines()]
        elif device == "cuda" and fact.num_gpus < fact.ranks_here:
            faults.append(
                f"{fact.host}: {fact.num_gpus} GPUs for {fact.ranks_here} trainer ranks; start torchrun there with "
                f"--nproc-per-node {fact.num_gpus or '1 and device=cpu everywhere'}"
            )
        else:
            faults += [f"{fact.host}: {difference}" for difference in _differences(facts[0].config, fact.config)]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))


def _differences(ours: Any, theirs: Any, key: str = "") -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted(ours.keys() | theirs.keys()):
            yield from _differences(ours.get(name), theirs.get(name), f"{key}.{name}" if key else name)
    elif ours != theirs:
        yield f"its config says {key}={theirs}, that of rank 0 {key}={ours}; start every node with the same config"


def _key(attempt: str, name: str) -> str:
    return f"megatron_hapo/{attempt}/{name}"
