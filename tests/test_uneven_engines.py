"""The whole loop, two steps ahead, with engines of different speed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from megatron_hapo.config import Config
from megatron_hapo.data.job_prompts import training_prompts
from megatron_hapo.data.prompts import load_tokenizer
from megatron_hapo.launch.ray import engine_pool
from megatron_hapo.launch.ray.engine_actor import GENERATION, EngineActor
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.protocols import Finished
from megatron_hapo.types import GroupRequest
from tests.observe.test_metrics import documented_metrics
from tests.test_loop import finished_run, make_config, metrics_of

STEPS, PROMPTS, SAMPLES, STALENESS, SLOWNESS = 6, 6, 4, 2, 4


class UnevenEngine(EngineActor):
    """Engine 1 hands out each response SLOWNESS times as long after its request as it took."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.delivered = 0
        self._requested: dict[tuple[int, int], float] = {}
        self._held: dict[int, list[tuple[float, Finished]]] = {}

    def call(self, verb: str, *arguments: Any, **options: Any) -> Any:
        finished = self._slowly(*arguments) if verb == "advance" else super().call(verb, *arguments, **options)
        self.delivered += len(finished) if verb == "advance" else 0
        return finished

    def _slowly(self, call: int, requests: Mapping[int, GroupRequest]) -> list[Finished]:
        begin = time.monotonic()
        for number in requests:
            self._requested[call, number] = begin
        held = self._held.setdefault(call, [])
        if requests or not held:  # otherwise what is held comes next
            finished = super().call("advance", call, requests)
            now, factor = time.monotonic(), SLOWNESS if self._index == 1 else 1
            for one in finished:
                start = self._requested[call, one[0]]
                held.append((start + factor * (now - start), one))
        first = min(release for release, _ in held)
        time.sleep(max(0.0, first - time.monotonic()))
        now = time.monotonic()
        self._held[call] = [(release, one) for release, one in held if release > now]
        return [one for release, one in held if release <= now]


def uneven_config(model: Path, folder: Path, *, staleness: int) -> Config:
    values = make_config(model, folder, {"tp": 1}).model_dump()
    values |= {
        "name": f"uneven{staleness}",
        "steps": STEPS,
        "async": {"max_staleness": staleness},
        "eval": {"every": 0},
    }
    values["algorithm"]["importance_correction"] = {"level": "token"}
    values["batch"] |= {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "prompts_per_minibatch": PROMPTS}
    values["rollout"] |= {"engines": 2, "max_running_requests": 8, "max_response_tokens": 48}
    values["record"] = {"every": 1, "groups": None}
    values["weight_sync"]["in_flight"] = "pause" if staleness else "finish"
    return Config.model_validate(values)


@pytest.mark.slow
def test_with_an_engine_that_is_four_times_slower_no_sample_is_lost_and_none_is_too_old(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also prints the seconds of the steps beside those of the same run without staleness."""
    remote: Any = ray.remote
    monkeypatch.setattr(engine_pool, "engine_actor", lambda: remote(concurrency_groups={GENERATION: 2})(UnevenEngine))
    seconds = {}
    with local_ray(), ExitStack() as stack:
        pool = RayRolloutPool(uneven_config(tiny_qwen3, tmp_path, staleness=STALENESS), device="cpu")
        stack.callback(pool.close)
        pool.wait_until_ready()
        for staleness in (0, STALENESS):
            before = delivered(pool)
            config = uneven_config(tiny_qwen3, tmp_path, staleness=staleness)
            with finished_run(config, pool) as run:
                steps = metrics_of(run)
            fast, slow = (after - earlier for after, earlier in zip(delivered(pool), before, strict=True))
            assert fast + slow == STEPS * PROMPTS * SAMPLES
            seconds[staleness] = sum(row["time/step"] for row in steps)
            print(f"staleness {staleness}: {seconds[staleness]:.1f} s, responses of the engines {fast} and {slow}")
            assert_complete(config)
            assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
            for row in steps:
                assert row["rollout/staleness_max"] <= staleness
                assert row["rollout/statistics_lag"] <= staleness
                assert row["rollout/dropped_groups"] == 0
                assert row.keys() <= documented_metrics() | {"step"}
    # How far the engines get ahead depends on how busy the machine is; up to STALENESS on a quiet one.
    assert max(row["rollout/staleness_max"] for row in steps) > 0
    assert 0 < slow < fast
    assert seconds[STALENESS] < seconds[0]


def delivered(pool: RayRolloutPool) -> list[int]:
    """Responses that each engine has handed out."""
    return ray.get([engine.__ray_call__.remote(lambda actor: actor.delivered) for engine in pool._engines])


def assert_complete(config: Config) -> None:
    """The steps have trained on the first prompts of the data, each once, with all of its samples."""
    tables = [pq.read_table(config.run_dir / f"rollouts/step_{step:08d}.parquet") for step in range(1, STEPS + 1)]
    found = Counter(uid for table in tables for uid in table["uid"].to_pylist())
    prompts = training_prompts(config, load_tokenizer(config.model.path))
    expected = Counter(prompt.uid for _ in range(STEPS) for prompt in prompts.next(PROMPTS))
    assert found == Counter({uid: times * SAMPLES for uid, times in expected.items()})
    samples = np.concatenate([table["sample"].to_numpy() for table in tables])
    assert (np.bincount(samples) == STEPS * PROMPTS).all()
