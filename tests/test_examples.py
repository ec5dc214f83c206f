"""The launch files in `examples` are valid for their tools, and use commands and options that exist."""

from __future__ import annotations

import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from megatron_hapo.cli import _parser
from megatron_hapo.config import load_config
from tests.time_limits import patient

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])


def write_commands(folder: Path, bodies: dict[str, str]) -> None:
    """Write shell scripts that replace a cluster's own commands."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_run_torchrun_on_each_host(path: Path, tmp_path: Path) -> None:
    """Stand-ins for the cluster's commands record the arguments that torchrun gets on each host."""
    calls = tmp_path / "calls"
    stand_ins = {
        "scontrol": "printf 'n1\\nn2\\n'",
        "srun": f'shift; echo "$@" >> {calls}',
        "ssh": f'shift; echo "$@" >> {calls}',
    }
    write_commands(tmp_path, stand_ins)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7",
        "HOSTS": "n1 n2", "RANKS_PER_HOST": "4", "VENV": "/venv",
    }  # fmt: skip
    subprocess.run(["bash", str(path), "a.yaml", "output_dir=/runs/a b"], check=True, env=environment)
    hosts = 1 if path.suffix == ".sbatch" else 2
    lines = sorted(calls.read_text().splitlines())
    assert len(lines) == hosts
    for rank, line in enumerate(lines):
        assert "torchrun --nnodes 2 --nproc-per-node 4 " in line
        assert "n1:29500" in line or f"--node-rank {rank} --master-addr n1 --master-port 29500" in line
        _, _, command = line.partition("-m megatron_hapo ")
        arguments = shlex.split(command) if hosts == 2 else ["train", "a.yaml", "output_dir=/runs/a b"]
        assert _parser().parse_args(arguments).overrides == ["output_dir=/runs/a b"]


@pytest.mark.parametrize(("exit_code", "requeued"), [(1, True), (0, False)], ids=["steps remain", "run had ended"])
def test_the_slurm_job_is_requeued_after_its_time_limit(tmp_path: Path, exit_code: int, requeued: bool) -> None:
    """Stand-ins for Slurm's commands: before the limit the run gets SIGTERM, and the job waits for its checkpoint."""
    script, signals = EXAMPLES / "slurm/train.sbatch", tmp_path / "signals"
    assert "#SBATCH --signal=B:USR1@" in script.read_text()
    stand_ins = {
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol.calls; echo n1',
        "srun": f"touch {tmp_path}/running; until [[ -e {signals} ]]; do sleep 0.05; done; sleep 0.2; exit {exit_code}",
        "scancel": f'echo "$@" >> {signals}.part; mv {signals}.part {signals}',
    }
    write_commands(tmp_path, stand_ins)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"
    }  # fmt: skip
    with subprocess.Popen(["bash", str(script), "a.yaml"], env=environment) as job:
        deadline = time.monotonic() + patient(30)
        while not (tmp_path / "running").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=patient(30)) == exit_code
    assert signals.read_text() == "--signal=TERM 7\n"
    assert ("requeue 7" in (tmp_path / "scontrol.calls").read_text().splitlines()) == requeued


def test_the_kubernetes_job_is_consistent() -> None:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes/train.yaml").read_text())
    pod = job["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    arguments = container["args"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--rdzv-endpoint={first}:29500" in arguments
    assert f"--nnodes={job['spec']['parallelism']}" in arguments
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    names = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names

    train = arguments[arguments.index("train") :]
    parsed = _parser().parse_args(train)
    config = load_config(EXAMPLES.parent / parsed.config, parsed.overrides)
    ranks = next(int(a.partition("=")[2]) for a in arguments if a.startswith("--nproc-per-node"))
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    pods = job["spec"]["parallelism"]
    assert config.parallel.world_size == ranks * pods
    assert config.rollout.engines * config.rollout.tp == (gpus - ranks) * pods
