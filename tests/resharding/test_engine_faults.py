"""Weight syncs of two real engines behind Ray: when one dies, a bucket is corrupt, a rank is late, versions differ."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_hapo.config import Config
from megatron_hapo.errors import RolloutError, WeightSyncError
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.resharding.channel_ends import ChannelId
from megatron_hapo.types import Sampling, WeightBucket
from megatron_hapo.weight_sync import DirectSync, GatherSync
from tests.resharding.test_direct_sync import LAYERS, LAYOUTS, make_settings
from tests.resharding.threaded_trainer import ThreadedTrainer
from tests.sglang_ext.test_engine import (
    assert_greedy_equals,
    assert_log_probs_are_at_recorded_temperatures,
    load_reference,
    make_prompts,
)
from tests.time_limits import patient
from tests.tiny_model import write_tiny_qwen3

pytestmark = pytest.mark.slow


def make_config(
    model: Path, folder: Path, *, engines: int, tp: int, max_running_requests: int = 9, pause: bool = False
) -> Config:
    """One step that engines of this size generate; with `pause` a sync does not wait for unfinished responses."""
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
                "max_running_requests": max_running_requests,
                "kv_cache_tokens": 4096,
                "memory_fraction": 0.1,
                "timeout_seconds": patient(400),
            },
            "data": {"train": {"type": "arithmetic", "size": 8}},
            "algorithm": {"importance_correction": {"level": "token"}} if pause else {},
            "async": {"max_staleness": 1 if pause else 0},
            "weight_sync": {
                "verify_every": 1000,
                "bucket_bytes": 20_000,
                "timeout_seconds": patient(60),
                "in_flight": "pause" if pause else "finish",
            },
        }
    )


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    with local_ray():
        yield


class Case(NamedTuple):
    """Engines that have received version 1 of the weights, which differ from those they started with."""

    pool: RayRolloutPool
    sync: DirectSync
    new: Path
    """The weights, as a Hugging Face folder."""
    trainer: ThreadedTrainer
    settings: SimpleNamespace
    """The settings of `sync`, which may change between syncs."""


@contextmanager
def running_case(folder: Path, **changes: Any) -> Iterator[Case]:
    """Two engines, with these changes to `make_config`."""
    start, new = (write_tiny_qwen3(folder / f"seed{seed}", layers=LAYERS, tied=True, seed=seed) for seed in (9, 1))
    config = make_config(start, folder, engines=2, tp=1, **changes)
    settings = make_settings(verify_every=1000)
    with closing(RayRolloutPool(config, device="cpu")) as pool:
        pool.wait_until_ready()
        (folder / "s").mkdir()
        trainer = ThreadedTrainer(new, engine_tp=1, tp=2, dp=2)
        sync_config: Any = SimpleNamespace(**{**vars(config), "weight_sync": settings})
        sync = DirectSync(sync_config, trainer, pool, folder=folder / "s")  # type: ignore[arg-type]
        sync.sync(policy_version=1)
        yield Case(pool, sync, new, trainer, settings)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with running_case(tmp_path_factory.mktemp("faults")) as running:
        yield running


def rank_processes(pool: RayRolloutPool, engine: int) -> list[psutil.Process]:
    actor = psutil.Process(ray.get(pool._engines[engine].__ray_call__.remote(lambda _: os.getpid())))
    return [child for child in actor.children(recursive=True) if "sglang::scheduler" in child.name()]


def kill_during_sync(
    monkeypatch: pytest.MonkeyPatch, trainer: ThreadedTrainer, victim: psutil.Process, *, engine_or_rank: str
) -> None:
    """Kills the victim before the third bucket of a channel whose `engine_or_rank` (engine or engine_rank) is 1."""

    def kill(channel: ChannelId, number: int, data: Tensor) -> None:
        if getattr(channel, engine_or_rank) == 1 and number == 2 and victim.is_running():
            victim.send_signal(signal.SIGKILL)

    monkeypatch.setattr(trainer, "on_bucket", kill)


def test_both_engines_hold_the_weights(case: Case) -> None:
    assert_greedy_equals(case.pool, load_reference(case.new), version=1)


def test_an_engine_killed_during_a_sync_is_replaced_and_gets_everything(case: Case, monkeypatch, caplog) -> None:
    (victim,) = rank_processes(case.pool, 1)
    kill_during_sync(monkeypatch, case.trainer, victim, engine_or_rank="engine")
    case.sync.sync(policy_version=2)
    assert not victim.is_running()
    assert "engines [1] died in the weight sync and were replaced" in caplog.text
    assert_greedy_equals(case.pool, load_reference(case.new), version=2)


def test_a_corrupt_bucket_stops_the_sync_and_names_engine_rank_and_parameter(case: Case, monkeypatch) -> None:
    pool, sync, new, trainer, settings = case

    def corrupt(channel: ChannelId, number: int, data: Tensor) -> None:
        if channel.engine == 1 and number == 0:
            data[3] ^= 1

    with monkeypatch.context() as patch:
        patch.setattr(settings, "verify_every", 1)
        patch.setattr(trainer, "on_bucket", corrupt)
        with pytest.raises(WeightSyncError, match=r"engine 1: .*: the engine's rank 0 holds other values"):
            sync.sync(policy_version=3)
    with pytest.raises(RolloutError, match="between begin_weight_update and end_weight_update"):
        assert_greedy_equals(pool, load_reference(new), version=3)
    sync.sync(policy_version=4)
    assert_greedy_equals(pool, load_reference(new), version=4)


def test_a_trainer_rank_beyond_the_deadline_is_named_and_no_engine_is_replaced(case: Case, monkeypatch) -> None:
    pool, sync, new, trainer, settings = case
    monkeypatch.setattr(settings, "timeout_seconds", 2.0)
    monkeypatch.setattr(trainer, "tasks", trainer.tasks[:3])
    engines = list(pool._engines)
    with pytest.raises(WeightSyncError, match=r"timed out after 2 s: trainer rank 3 to engine \d, rank 0: model"):
        sync.sync(policy_version=5)
    assert pool._engines == engines
    monkeypatch.undo()
    sync.sync(policy_version=6)
    assert_greedy_equals(pool, load_reference(new), version=6)


def test_rollouts_of_another_version_are_refused(case: Case) -> None:
    pool, sync, new, *_ = case
    ray.get(pool._engines[1].call.remote("begin_weight_update"))
    ray.get(pool._engines[1].call.remote("end_weight_update", 99))
    with pytest.raises(RolloutError, match=r"engine 1 holds version 99 of the weights, the last sync brought"):
        assert_greedy_equals(pool, load_reference(new), version=99)
    sync.sync(policy_version=7)
    assert_greedy_equals(pool, load_reference(new), version=7)


def test_responses_do_not_depend_on_the_engine(case: Case) -> None:
    """Each engine takes ten requests at a time; further prompts go to the engine that is free, whatever their order."""
    pool = case.pool
    prompts = make_prompts(24)
    sampling = Sampling(samples=4, temperature=1.2, max_response_tokens=48, seed=3, stop_token_ids=(7, 77))
    forth, back = pool.generate(prompts, sampling), pool.generate(prompts[::-1], sampling)[::-1]
    for prompt, one, other in zip(prompts, forth, back, strict=True):
        assert {rollout.prompt.uid for rollout in one} == {prompt.uid}
        assert [r.response_ids.tolist() for r in one] == [r.response_ids.tolist() for r in other]


def test_an_engine_killed_in_a_sync_gives_its_unfinished_responses_to_the_others(tmp_path, monkeypatch) -> None:
    sampling = Sampling(samples=4, temperature=1.2, max_response_tokens=64, seed=3, stop_token_ids=(7,))
    with running_case(tmp_path, pause=True, max_running_requests=14) as case, ThreadPoolExecutor(1) as thread:
        (victim,) = rank_processes(case.pool, 1)
        generation = thread.submit(case.pool.generate, make_prompts(64), sampling)
        time.sleep(0.5)  # of several seconds
        kill_during_sync(monkeypatch, case.trainer, victim, engine_or_rank="engine")
        case.sync.sync(policy_version=8)
        groups = generation.result()
    assert not victim.is_running()
    rollouts = [rollout for group in groups for rollout in group]
    assert len(rollouts) == 256
    assert {len(set(rollout.policy_versions)) for rollout in rollouts} == {1, 2}
    assert_log_probs_are_at_recorded_temperatures(
        load_reference(case.new), rollouts
    )  # both versions are of these weights


def test_engines_killed_in_rollouts_lose_and_double_no_sample(tmp_path) -> None:
    """First one of two, whose groups the other takes over; then, with nothing left, both."""
    sampling = Sampling(samples=4, temperature=1.2, max_response_tokens=64, seed=3, stop_token_ids=(7,))
    prompts = make_prompts(48)
    with running_case(tmp_path, max_running_requests=14) as case, ThreadPoolExecutor(1) as thread:
        undisturbed = case.pool.generate(prompts, sampling)
        for version, engines in ((2, [1]), (3, [0, 1])):
            generation = thread.submit(case.pool.generate, prompts, sampling)
            time.sleep(0.5)  # of several seconds
            for victim in [process for engine in engines for process in rank_processes(case.pool, engine)]:
                victim.send_signal(signal.SIGKILL)
            while not (case.pool.waits_for_sync or generation.done()):
                time.sleep(0.1)
            assert generation.done() == (engines == [1])
            case.sync.sync(policy_version=version)
            groups = generation.result()
            assert [group[0].prompt.uid for group in groups] == [prompt.uid for prompt in prompts]
            for one, other in zip(groups, undisturbed, strict=True):
                assert [r.response_ids.tolist() for r in one] == [r.response_ids.tolist() for r in other]
            assert_greedy_equals(case.pool, load_reference(case.new), version=version)


class WholeTensors:
    """A trainer that delivers a folder's tensors one by one; `on_bucket` sees each one's number."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.on_bucket: Callable[[int], None] = lambda number: None

    def weight_buckets(self, *, verify: bool) -> Iterator[WeightBucket]:
        for number, (name, tensor) in enumerate(load_file(self.folder / "model.safetensors").items()):
            self.on_bucket(number)
            data = tensor.contiguous().view(torch.uint8).flatten().numpy()
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield WeightBucket(names=(name,), shapes=(tuple(tensor.shape),), dtypes=(dtype,), data=data)


def test_an_engine_killed_in_a_gathered_sync_is_replaced_and_gets_everything(tmp_path: Path, caplog) -> None:
    """With the other engine's weights half replaced, both must end with all of the new ones."""
    start, new = (write_tiny_qwen3(tmp_path / f"seed{seed}", layers=LAYERS, seed=seed) for seed in (9, 1))
    with closing(RayRolloutPool(make_config(start, tmp_path, engines=2, tp=1), device="cpu")) as pool:
        pool.wait_until_ready()
        trainer: Any = WholeTensors(start)
        sync = GatherSync(trainer, pool, num_engines=2, verify_every=1000)
        sync.sync(policy_version=1)
        (victim,) = rank_processes(pool, 1)

        def kill(number: int) -> None:
            if number == 5 and victim.is_running():
                victim.send_signal(signal.SIGKILL)

        trainer.folder, trainer.on_bucket = new, kill
        sync.sync(policy_version=2)
        assert not victim.is_running()
        assert "engines [1] died in the weight sync and were replaced" in caplog.text
        assert_greedy_equals(pool, load_reference(new), version=2)


def take_weights_of_every_layout(pool: RayRolloutPool, folder: Path, *, tied: bool) -> None:
    for version, layout in enumerate(LAYOUTS, 100):
        own = folder / f"version{version}"
        new = write_tiny_qwen3(own / "new", layers=LAYERS, tied=tied, seed=version)
        trainer = ThreadedTrainer(new, engine_tp=1, **layout)
        DirectSync(make_config(new, own, engines=2, tp=1), trainer, pool, folder=own).sync(policy_version=version)
        assert_greedy_equals(pool, load_reference(new), version=version)


def test_both_engines_take_weights_of_every_layout(case: Case, tmp_path) -> None:
    """Must be the last test that uses the shared engines, because it gives them other plans."""
    take_weights_of_every_layout(case.pool, tmp_path, tied=True)


def test_two_engines_of_an_untied_model_take_weights_of_every_layout(tmp_path) -> None:
    start = write_tiny_qwen3(tmp_path / "start", layers=LAYERS, tied=False, seed=9)
    with closing(RayRolloutPool(make_config(start, tmp_path, engines=2, tp=1), device="cpu")) as pool:
        pool.wait_until_ready()
        take_weights_of_every_layout(pool, tmp_path, tied=False)


def test_a_rank_of_a_tensor_parallel_engine_is_killed_during_a_sync(tmp_path, monkeypatch) -> None:
    start, new = write_tiny_qwen3(tmp_path / "start", seed=9), write_tiny_qwen3(tmp_path / "new", seed=1)
    config = make_config(start, tmp_path, engines=1, tp=2)
    (tmp_path / "s").mkdir()
    with closing(RayRolloutPool(config, device="cpu")) as pool:
        pool.wait_until_ready()
        trainer = ThreadedTrainer(new, engine_tp=2, pp=2)
        sync = DirectSync(config, trainer, pool, folder=tmp_path / "s")  # type: ignore[arg-type]
        sync.sync(policy_version=1)
        victim = next(process for process in rank_processes(pool, 0) if "TP1" in process.name())
        kill_during_sync(monkeypatch, trainer, victim, engine_or_rank="engine_rank")
        sync.sync(policy_version=2)
        assert not victim.is_running()
        assert_greedy_equals(pool, load_reference(new), version=2)
