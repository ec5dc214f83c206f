"""The whole loop with experts: the trainer gets those of the engine, or chooses its own, which can be run again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hapo.config import Config, dump_config, load_config
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.launch.run import run_training
from tests.observe.test_metrics import documented_metrics
from tests.rollout.test_ahead import LauncherInOpenRay, assert_same_training
from tests.test_loop import finished_run, make_config, metrics_of
from tests.tiny_families import write_family

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Engine in bfloat16 and trainer in float32 round differently, so that their routers disagree here and there."""
    folder = tmp_path_factory.mktemp("experts")
    model = write_family(folder / "model", "qwen3_moe", tokenizer=True, num_experts=8, moe_intermediate_size=32)
    values = make_config(model, folder, {"ep": 2, "dp": 2}).model_dump()
    values["rollout"] |= {"dtype": "bfloat16", "compare_routes_every": 1, "max_prompt_tokens": 128}
    return Config.model_validate(values | {"async": {"max_staleness": 0}})


@pytest.fixture(scope="module")
def pool(config: Config) -> Iterator[RayRolloutPool]:
    with local_ray():
        opened = RayRolloutPool(config, device="cpu")
        try:
            opened.wait_until_ready()
            yield opened
        finally:
            opened.close()


def test_a_run_replays_the_engines_experts(config: Config, pool: RayRolloutPool) -> None:
    with finished_run(config, pool) as run:
        _, *steps = metrics_of(run)
    assert len(steps) == 2
    for row in steps:
        assert row.keys() <= documented_metrics() | {"step"}
        assert 0.8 < row["rollout/route_agreement"] < 1
        assert row["rollout/mismatch_kl"] < row["rollout/unreplayed_mismatch_kl"]


def test_a_run_whose_trainer_chose_its_experts_can_be_replayed(
    config: Config, pool: RayRolloutPool, tmp_path: Path
) -> None:
    """From its records, bit for bit."""
    values = config.model_dump() | {"output_dir": tmp_path, "record": {"every": 1, "groups": None}}
    values["rollout"] |= {"replay_routes": False, "compare_routes_every": 0}
    own = Config.model_validate(values)
    with finished_run(own, pool) as run:
        run["trainer"].export_hf(own.run_dir / "hf")
        _, *steps = metrics_of(run)
    assert not any("rollout/route_agreement" in row for row in steps)
    dump_config(own, tmp_path / "run.yaml")
    again = load_config(tmp_path / "run.yaml", [f"replay={own.run_dir / 'rollouts'}", "name=again"])
    run_training(again, LauncherInOpenRay(again, device="cpu"))
    assert_same_training(steps, metrics_of({"config": again}))
    exported = sorted((own.run_dir / "hf").glob("*.safetensors"))
    assert exported
    for path in exported:
        assert (again.run_dir / "hf" / path.name).read_bytes() == path.read_bytes()
