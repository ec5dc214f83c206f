"""Ray for a run that torchrun did not start: one node of our own, or the cluster of RAY_ADDRESS."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants, worker
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # in a compiled module

from megatron_hapo.errors import RolloutError
from megatron_hapo.launch.ray import cluster
from megatron_hapo.launch.ray.node import start_environment, system_config, timed_out
from megatron_hapo.launch.ray.ray_death import NAMES, exit_with_ray
from megatron_hapo.private_folder import run_time_folder

logger = logging.getLogger(__name__)

_TRIES = 5
"""Starts of Ray that time out before the run fails."""
_POLL_SECONDS = 0.05
"""Between looks whether Ray's processes run."""
_AGAIN = "run the same command again"


@contextlib.contextmanager
def local_ray(start_timeout_seconds: float = 300, *, advice: str = _AGAIN) -> Iterator[None]:
    """A Ray of our own on the loopback interface, or the cluster that RAY_ADDRESS names, while the context is open.

    Temporary files of this process, and of a Ray of our own, are in a private folder meanwhile.

    Args:
        start_timeout_seconds: launch.start_timeout_seconds.
        advice: what the user can do if a Ray of our own dies, for the line in which that is reported.
    Raises:
        RolloutError: Ray did not start, or the cluster cannot be joined.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address is not None:  # where Ray looks for the cluster `auto`
        os.environ.setdefault("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))
    _interrupt_on_sigterm()
    with (
        run_time_folder() as folder,
        _own_ray(folder, start_timeout_seconds, advice) if address is None else cluster.connected(address),
    ):
        _interrupt_on_sigterm()  # Ray has set a handler of its own, which leaves its processes behind
        yield


@contextlib.contextmanager
def _own_ray(folder: Path, start_timeout_seconds: float, advice: str) -> Iterator[None]:
    # Ray's switch for "one node, on loopback", which it turns on by itself only on Windows and macOS: the constant for
    # this process, the variable for those that it starts.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Ray requires a token on every connection to a Ray that it starts. Its default is a file in the user's home folder,
    # which other users may be able to read; ours is new, and in the environment only.
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        AuthenticationTokenLoader.instance().reset_cache()
    os.environ |= start_environment(start_timeout_seconds)
    _log_rays_messages()
    # No actor asks for a CPU, and Ray would start an idle worker for each.
    _start_ray(
        {
            "address": "local", "include_dashboard": False, "num_cpus": 0,
            "log_to_driver": False, "logging_level": logging.ERROR,
            # Ray gives its own folder mode 0777, so it must be inside a private one.
            "_temp_dir": str(folder / "ray"),
            "_system_config": system_config(start_timeout_seconds),
        },
        start_timeout_seconds,
        advice,
    )  # fmt: skip
    try:
        with exit_with_ray(_core_processes(), _other_processes(), advice=advice):
            yield
    finally:
        ray.shutdown()


def _core_processes() -> dict[str, int]:
    """Process ids of the Ray that this process has started."""
    node: Any = worker._global_node
    assert node is not None, "Ray has started"
    return {name: info.process.pid for name in NAMES for info in node.all_processes[name]}


def _other_processes() -> list[psutil.Process]:
    """Ray's processes that would outlive its core by a minute, which is how long its agents wait for the raylet."""
    return [agent for pid in _core_processes().values() for agent in psutil.Process(pid).children(recursive=True)]


@contextlib.contextmanager
def _exit_with_starting_ray(advice: str) -> Iterator[None]:
    """`exit_with_ray` as soon as Ray's processes run: a driver that connects to them cannot be interrupted."""
    has_started = threading.Event()

    def watch() -> None:
        while worker._global_node is None:
            if has_started.wait(_POLL_SECONDS):
                return
        with exit_with_ray(_core_processes(), _other_processes(), advice=advice):
            has_started.wait()

    thread = threading.Thread(target=watch, name="Ray's start", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_started.set()
        thread.join()


def _start_ray(options: dict[str, Any], start_timeout_seconds: float, advice: str) -> None:
    """Starts Ray. Its processes wait half a minute for each other, which a busy machine may exceed: so it tries again.

    Raises:
        RolloutError: no try succeeded, or one failed for a reason that another try would not mend.
    """
    deadline = time.monotonic() + start_timeout_seconds
    for attempt in range(1, _TRIES + 1):
        try:
            with _exit_with_starting_ray(advice):
                ray.init(**options)
            return
        except Exception as error:  # Ray raises many types, for timeouts a bare Exception
            reason, is_late = f"{type(error).__name__}: {' '.join(str(error).split())}", timed_out(error)
            with contextlib.suppress(Exception):  # what has started of it
                ray.shutdown()
        if not is_late:
            raise RolloutError(f"Ray did not start: {reason}")
        if attempt == _TRIES or time.monotonic() > deadline:
            raise RolloutError(
                f"Ray did not start ({attempt} tries; launch.start_timeout_seconds={start_timeout_seconds:g}): {reason}"
            )
        logger.warning("Ray did not start (%s); trying again", reason)


def _log_rays_messages() -> None:
    """Ray prints a paragraph for each process that dies; from now on they are logged, below the level that is shown.

    Who died, and why, is in the error of the call that the process was to answer.
    """

    def log(data: dict[str, Any], ignore_prefix: bool) -> None:
        logger.debug("Ray: %s", " ".join(data["lines"]))

    worker.print_to_stdstream = log  # Ray 2.60; log_to_driver does not affect it


def _interrupt_on_sigterm() -> None:
    """SIGTERM ends the process as Ctrl-C does: whatever was started is closed."""

    def on_signal(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_signal)
