"""A run that cannot start prints one line, under either launcher, and leaves no process behind. Real processes."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hapo.config import LaunchConfig
from megatron_hapo.launch.ray.cluster import RayNode
from tests.launch.test_torchrun import run_config
from tests.launch.torchrun_process import launched, torchrun, train_command, write_config
from tests.time_limits import patient

LAUNCHERS = ("ray", "torchrun")
PATIENCE_SECONDS = 300
"""Generous, for a busy machine."""
NO_GPU: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": ""}
ON_GPUS = ("device=cuda", "rollout.dtype=bfloat16", "trainer.dtype=bfloat16")


def fault(folder: Path, model: Path, launcher: str, *overrides: str, ranks: int = 1, **environment: str | None) -> str:
    """What a failed run has printed, without the log lines and without torchrun's own report about its processes."""
    config = run_config(model, folder, launcher)
    arguments = [*train_command(write_config(config, folder)), *overrides]
    start = [sys.executable] if launcher == "ray" else torchrun("--standalone", "--nproc-per-node", str(ranks))
    with launched([*start, *arguments], folder / f"{launcher}.log", environment=environment) as launch:
        assert launch.wait(PATIENCE_SECONDS) != 0
        launch.until_gone(60)
        lines = launch.text.splitlines()
    assert not config.run_dir.joinpath("metrics.jsonl").exists()
    ours = [
        line
        for line in lines
        if not re.match(
            r"[EWI]\d{4} |INFO |\[[\d-]{10} [\d:,]+ W |={5}|-{5}|\s|Traceback|Root Cause|Failures|\[\d\]:|$", line
        )
    ]
    return "\n".join(
        line for line in ours if not line.startswith(("torch.distributed.elastic", "megatron_hapo FAILED"))
    )


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is bound here, but on which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.slow
def test_a_node_with_fewer_gpus_than_ranks_is_reported(tiny_qwen3: Path, tmp_path: Path) -> None:
    assert fault(tmp_path, tiny_qwen3, "torchrun", *ON_GPUS, ranks=2, **NO_GPU) == (
        f"{socket.gethostname()}: 0 GPUs for 2 trainer ranks; start torchrun there with --nproc-per-node 1 and "
        "device=cpu everywhere"
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_model_that_does_not_fit_is_reported(tiny_qwen3: Path, tmp_path: Path, launcher: str) -> None:
    overrides = [*ON_GPUS, "parallel.gpu_memory=3GiB", "parallel.dp=1"]
    line = fault(tmp_path, tiny_qwen3, launcher, *overrides, **NO_GPU)
    assert re.fullmatch(
        r"command line: parallel: does not fit: a trainer rank.* needs .* GiB, but a GPU has 3.0 GiB; .*", line
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_unreachable_ray_head_is_reported(tiny_qwen3: Path, tmp_path: Path, launcher: str, closed_port: int) -> None:
    line = fault(tmp_path, tiny_qwen3, launcher, "parallel.dp=1", RAY_ADDRESS=f"127.0.0.1:{closed_port}")
    assert re.match(rf"no route to the Ray head at \S+:{closed_port} \(Connection refused\); ", line)


@pytest.mark.slow
def test_a_port_in_use_is_reported(tiny_qwen3: Path, tmp_path: Path, closed_port: int) -> None:
    line = fault(tmp_path, tiny_qwen3, "torchrun", "parallel.dp=1", f"launch.ray_port={closed_port}")
    assert line.startswith(f"launch.ray_port: 127.0.0.1:{closed_port} cannot be used (Address already in use); ")


@pytest.mark.slow
def test_a_wrong_token_is_reported(
    tiny_qwen3: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    settings = LaunchConfig(start_timeout_seconds=patient(600))
    head = RayNode(settings, folder=folder, ip="127.0.0.1", head_address=None)
    try:
        for launcher in LAUNCHERS:
            # Otherwise Ray would look for the head, which is on loopback, at this host's other address.
            loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
            environment = {"RAY_ADDRESS": head.address, "RAY_AUTH_TOKEN": "b" * 64, **loopback}
            line = fault(tmp_path, tiny_qwen3, launcher, "parallel.dp=1", **environment)
            assert "token" in line, launcher
            assert "\n" not in line, launcher
    finally:
        head.close()
