"""One Ray node that lives as long as the trainer rank that started it: `python -m megatron_hapo.launch.ray.node`.

It reads one line of JSON (`start`'s arguments) and answers with one line: address and node id; or a fault, and whether
Ray merely timed out. Then it waits until its input is closed, which happens when the rank closes it or dies, and ends
the processes that it started.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from typing import Any

# Processes of an earlier attempt need a moment to end.
_BUSY_SECONDS = 5.0
_CONNECT_SECONDS = 10.0


class FaultError(Exception):
    """The reason why the node cannot start, in one line for the user."""


def start_environment(timeout_seconds: float) -> dict[str, str]:
    """Environment variables for a Ray that may take this long to start, with some tries of 30 s (Ray's own) or more."""
    return {"RAY_gcs_server_port_wait_time_s": str(max(30, int(timeout_seconds / 3)))}


def system_config(timeout_seconds: float) -> dict[str, Any]:
    """Ray's internal settings for a head that may take this long to start. Other nodes get them from the head.

    Without the first, the head's GCS keeps an event of every call, 3.3 kB each and up to 100,000 of them, which nothing
    of ours reads (Ray 2.60).
    """
    return {
        "task_events_report_interval_ms": 0,
        "worker_register_timeout_seconds": max(60, int(timeout_seconds)),
        "agent_register_timeout_ms": 1000 * max(100, int(timeout_seconds)),
    }


def refuses_token(error: Exception) -> bool:
    """Whether Ray failed because the head has another token. Ray (2.60) may wrap that into an error of its start."""
    return "InvalidAuthToken" in str(error)


def other_token(address: str) -> str:
    """The message for a head that refuses this process."""
    return f"the Ray head at {address} refuses this process's token; RAY_AUTH_TOKEN must be the same on all nodes"


def timed_out(error: Exception) -> bool:
    """Whether a start of Ray failed because its processes were not up in time, so that another one may succeed.

    Ray (2.60) has no type for that. Its messages: "The current node timed out during startup", "Failed to start GCS",
    "Failed to get node info", "Head node temp_dir not found in NodeInfo".
    """
    if refuses_token(error):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    signs = ("timed out", "timeout", "failed to start gcs", "failed to connect to gcs", "node info", "nodeinfo")
    return any(sign in str(error).lower() for sign in signs)


def start(
    *,
    head: bool,
    address: str,
    ip: str,
    port: int,
    ports: list[int] | None,
    num_gpus: int,
    folder: str,
    timeout_seconds: float = 300,
) -> Any:
    """The started node.

    Args:
        head: whether this node is the head.
        address: HOST:PORT of the head, unless this is the head.
        ip: of this node.
        port: of the head; 0: any free one.
        ports: first and last of the ports for everything else; None: any free ones.
        num_gpus: GPUs that Ray may give to engines.
        folder: for the node's sockets and logs. Ray gives it mode 0777, so it must be inside a private one.
        timeout_seconds: launch.start_timeout_seconds, which the head's processes follow where Ray lets us choose.
    Raises:
        FaultError: a port is in use, or the head cannot be reached.
    """
    if head and port:
        _wait_until_free(ip, port)
    if not head:
        check_reachable(address)
    if head:  # on other nodes it would also be the number of tries with a wrong token
        os.environ |= start_environment(timeout_seconds)
    import ray._private.node
    import ray._private.parameter

    first, last = ports or (None, None)
    parameters = ray._private.parameter.RayParams(
        gcs_address=None if head else address,
        gcs_server_port=port if head else None,
        node_ip_address=ip,
        temp_dir=folder,  # of this node; by default it would have the path of the head's
        # No actor asks for CPUs, and Ray would start a worker for each. Autoscaler and log monitor would only slow down
        # the start, in which Ray's processes wait no longer than 15 s for each other.
        num_cpus=0,
        include_log_monitor=False,  # type: ignore[arg-type]  # Ray annotates it as a string
        no_monitor=True,
        num_gpus=num_gpus,
        node_manager_port=first or 0,
        object_manager_port=None if first is None else first + 1,
        min_worker_port=0 if first is None else first + 2,
        max_worker_port=0 if last is None else last,
        dashboard_agent_listen_port=None,
        include_dashboard=False,
        _system_config=system_config(timeout_seconds) if head else None,
    )
    return ray._private.node.Node(parameters, head=head, shutdown_at_exit=True, spawn_reaper=True)


def _wait_until_free(ip: str, port: int) -> None:
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ip, port))
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise FaultError(
                        f"launch.ray_port: {ip}:{port} cannot be used ({error.strerror}); choose another, or 0 for any"
                    ) from None
        time.sleep(0.5)


def check_reachable(address: str) -> None:
    """Raises FaultError if no connection to HOST:PORT can be made."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise FaultError(
            f"no route to the Ray head at {address} ({error.strerror or error}); it must be running, and its port "
            "(launch.ray_port, or that of RAY_ADDRESS) open between the nodes"
        ) from None


def main() -> int:
    """Runs the node; returns the exit status."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray writes to stdout too
    request = json.loads(sys.stdin.readline())
    try:
        node = start(**request)
    except FaultError as fault:
        print(json.dumps({"fault": str(fault)}), file=answer, flush=True)
        return 1
    except Exception as error:  # any error is reported to the rank
        reason = f"Ray did not start: {type(error).__name__}: {' '.join(str(error).split())}"
        fault = {"fault": other_token(request["address"]) if refuses_token(error) else reason, "late": timed_out(error)}
        print(json.dumps(fault), file=answer, flush=True)
        return 1
    print(json.dumps({"address": node.gcs_address, "node_id": node.node_id}), file=answer, flush=True)
    sys.stdin.read()
    node.kill_all_processes(check_alive=False, allow_graceful=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
