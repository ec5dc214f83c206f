"""The network address of a torchrun rank's host."""

from __future__ import annotations

import os
import socket

import psutil

from megatron_hapo.config import Config
from megatron_hapo.errors import ConfigError
from megatron_hapo.launch.torchrun.rank_rendezvous import RankPlace


def is_single_host(place: RankPlace, config: Config) -> bool:
    """Whether all ranks and engines of the run are on this host, so that loopback is enough."""
    cluster = os.environ.get("RAY_ADDRESS", "localhost").startswith(("localhost", "127."))
    return place.num_nodes == 1 and config.launch.engines != "own_nodes" and cluster


def own_address(*, single_host: bool) -> str:
    """This host's IP address as other nodes reach it; loopback if the run has a single host.

    Raises:
        ConfigError: the address is loopback, so other nodes could not reach it.
    """
    if single_host:
        return "127.0.0.1"
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if "RAY_ADDRESS" in os.environ:  # the ranks of a single node may meet on loopback
        host, _, port = os.environ["RAY_ADDRESS"].rpartition(":")
        master = host, int(port)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(master)  # sends nothing; the kernel chooses the route
        address = probe.getsockname()[0]
    if address.startswith("127."):
        raise ConfigError(
            [
                f"{socket.gethostname()} resolves its own address to {address}, which other nodes cannot reach; start "
                "torchrun there with --local-addr and its address in their network"
            ]
        )
    return address


def interface_of(address: str) -> str | None:
    """Name of the network interface with this address; None if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None
