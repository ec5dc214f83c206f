"""Ray under torchrun: what keeps a node from starting is reported in one line each."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil
import pytest
from ray._private import ray_constants

from megatron_hapo.config import LaunchConfig
from megatron_hapo.errors import ConfigError, RolloutError
from megatron_hapo.launch.ray import node as ray_node
from megatron_hapo.launch.ray.cluster import (
    RayNode,
    address_to_join,
    cluster_token,
    connected,
    prepare_environment,
)
from tests.time_limits import patient


def test_a_busy_port_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_node, "_BUSY_SECONDS", 0.1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(ray_node.FaultError, match=rf"launch.ray_port: 127.0.0.1:{port} cannot be used .*; choose"):
            ray_node.start(head=True, address="", ip="127.0.0.1", port=port, ports=None, num_gpus=0, folder="")


def test_an_unreachable_head_is_reported_in_one_line() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nothing listens there
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ray_node.FaultError, match=rf"no route to the Ray head at {address} \(Connection refused\)"):
            ray_node.start(head=False, address=address, ip="127.0.0.1", port=0, ports=None, num_gpus=0, folder="")


def test_another_token_on_a_node_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "own")
    assert cluster_token() == "own"
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN of host2 is not that of rank 0; set the same"):
        prepare_environment("other", host="host2", loopback=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text("from a file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert cluster_token() == "from a file"
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    assert len(cluster_token()) == 64
    assert cluster_token() != cluster_token()


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "head"])
def test_an_address_that_ranks_cannot_join_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match="RAY_ADDRESS must be HOST:PORT"):
        address_to_join()


@pytest.mark.slow
def test_a_node_accepts_only_its_token_and_ends_with_its_owner(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    # What `prepare_environment` sets for one node on loopback; Ray may have been imported before.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    settings = LaunchConfig(start_timeout_seconds=patient(600))
    head = RayNode(settings, folder=folder, ip="127.0.0.1", head_address=None)
    try:
        monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
        with pytest.raises(RolloutError, match="token"):
            RayNode(settings, folder=folder, ip="127.0.0.1", head_address=head.address)
        with pytest.raises(RolloutError, match="token"), connected(head.address, ip="127.0.0.1"):
            pass
    finally:
        processes = psutil.Process(head._process.pid).children(recursive=True)
        head.close()
    assert len(processes) > 2
    _, alive = psutil.wait_procs(processes, timeout=patient(30))
    assert not alive
