"""The whole loop with experts: the trainer gets those of the engine, and metrics show what that changes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_hapo.config import Config
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.local_ray import local_ray
from tests.observe.test_metrics import documented_metrics
from tests.test_loop import finished_run, make_config, metrics_of
from tests.tiny_families import write_family


@pytest.mark.slow
def test_a_run_replays_the_engines_experts(tmp_path: Path) -> None:
    """Engine in bfloat16 and trainer in float32 round differently, so that their routers disagree here and there."""
    model = write_family(tmp_path / "model", "qwen3_moe", tokenizer=True, num_experts=8, moe_intermediate_size=32)
    values = make_config(model, tmp_path, {"ep": 2, "dp": 2}).model_dump()
    values["rollout"] |= {"dtype": "bfloat16", "compare_routes_every": 1, "max_prompt_tokens": 128}
    config = Config.model_validate(values | {"async": {"max_staleness": 0}})
    with local_ray(), ExitStack() as stack:
        pool = RayRolloutPool(config, device="cpu")
        stack.callback(pool.close)
        pool.wait_until_ready()
        with finished_run(config, pool) as run:
            _, *steps = metrics_of(run)
    assert len(steps) == 2
    for row in steps:
        assert row.keys() <= documented_metrics() | {"step"}
        assert 0.8 < row["rollout/route_agreement"] < 1
        assert row["rollout/mismatch_kl"] < row["rollout/unreplayed_mismatch_kl"]
