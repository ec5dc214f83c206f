"""Two real engines behind Ray: what a sync does when one dies, when a bucket is corrupt, when versions differ."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from megatron_hapo.config import Config
from megatron_hapo.errors import RolloutError, WeightSyncError
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.resharding import transfer as transfer_module
from megatron_hapo.types import Sampling
from megatron_hapo.weight_sync import DirectSync
from tests.resharding.test_direct_sync import LAYERS, LAYOUTS
from tests.resharding.threaded_trainer import ThreadedTrainer
from tests.sglang_ext.test_engine import (
    assert_greedy_equals,
    assert_log_probs_are_at_recorded_temperatures,
    load_reference,
    make_prompts,
)
from tests.tiny_model import write_tiny_qwen3

pytestmark = pytest.mark.slow


def make_config(model: Path, folder: Path, *, engines: int, tp: int) -> Config:
    return Config.model_validate(
        {
            "name": "faults",
            "output_dir": folder,
            "steps": 1,
            "device": "cpu",
            "model": {"path": model},
            "rollout": {
                "engines": engines,
                "tp": tp,
                "dtype": "float32",
                "max_prompt_tokens": 64,
                "max_response_tokens": 64,
                "max_running_requests": 32,
                "kv_cache_tokens": 4096,
                "memory_fraction": 0.1,
                "timeout_seconds": 400,
            },
            "data": {"train": {"type": "arithmetic", "size": 8}},
            "weight_sync": {"verify_every": 1000, "bucket_bytes": 20_000, "timeout_seconds": 60},
        }
    )


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    with local_ray():
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RayRolloutPool, DirectSync, Path]]:
    """Two engines that have taken version 1 of weights other than those they started with."""
    folder = tmp_path_factory.mktemp("faults")
    start, new = (write_tiny_qwen3(folder / f"seed{seed}", layers=LAYERS, tied=True, seed=seed) for seed in (9, 1))
    config = make_config(start, folder, engines=2, tp=1)
    with closing(RayRolloutPool(config, device="cpu")) as pool:
        pool.wait_until_ready()
        (folder / "s").mkdir()
        sync = DirectSync(config, ThreadedTrainer(new, engine_tp=1, tp=2, dp=2), pool, folder=folder / "s")
        sync.sync(policy_version=1)
        yield pool, sync, new


def rank_processes(pool: RayRolloutPool, engine: int) -> list[psutil.Process]:
    actor = psutil.Process(ray.get(pool._engines[engine].__ray_call__.remote(lambda _: os.getpid())))
    return [child for child in actor.children(recursive=True) if "sglang::scheduler" in child.name()]


def pause_in_syncs(actor: Any) -> None:
    actor._started._config = replace(actor._started._config, in_flight="pause")


def kill_in_mid_sync(monkeypatch: pytest.MonkeyPatch, victim: psutil.Process, *, of_channel: str) -> None:
    """Once some buckets are on their way over a channel whose `of_channel` (engine, or engine_rank) is 1."""
    original = transfer_module._Outlet._tell

    def kill_then_tell(outlet: transfer_module._Outlet, number: int) -> None:
        if getattr(outlet._channel, of_channel) == 1 and number == 2 and victim.is_running():
            victim.send_signal(signal.SIGKILL)
        original(outlet, number)

    monkeypatch.setattr(transfer_module._Outlet, "_tell", kill_then_tell)


def test_both_engines_hold_the_weights(case) -> None:
    pool, _, new = case
    assert_greedy_equals(pool, load_reference(new), version=1)


def test_an_engine_killed_in_mid_sync_is_replaced_and_gets_everything(case, monkeypatch, caplog) -> None:
    pool, sync, new = case
    (victim,) = rank_processes(pool, 1)
    kill_in_mid_sync(monkeypatch, victim, of_channel="engine")
    sync.sync(policy_version=2)
    assert not victim.is_running()
    assert "engines [1] died in the weight sync and were replaced" in caplog.text
    assert_greedy_equals(pool, load_reference(new), version=2)


def test_a_corrupt_bucket_stops_the_sync_and_names_engine_rank_and_parameter(case, monkeypatch) -> None:
    pool, sync, new = case
    original = transfer_module._Outlet._tell

    def corrupt(outlet: transfer_module._Outlet, number: int) -> None:
        if outlet._channel.engine == 1 and number == 0:
            outlet._slots[3] ^= 1
        original(outlet, number)

    sync._num_syncs = 0  # this one is verified
    with monkeypatch.context() as patch:
        patch.setattr(transfer_module._Outlet, "_tell", corrupt)
        with pytest.raises(WeightSyncError, match=r"engine 1: .*: the engine's rank 0 holds other values"):
            sync.sync(policy_version=3)
    with pytest.raises(RolloutError, match="between begin_weight_update and end_weight_update"):
        assert_greedy_equals(pool, load_reference(new), version=3)
    sync.sync(policy_version=4)
    assert_greedy_equals(pool, load_reference(new), version=4)


def test_a_trainer_rank_beyond_the_deadline_is_named_and_no_engine_is_replaced(case, monkeypatch) -> None:
    pool, sync, new = case
    monkeypatch.setattr(sync, "_settings", sync._settings.model_copy(update={"timeout_seconds": 2.0}))
    tasks = sync._trainer._tasks
    monkeypatch.setattr(sync._trainer, "_tasks", tasks[:3])
    engines = list(pool._engines)
    with pytest.raises(WeightSyncError, match=r"not done within 2 s: trainer rank 3 to engine \d, rank 0: model"):
        sync.sync(policy_version=5)
    assert pool._engines == engines
    monkeypatch.undo()
    sync.sync(policy_version=6)
    assert_greedy_equals(pool, load_reference(new), version=6)


def test_rollouts_of_another_version_are_refused(case) -> None:
    pool, sync, new = case
    ray.get(pool._engines[1].call.remote("begin_weight_update"))
    ray.get(pool._engines[1].call.remote("end_weight_update", 99))
    with pytest.raises(RolloutError, match=r"engine 1 holds version 99 of the weights, the last sync brought"):
        assert_greedy_equals(pool, load_reference(new), version=99)
    sync.sync(policy_version=7)
    assert_greedy_equals(pool, load_reference(new), version=7)


def test_responses_do_not_depend_on_the_engine(case, monkeypatch) -> None:
    """Ten requests at a time for each engine: the rest go to whichever is free, in whatever order the prompts come."""
    pool, _, _ = case
    monkeypatch.setattr(pool, "_room", 10)
    prompts = make_prompts(24)
    sampling = Sampling(samples=4, temperature=1.2, max_response_tokens=48, seed=3, stop_token_ids=(7, 77))
    forth, back = pool.generate(prompts, sampling), pool.generate(prompts[::-1], sampling)[::-1]
    for prompt, one, other in zip(prompts, forth, back, strict=True):
        assert {rollout.prompt.uid for rollout in one} == {prompt.uid}
        assert [r.response_ids.tolist() for r in one] == [r.response_ids.tolist() for r in other]


def test_an_engine_killed_in_a_sync_gives_its_unfinished_responses_to_the_others(case, monkeypatch) -> None:
    pool, sync, new = case
    for engine in pool._engines:
        ray.get(engine.__ray_call__.remote(pause_in_syncs))
    monkeypatch.setattr(pool, "_room", 16)
    (victim,) = rank_processes(pool, 1)
    sampling = Sampling(samples=4, temperature=1.2, max_response_tokens=64, seed=3, stop_token_ids=(7,))
    with ThreadPoolExecutor(1) as thread:
        generation = thread.submit(pool.generate, make_prompts(64), sampling)
        time.sleep(0.5)  # of several seconds
        kill_in_mid_sync(monkeypatch, victim, of_channel="engine")
        sync.sync(policy_version=8)
        groups = generation.result()
    assert not victim.is_running()
    rollouts = [rollout for group in groups for rollout in group]
    assert len(rollouts) == 256
    assert {len(set(rollout.policy_versions)) for rollout in rollouts} == {1, 2}
    assert_log_probs_are_at_recorded_temperatures(load_reference(new), rollouts)  # both versions are of these weights


def take_weights_of_every_layout(pool: RayRolloutPool, folder: Path, *, tied: bool) -> None:
    for version, layout in enumerate(LAYOUTS, 100):
        own = folder / f"version{version}"
        new = write_tiny_qwen3(own / "new", layers=LAYERS, tied=tied, seed=version)
        trainer = ThreadedTrainer(new, engine_tp=1, **layout)
        DirectSync(make_config(new, own, engines=2, tp=1), trainer, pool, folder=own).sync(policy_version=version)
        assert_greedy_equals(pool, load_reference(new), version=version)


def test_both_engines_take_weights_of_every_layout(case, tmp_path) -> None:
    """Last of those that share the engines: it gives them other plans."""
    take_weights_of_every_layout(case[0], tmp_path, tied=True)


def test_two_engines_of_an_untied_model_take_weights_of_every_layout(tmp_path) -> None:
    start = write_tiny_qwen3(tmp_path / "start", layers=LAYERS, tied=False, seed=9)
    with closing(RayRolloutPool(make_config(start, tmp_path, engines=2, tp=1), device="cpu")) as pool:
        pool.wait_until_ready()
        take_weights_of_every_layout(pool, tmp_path, tied=False)


def test_a_rank_of_a_tensor_parallel_engine_killed_in_mid_sync(tmp_path, monkeypatch) -> None:
    start, new = write_tiny_qwen3(tmp_path / "start", seed=9), write_tiny_qwen3(tmp_path / "new", seed=1)
    config = make_config(start, tmp_path, engines=1, tp=2)
    (tmp_path / "s").mkdir()
    with closing(RayRolloutPool(config, device="cpu")) as pool:
        pool.wait_until_ready()
        sync = DirectSync(config, ThreadedTrainer(new, engine_tp=2, pp=2), pool, folder=tmp_path / "s")
        sync.sync(policy_version=1)
        victim = next(process for process in rank_processes(pool, 0) if "TP1" in process.name())
        kill_in_mid_sync(monkeypatch, victim, of_channel="engine_rank")
        sync.sync(policy_version=2)
        assert not victim.is_running()
        assert_greedy_equals(pool, load_reference(new), version=2)
