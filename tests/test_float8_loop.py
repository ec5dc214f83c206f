"""The whole loop with engines in float8 and a trainer in bfloat16."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from megatron_hapo.config import Config
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.protocols import RolloutEngine
from tests.observe.test_metrics import documented_metrics
from tests.resharding.test_float8_sync import checksums_of_export
from tests.test_loop import finished_run, make_config, metrics_of


def float8_config(model: Path, folder: Path, layout: dict[str, Any]) -> Config:
    values = make_config(model, folder, layout).model_dump()
    values["trainer"] |= {"dtype": "bfloat16"}
    values["rollout"] |= {"dtype": "bfloat16", "quantization": "fp8"}
    values["algorithm"]["importance_correction"] = {"level": "token"}
    return Config.model_validate(values | {"async": {"max_staleness": 0}})


@pytest.mark.slow
def test_engines_in_float8_follow_a_trainer_in_bfloat16(tiny_qwen3: Path, tmp_path: Path) -> None:
    """Every sync is verified, and at the end the engine holds the exported weights, rounded."""
    with local_ray(), ExitStack() as stack:
        pool = RayRolloutPool(float8_config(tiny_qwen3, tmp_path, {"tp": 1}), device="cpu")
        stack.callback(pool.close)
        pool.wait_until_ready()
        for layout in ({"tp": 1}, {"tp": 2}):
            config = float8_config(tiny_qwen3, tmp_path, layout)
            with finished_run(config, pool) as run:
                _, *steps = metrics_of(run)
                run["trainer"].export_hf(config.run_dir / "hf")
                with pool.weight_update(policy_version=config.steps):
                    pool.broadcast(RolloutEngine.begin_weight_update)
                    pool.broadcast(RolloutEngine.verify, checksums_of_export(config.run_dir / "hf", tp=1))
            assert len(steps) == config.steps
            for row in steps:
                assert row.keys() <= documented_metrics() | {"step"}
                assert 0.002 < row["rollout/logprob_abs_diff"] < 0.2
