"""The host of a torchrun rank on the network."""

from __future__ import annotations

import os
import socket

import psutil

from megatron_hapo.config import Config
from megatron_hapo.errors import ConfigError
from megatron_hapo.launch.torchrun.attempt import Place


def is_alone(place: Place, config: Config) -> bool:
    """Whether nothing of the run is on another host: neither ranks nor engines."""
    cluster = os.environ.get("RAY_ADDRESS", "localhost").startswith(("localhost", "127."))
    return place.num_nodes == 1 and config.launch.engines != "own_nodes" and cluster


def own_address(*, alone: bool) -> str:
    """This host's IP address for the other nodes; loopback if there are none.

    Raises:
        ConfigError: the others could not reach it.
    """
    if alone:
        return "127.0.0.1"
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if "RAY_ADDRESS" in os.environ:  # a single node's ranks may meet on loopback
        host, _, port = os.environ["RAY_ADDRESS"].rpartition(":")
        master = host, int(port)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(master)  # sends nothing; the kernel chooses the way
        address = probe.getsockname()[0]
    if address.startswith("127."):
        raise ConfigError(
            [
                f"{socket.gethostname()} is {address} for itself, which other nodes cannot reach; start torchrun there "
                "with --local-addr and its address in their network"
            ]
        )
    return address


def interface_of(address: str) -> str | None:
    """Name of the network interface with this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None
