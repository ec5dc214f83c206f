"""Ray for a run that torchrun did not start: one node of our own, or the cluster of RAY_ADDRESS."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # in a compiled module

from megatron_hapo.launch.ray import cluster
from megatron_hapo.private_folder import run_time_folder

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of our own on the loopback interface, or the cluster that RAY_ADDRESS names, while the context is open.

    Temporary files of this process, and of a Ray of our own, are in a private folder meanwhile.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address is not None:  # where Ray looks for the cluster `auto`
        os.environ.setdefault("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))
    _interrupt_on_sigterm()
    with run_time_folder() as folder, _own_ray(folder) if address is None else cluster.connected(address):
        _interrupt_on_sigterm()  # Ray has set a handler of its own, which leaves its processes behind
        yield


@contextlib.contextmanager
def _own_ray(folder: Path) -> Iterator[None]:
    # Ray's switch for "one node, on loopback", which it turns on by itself only on Windows and macOS: the constant for
    # this process, the variable for those that it starts.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Ray requires a token on every connection to a Ray that it starts. Its default is a file in the user's home folder,
    # which other users may be able to read; ours is new, and in the environment only.
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        AuthenticationTokenLoader.instance().reset_cache()
    # No actor asks for a CPU, and Ray would start an idle worker for each.
    _start_ray(
        {
            "address": "local", "include_dashboard": False, "num_cpus": 0,
            "log_to_driver": False, "logging_level": logging.ERROR,
            # Ray gives its own folder mode 0777, so it must be inside a private one.
            "_temp_dir": str(folder / "ray"),
        }
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(options: dict[str, Any]) -> None:
    """Ray's processes wait half a minute for each other, which a busy machine may exceed: a timeout is retried once."""
    for last in (False, True):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises a bare Exception
            if last or "timed out during startup" not in str(error):
                raise
            logger.warning("Ray timed out during its start; trying once more")
            ray.shutdown()


def _interrupt_on_sigterm() -> None:
    """SIGTERM ends the process as Ctrl-C does: whatever was started is closed."""

    def on_signal(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_signal)
