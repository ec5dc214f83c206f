"""Ray under torchrun: the first rank of each node keeps a Ray node; rank 0's is the head, or all join RAY_ADDRESS."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_hapo.config import Config, LaunchConfig
from megatron_hapo.errors import ConfigError, RolloutError
from megatron_hapo.launch.places import GpuPlacement, spread
from megatron_hapo.launch.ray.node import FaultError, check_reachable, other_token, refuses_token

_SHUTDOWN_SECONDS = 20.0
_HOST_AND_PORT = re.compile(r"[^:/]+:\d+")


def cluster_token() -> str:
    """Rank 0: Ray's token, from the environment or the cluster to join; otherwise a new one."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    paths = [Path(os.environ["RAY_AUTH_TOKEN_PATH"])] if "RAY_AUTH_TOKEN_PATH" in os.environ else []
    if "RAY_ADDRESS" in os.environ:
        paths.append(Path.home() / ".ray/auth_token")
    for path in paths:
        if path.is_file():
            return path.read_text().strip()
    return secrets.token_hex(32)


def address_to_join() -> str | None:
    """The address of the user's own cluster; None where there is none.

    Raises:
        ConfigError: RAY_ADDRESS is not a host and port.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address is not None and _HOST_AND_PORT.fullmatch(address) is None:
        raise ConfigError([f"RAY_ADDRESS must be HOST:PORT of the cluster's head under torchrun, got {address!r}"])
    return address


def prepare_environment(token: str, *, host: str, loopback: bool) -> None:
    """Sets what this process and every Ray process that it starts need; Ray reads it when it is imported.

    Args:
        loopback: whether nothing of Ray may be reachable from another host.
    Raises:
        ConfigError: the environment has another token.
    """
    own = os.environ.get("RAY_AUTH_TOKEN")
    if own is not None and own != token:
        raise ConfigError(
            [f"RAY_AUTH_TOKEN of {host} is not that of rank 0; set the same on every node, or on none of them"]
        )
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    if loopback:
        # Ray's switch for one node on loopback, which it turns on by itself only on Windows and macOS.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


class RayNode:
    """The Ray node of this host, in a process of its own that ends with this one."""

    def __init__(
        self, settings: LaunchConfig, *, folder: Path, ip: str, head_address: str | None, gpus: Sequence[str] = ()
    ):
        """Starts it.

        Args:
            folder: private, for the node's sockets and logs.
            ip: of this host.
            head_address: HOST:PORT of the head; None makes this node the head.
            gpus: for engines; none on a CPU.
        Raises:
            RolloutError: it did not start.
        """
        environment = dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        request = {
            "head": head_address is None,
            "address": head_address or "",
            "ip": ip,
            "port": settings.ray_port,
            "ports": settings.ray_worker_ports,
            "num_gpus": len(gpus),
            "folder": str(folder / "ray"),
            "timeout_seconds": settings.start_timeout_seconds,
        }
        deadline = time.monotonic() + settings.start_timeout_seconds
        answer: dict[str, Any] = {"fault": "", "late": True}
        # Ray's processes give each other 15 to 30 s, which is too short on a busy machine.
        while answer.get("late") and time.monotonic() < deadline:
            self._process = _start_process(environment)
            try:
                answer = _ask(self._process, request, deadline - time.monotonic())
            except BaseException:
                self.close()
                raise
            if "fault" in answer:
                self.close()
        if "fault" in answer:
            raise RolloutError(answer["fault"])
        self.address, self.node_id = answer["address"], answer["node_id"]

    def close(self) -> None:
        """Ends the node; kills it if it does not end in time."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(_SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the kernel ends Ray's own processes with it
            self._process.wait()


def _start_process(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_hapo.launch.ray.node"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # a signal to the rank's process group must not end Ray while the driver uses it
    )


def _ask(process: subprocess.Popen[bytes], request: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    line = process.stdout.readline() if select.select([process.stdout], [], [], timeout_seconds)[0] else b""
    if not line:
        return {"fault": f"Ray did not start on {request['ip']} within launch.start_timeout_seconds"}
    return json.loads(line)


@contextlib.contextmanager
def connected(address: str, *, ip: str | None = None) -> Iterator[None]:
    """This process is a driver of the cluster while the context is open.

    Args:
        ip: of this node, where Ray would find another.
    Raises:
        RolloutError: the cluster cannot be reached, or refuses this process.
    """
    import ray
    from ray._private import ray_constants, services

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if ip is not None:
        options["_node_ip_address"] = ip
    if _HOST_AND_PORT.fullmatch(address) is not None:
        try:
            # Ray would try for minutes, and where the address is loopback, at this host's other address.
            check_reachable(services.canonicalize_bootstrap_address(address) or address)
        except FaultError as fault:
            raise RolloutError(str(fault)) from None
        # The head can be reached; with another token Ray would retry 20 times, a second each.
        ray_constants.NUM_REDIS_GET_RETRIES = 5
    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises many types
        if refuses_token(error):
            raise RolloutError(other_token(address)) from error
        reason = " ".join(str(error).split())
        raise RolloutError(
            f"cannot join Ray at {address}: {type(error).__name__}: {reason}; this process must have the cluster's "
            "token (RAY_AUTH_TOKEN) and its version of Ray"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def place_engines(config: Config, *, trainer_nodes: Sequence[str], device: str) -> list[GpuPlacement]:
    """The node of each engine with GPUs of its own, as `launch.engines` says; waits for nodes that have yet to join.

    Args:
        trainer_nodes: Ray's ids of the nodes with trainer ranks.
    Raises:
        ConfigError: the nodes cannot hold the engines.
    """
    rollout, settings = config.rollout, config.launch
    deadline = time.monotonic() + settings.start_timeout_seconds
    own = settings.engines == "own_nodes"
    while True:
        gpus, addresses = _free_gpus(trainer_nodes, own_nodes=own)
        nodes = spread(gpus, engines=rollout.engines, tp=rollout.tp, on_gpus=device == "cuda")
        if nodes is not None:
            return [GpuPlacement(node) for node in nodes]
        if not own or time.monotonic() > deadline:
            break
        time.sleep(1)
    where = ", ".join(f"{addresses[node]} ({count} GPUs free)" for node, count in gpus.items())
    wanted = f"{rollout.engines} engines of tp={rollout.tp}"
    if own:
        hint = f"no such node joined within {settings.start_timeout_seconds:g} s; use `ray start --address`"
    else:
        hint = "start fewer ranks a node, or set launch.engines=own_nodes"
    raise ConfigError([f"launch.engines: {settings.engines} cannot hold {wanted}: {where or 'no such node'}; {hint}"])


def _free_gpus(trainer_nodes: Sequence[str], *, own_nodes: bool) -> tuple[dict[str, int], dict[str, str]]:
    """GPUs of each node that may hold engines, and its address."""
    import ray

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    if own_nodes:
        chosen = [name for name in nodes if name not in trainer_nodes]
    else:
        chosen = [name for name in trainer_nodes if name in nodes]
    gpus = {name: int(nodes[name]["Resources"].get("GPU", 0)) for name in chosen}
    return gpus, {name: nodes[name]["NodeManagerAddress"] for name in chosen}
