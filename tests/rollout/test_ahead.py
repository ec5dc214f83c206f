"""The whole loop with groups that are generated during training, with one engine; the real parts of `test_loop`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_hapo.config import Config, dump_config, load_config
from megatron_hapo.data.job_prompts import training_prompts
from megatron_hapo.data.prompts import load_tokenizer
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.rank_actors import RankProcesses
from megatron_hapo.launch.ray.ray_launcher import RayLauncher
from megatron_hapo.launch.run import run_training
from megatron_hapo.reward.pool import ProcessRewardPool
from megatron_hapo.types import pack_rollouts
from tests.observe.test_metrics import documented_metrics
from tests.test_loop import finished_run, is_timed, make_config, metrics_of, pausing_pool, sampling_of


@pytest.fixture(scope="module")
def pool(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayRolloutPool]:
    with pausing_pool(tiny_qwen3, tmp_path_factory.mktemp("pool")) as opened:
        yield opened


def ahead_config(model: Path, folder: Path, in_flight: str, *, staleness: int) -> Config:
    """A run of staleness + 2 steps."""
    values = make_config(model, folder, {"tp": 1}).model_dump()
    values |= {"steps": staleness + 2, "async": {"max_staleness": staleness}, "record": {"every": 1, "groups": None}}
    values["algorithm"]["importance_correction"] = {"level": "token"}
    values["rollout"]["top_p"] = 0.9
    values["weight_sync"]["in_flight"] = in_flight
    return Config.model_validate(values)


class LauncherInOpenRay(RayLauncher):
    """The launcher of a run with Ray alone, in the Ray that is open already."""

    @contextmanager
    def ray_cluster(self) -> Iterator[None]:
        self._processes = RankProcesses(self._config, device=self.device)
        yield


def test_rollouts_generated_one_step_ahead_are_one_version_old_and_can_be_replayed(
    pool: RayRolloutPool, tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ahead_config(tiny_qwen3, tmp_path, "finish", staleness=1)
    with finished_run(config, pool) as run:
        run["trainer"].export_hf(config.run_dir / "hf")
        before, *steps = metrics_of(run)
        versions = [{rollout.policy_version for rollout in rollouts} for _, rollouts in run["recorder"].generated]
    assert before["step"] == 0
    assert [row["rollout/staleness"] for row in steps] == [0, 1, 1]
    # evaluation, steps 1 and 2 from the first weights, evaluation, step 3 from the second, two evaluations
    assert sorted(versions[:3], key=str) == [{0}, {0}, {0}]
    assert versions[3:] == [{1}, {1}, {2}, {3}]
    for row in steps:
        assert row["weights/max"] <= 2
        assert {"time/rollout", "time/rollout_wait", "time/reward"} <= row.keys()
        assert row.keys() <= documented_metrics() | {"step"}

    for part in (RayRolloutPool, ProcessRewardPool):
        monkeypatch.setattr(part, "__init__", None)  # no engine and no reward worker can be started
    dump_config(config, tmp_path / "run.yaml")
    again = load_config(tmp_path / "run.yaml", [f"replay={config.run_dir / 'rollouts'}", "name=again"])
    run_training(again, LauncherInOpenRay(again, device="cpu"))
    assert_same_training(steps, metrics_of({"config": again}))
    for path in (config.run_dir / "hf").glob("*.safetensors"):
        assert (again.run_dir / "hf" / path.name).read_bytes() == path.read_bytes()
    tables = [pq.read_table(folder / "rollouts/step_00000003.parquet") for folder in (config.run_dir, again.run_dir)]
    assert tables[0].equals(tables[1])


def assert_same_training(expected: list[dict[str, float]], rows: list[dict[str, float]]) -> None:
    """The rows of a run's steps have the same numbers, bit for bit, except times and evaluations."""

    def comparable(row: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in row.items() if not is_timed(name) and not name.startswith("eval/")}

    assert list(map(comparable, rows)) == list(map(comparable, expected))


def test_unfinished_rollouts_continue_after_a_sync(pool: RayRolloutPool, tiny_qwen3: Path, tmp_path: Path) -> None:
    """Two steps ahead; every prompt is trained on once."""
    config = ahead_config(tiny_qwen3, tmp_path, "pause", staleness=2)
    with finished_run(config, pool) as run:
        _, *steps = metrics_of(run)
        assert steps[0]["rollout/staleness"] == 0
        assert all(row["rollout/staleness_max"] <= 2 for row in steps)
        assert all(row["rollout/dropped_groups"] == 0 for row in steps)

        # From here on all versions have the same weights, so the trainer can score tokens of several versions.
        version, sampling = 100, replace(sampling_of(run, 4), samples=64, top_p=0.95, keep_cut=True)
        with ThreadPoolExecutor(1) as thread:
            generation = thread.submit(pool.generate, run["prompts"], sampling)
            while not generation.done():
                time.sleep(0.1)
                version += 1
                run["weight_sync"].sync(policy_version=version)
        rollouts = [rollout for group in generation.result() for rollout in group]
        scores = run["trainer"].log_probs(pack_rollouts(rollouts))
    assert [rollout.prompt.uid for rollout in rollouts[::64]] == [prompt.uid for prompt in run["prompts"]]
    assert len({tuple(rollout.response_ids) for rollout in rollouts}) > 250  # every response has its own seed
    assert any(len(set(rollout.policy_versions)) > 1 for rollout in rollouts)
    recorded = np.concatenate([rollout.rollout_log_probs for rollout in rollouts])
    np.testing.assert_allclose(scores.rollout_temperature_log_probs, recorded, atol=2e-3)
    drawn = training_prompts(config, load_tokenizer(config.model.path)).next(4 * config.steps)
    tables = [pq.read_table(path) for path in (config.run_dir / "rollouts").glob("step_*.parquet")]
    trained = [uid for table in tables for uid in table["uid"].to_pylist()]
    assert sorted(trained) == sorted(prompt.uid for prompt in drawn for _ in range(4))
