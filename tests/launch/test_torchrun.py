"""A run under torchrun equals one under the Ray launcher, on one host and on two, and it fails and resumes correctly.

Real processes throughout: torchrun's agents, Megatron ranks over gloo, Ray nodes, an SGLang engine.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from megatron_hapo.config import Config, ProfileConfig
from tests.launch.torchrun_process import (
    Launch,
    kill_hard,
    launched,
    metrics_of,
    torchrun,
    train_command,
    two_hosts,
    write_config,
)
from tests.test_loop import assert_step_is_traced, make_config

SAME = {"rel": 1e-5, "abs": 1e-5}
RESUMED = {"rel": 1e-3, "abs": 1e-5}
"""A resumed optimizer rounds its state once more."""
START_SECONDS = 900
"""Upper bound for a whole run on a busy machine; it is no statement about how long a run should take."""

FAULT = """
import os

if os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    from megatron_hapo.trainer.over_ranks import RankObject

    results = RankObject.results

    def failing(self, method, arguments, options):
        if method == "update" and options["step"] == 2:
            raise ZeroDivisionError("a fault of the test")
        return results(self, method, arguments, options)

    RankObject.results = failing
"""


def run_config(model: Path, folder: Path, name: str, **weight_sync: object) -> Config:
    config = make_config(model, folder, {"dp": 2})
    return config.model_copy(
        update={
            "name": name,
            "steps": 3,
            "trainer": config.trainer.model_copy(update={"timeout_seconds": 600}),
            "rollout": config.rollout.model_copy(update={"timeout_seconds": 900}),
            "checkpoint": config.checkpoint.model_copy(update={"every": 1, "hf_at_end": False}),
            "weight_sync": config.weight_sync.model_copy(update=weight_sync),
            "launch": config.launch.model_copy(update={"start_timeout_seconds": 900}),
        }
    )


def num_rows(config: Config) -> int:
    return len(metrics_of(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def ray_metrics(tiny_qwen3: Path, folder: Path) -> list[dict[str, float]]:
    """Metrics of the run under the Ray launcher."""
    config = run_config(tiny_qwen3, folder, "ray")
    command = [sys.executable, *train_command(write_config(config, folder))]
    with launched(command, folder / "ray.log") as launch:
        assert launch.wait(START_SECONDS) == 0, launch.text[-6000:]
    metrics = metrics_of(config)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    return metrics


def assert_same(rows: list[dict[str, float]], want: list[dict[str, float]], tolerance: dict[str, float]) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in want]
    for row, other in zip(rows, want, strict=True):
        assert row == pytest.approx(other, **tolerance)


@pytest.mark.slow
def test_one_node_gives_the_metrics_of_the_ray_launcher_and_traces(
    tiny_qwen3: Path, folder: Path, ray_metrics: list[dict[str, float]]
) -> None:
    """The run is colocated, which does not change the metrics either."""
    config = run_config(tiny_qwen3, folder, "one_node").model_copy(
        update={"placement": "colocated", "profile": ProfileConfig(steps=(2,))}
    )
    command = torchrun("--standalone", "--nproc-per-node", "2", *train_command(write_config(config, folder)))
    with launched(command, folder / "one_node.log") as launch:
        assert launch.wait(START_SECONDS) == 0, launch.text[-6000:]
        launch.until_gone(60)
    assert_same(metrics_of(config), ray_metrics, SAME)
    assert_step_is_traced(config.run_dir / "profile/step_00000002", config)


@pytest.mark.slow
def test_rank_0_reports_a_failed_rank_and_the_restart_resumes(
    tiny_qwen3: Path, folder: Path, ray_metrics: list[dict[str, float]]
) -> None:
    config = run_config(tiny_qwen3, folder, "failed_rank", method="gather")
    (folder / "fault").mkdir()
    (folder / "fault/sitecustomize.py").write_text(FAULT)
    paths = os.pathsep.join([str(folder / "fault"), str(Path(__file__).parents[2])])
    command = torchrun(
        "--nnodes", "1", "--nproc-per-node", "2", "--max-restarts", "1", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", *train_command(write_config(config, folder)),
    )  # fmt: skip
    with launched(command, folder / "failed_rank.log", environment={"PYTHONPATH": paths}) as launch:
        assert launch.wait(2 * START_SECONDS) == 0, launch.text[-6000:]
        launch.until_gone(60)
        assert "trainer rank 1 (" in launch.text
        assert "in failing" in launch.text
        assert "ZeroDivisionError: a fault of the test" in launch.text
        assert f"resuming from {config.run_dir.absolute()}/checkpoints/step_00000001" in launch.text
    assert_same(metrics_of(config), ray_metrics, RESUMED)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and `ip`")
def test_two_hosts_give_the_same_metrics_and_survive_the_loss_of_one(
    tiny_qwen3: Path, folder: Path, ray_metrics: list[dict[str, float]]
) -> None:
    # Enough steps that the run cannot end before it notices the loss.
    config = run_config(tiny_qwen3, folder, "two_hosts").model_copy(update={"steps": 30})
    path = write_config(config, folder)
    with two_hosts() as hosts:
        (first, address), (second, other_address) = hosts.items()

        def agent(namespace: str, own_address: str) -> list[str]:
            return torchrun(
                "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1", "--rdzv-backend", "c10d",
                "--rdzv-endpoint", f"{address}:29400", "--rdzv-conf", f"is_host={int(namespace == first)}",
                "--local-addr", own_address, *train_command(path), namespace=namespace,
            )  # fmt: skip

        # Without it, an agent that rejoins waits for values that torchrun sets in the first rendezvous round only.
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with launched(agent(first, address), folder / "host_1.log", environment) as one:
            with launched(agent(second, other_address), folder / "host_2.log", environment) as two:
                one.until(lambda: num_rows(config) >= 3, "second step", START_SECONDS)
                two.note()
                assert_same(metrics_of(config)[:3], ray_metrics[:3], SAME)
                assert "direct weight sync by messages (gloo)" in one.text + two.text
                kill_hard(two.process)
                report = "the torchrun agent of trainer rank 1 ("
                one.until(lambda: report in one.text, "report of the lost host", 60)
                two.until_gone(60)
            with launched(agent(second, other_address), folder / "host_2_again.log", environment) as again:
                codes = [one.wait(2 * START_SECONDS), again.wait(60)]
                assert codes == [0, 0], one.text[-6000:] + again.text[-6000:]
                again.until_gone(60)
            one.until_gone(60)
        assert "resuming from" in one.text + again.text  # either may have become rank 0
    rows = metrics_of(config)
    assert [row["step"] for row in rows] == list(range(31))
    assert_same(rows[: len(ray_metrics)], ray_metrics, RESUMED)


@pytest.mark.slow
def test_a_run_that_was_asked_to_stop_ends_with_a_checkpoint(tiny_qwen3: Path, folder: Path) -> None:
    """SIGTERM to the agent, as Slurm and Kubernetes send it."""
    config = run_config(tiny_qwen3, folder, "stopped").model_copy(update={"steps": 1000})
    command = torchrun(
        "--standalone", "--nproc-per-node", "2", "--shutdown-timeout", "600",
        *train_command(write_config(config, folder)),
    )  # fmt: skip
    with launched(command, folder / "stopped.log") as launch:
        launch.until(lambda: num_rows(config) >= 2, "first step", START_SECONDS)
        launch.process.terminate()
        launch.until(lambda: launch.process.poll() is not None, "end", 600)
        launch.until_gone(60)
        assert "the same command continues" in launch.text
    newest = sorted((config.run_dir / "checkpoints").glob("step_*"))[-1]
    assert int(newest.name.removeprefix("step_")) == metrics_of(config)[-1]["step"]


def test_a_world_size_that_is_not_the_layouts_is_one_line(tiny_qwen3: Path, tmp_path: Path) -> None:
    config = run_config(tiny_qwen3, tmp_path, "uneven").model_copy(update={"steps": 1})
    command = torchrun("--standalone", "--nproc-per-node", "3", *train_command(write_config(config, tmp_path)))
    with launched(command, tmp_path / "log") as launch:
        assert launch.wait(300) != 0
        lines = [line for line in launch.text.splitlines() if line.startswith("parallel: ")]
        assert lines == [
            "parallel: tp=1 x pp=1 x cp=1 x dp=2 are 2 ranks, torchrun started 3; set parallel.dp=3, or start 2 ranks"
        ]
        assert not config.run_dir.exists()


def test_the_helper_sees_processes_that_lose_their_parent(tmp_path: Path) -> None:
    """`Launch`, which these tests rely on, also notices orphans."""
    with launched(["sh", "-c", "sleep 30 & sleep 1"], tmp_path / "log") as launch:
        assert isinstance(launch, Launch)
        assert launch.wait(20) == 0
        assert not launch.all_gone()
    launch.until_gone(10)
