"""Engines that die while they generate: real processes behind Ray, with a stand-in for SGLang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import ray

from megatron_hapo.config import Config
from megatron_hapo.errors import RolloutError
from megatron_hapo.launch.ray import engine_pool
from megatron_hapo.launch.ray.engine_actor import GENERATION
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.types import GroupRequest, Prompt, Rollout, Sampling
from tests.time_limits import patient

SAMPLING = Sampling(samples=2, temperature=1.0, max_response_tokens=8, seed=5)
PROMPTS = [
    Prompt(uid=str(i), token_ids=np.arange(4, dtype=np.int32), ground_truth="1", data_source="sums") for i in range(12)
]


class StandInEngine:
    """An engine's actor: a response's tokens are its prompt's number and its sample index; one response a call.

    A file `kill_INDEX` in the folder ends the process in the middle of a group, once for each byte of the file.
    """

    def __init__(self, config: Config, device: str, index: int, *, read_weights: bool):
        self.index, self.folder, self.version = index, config.output_dir, 0
        self.has_weights, self.pending = read_weights, {}

    def ready(self) -> None:
        return

    def shutdown(self) -> None:
        return

    def call(self, verb: str, *arguments: Any) -> Any:
        return getattr(self, verb)(*arguments)

    def advance(self, call: int, requests: Mapping[int, GroupRequest]) -> list[Any]:
        assert self.has_weights, "generates without weights"
        responses = self.pending.setdefault(call, SimpleQueue())
        for number, request in requests.items():
            for sample in range(request.sampling.samples):
                responses.put((number, sample, self.response(request.prompt, sample)))
        finished = responses.get()
        if finished[1] == 1:  # the first sample of this group has been delivered
            self.die_if_asked()
        time.sleep(0.01)
        return [finished]

    def response(self, prompt: Prompt, sample: int) -> Rollout:
        floats = np.zeros(2, np.float32)
        return Rollout(
            prompt=prompt, response_ids=np.array([int(prompt.uid), sample], np.int32), rollout_log_probs=floats,
            temperatures=floats + 1, finish_reason="stop", policy_versions=np.full(2, self.version, np.int32),
        )  # fmt: skip

    def die_if_asked(self) -> None:
        order = self.folder / f"kill_{self.index}"
        if order.exists() and (left := order.read_text()):
            order.write_text(left[1:])
            os.kill(os.getpid(), signal.SIGKILL)

    def end_weight_update(self, policy_version: int) -> None:
        self.version, self.has_weights = policy_version, True

    def resume(self) -> None:
        return


class SimpleSync:
    """The part of a weight sync that concerns the pool."""

    def __init__(self, pool: RayRolloutPool):
        self.pool, self.replaced = pool, []

    def sync(self, *, policy_version: int) -> bool:
        self.replaced.append(self.pool.replace_dead_engines(patience_seconds=patient(60)))
        with self.pool.weight_update(policy_version=policy_version):
            pass
        return True


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    with local_ray():
        yield


@contextmanager
def running(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, engines: int, read_weights: bool = False
) -> Iterator[tuple[RayRolloutPool, SimpleSync]]:
    """A pool of stand-ins, which a sync has given version 1."""
    remote: Any = ray.remote
    monkeypatch.setattr(engine_pool, "engine_actor", lambda: remote(concurrency_groups={GENERATION: 2})(StandInEngine))
    config = Config.model_validate(
        {
            "name": "deaths", "output_dir": folder, "steps": 1, "device": "cpu", "model": {"path": folder},
            "rollout": {"engines": engines, "max_running_requests": 4, "timeout_seconds": patient(120)},
            "data": {"train": {"type": "arithmetic", "size": 8}},
        }
    )  # fmt: skip
    with closing(RayRolloutPool(config, device="cuda", read_weights=read_weights)) as pool:
        sync = SimpleSync(pool)
        if not read_weights:
            sync.sync(policy_version=1)
        yield pool, sync


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_pool, "actor_options", lambda *arguments, **options: {"num_cpus": 0})


def assert_complete(groups: list[list[Rollout]], *, versions: set[int]) -> None:
    """No sample is missing, doubled, or in another's place."""
    ids = [[rollout.response_ids.tolist() for rollout in group] for group in groups]
    assert ids == [[[number, 0], [number, 1]] for number in range(len(PROMPTS))]
    assert {rollout.policy_version for group in groups for rollout in group} == versions


def test_the_other_engines_take_over_and_the_next_sync_replaces_the_dead_one(tmp_path, monkeypatch, caplog) -> None:
    with running(monkeypatch, tmp_path, engines=2) as (pool, sync):
        (tmp_path / "kill_1").write_text("x")
        assert_complete(pool.generate(PROMPTS, SAMPLING), versions={1})
        assert "generating: engine 1: the process died" in caplog.text
        assert not pool.waits_for_sync
        sync.sync(policy_version=2)
        assert sync.replaced == [[], [1]]
        assert_complete(pool.generate(PROMPTS, SAMPLING), versions={2})
        sync.sync(policy_version=3)
        assert sync.replaced[-1] == []


def test_an_engine_that_died_after_the_sync_gets_weights_before_it_generates(tmp_path, monkeypatch) -> None:
    with running(monkeypatch, tmp_path, engines=1) as (pool, sync):
        pool.restore_with(lambda: sync.sync(policy_version=1))
        ray.kill(pool._engines[0])
        assert_complete(pool.generate(PROMPTS, SAMPLING), versions={1})
        assert sync.replaced == [[], [0]]


def test_generation_in_another_thread_waits_for_the_next_sync(tmp_path, monkeypatch) -> None:
    with running(monkeypatch, tmp_path, engines=2) as (pool, sync), ThreadPoolExecutor(1) as thread:
        for index in range(2):
            (tmp_path / f"kill_{index}").write_text("x")
        generation = thread.submit(pool.generate, PROMPTS, SAMPLING)
        deadline = time.monotonic() + patient(60)
        while not pool.waits_for_sync:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert not generation.done()
        sync.sync(policy_version=2)
        groups = generation.result(patient(60))
        assert sync.replaced[-1] == [0, 1]
        assert_complete(groups, versions={rollout.policy_version for group in groups for rollout in group})
        assert groups[-1][-1].policy_version == 2


def test_two_calls_survive_the_same_death(tmp_path, monkeypatch) -> None:
    """Training's stream and evaluation's call."""
    with running(monkeypatch, tmp_path, engines=2) as (pool, _), ThreadPoolExecutor(2) as threads:
        (tmp_path / "kill_0").write_text("x")
        for call in [threads.submit(pool.generate, PROMPTS, SAMPLING) for _ in range(2)]:
            assert_complete(call.result(patient(60)), versions={1})


def test_engines_that_read_their_weights_are_replaced_at_once(tmp_path, monkeypatch) -> None:
    with running(monkeypatch, tmp_path, engines=1, read_weights=True) as (pool, _):
        (tmp_path / "kill_0").write_text("x")
        assert_complete(pool.generate(PROMPTS, SAMPLING), versions={0})


def test_engines_that_keep_dying_end_the_run(tmp_path, monkeypatch) -> None:
    with running(monkeypatch, tmp_path, engines=1) as (pool, sync):
        pool.restore_with(lambda: sync.sync(policy_version=1))
        (tmp_path / "kill_0").write_text("xxxxxx")
        with pytest.raises(RolloutError, match="generating: death 3 in one step: engine 0: the process died"):
            pool.generate(PROMPTS, SAMPLING)


def test_a_closed_pool_ends_a_call_that_waits_for_a_sync(tmp_path, monkeypatch) -> None:
    with ThreadPoolExecutor(1) as thread:
        with running(monkeypatch, tmp_path, engines=1) as (pool, _):
            ray.kill(pool._engines[0])
            generation = thread.submit(pool.generate, PROMPTS, SAMPLING)
            deadline = time.monotonic() + patient(60)
            while not pool.waits_for_sync:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        with pytest.raises(RolloutError, match="the engines have been closed"):
            generation.result(patient(60))
