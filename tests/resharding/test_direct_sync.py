"""DirectSync into a real engine, from a trainer in many layouts whose ranks are threads of the test process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from megatron_hapo.errors import WeightSyncError
from megatron_hapo.resharding.channel_ends import ChannelId
from megatron_hapo.resharding.hosts import this_host
from megatron_hapo.weight_sync import DirectSync
from tests.resharding.threaded_trainer import ThreadedTrainer
from tests.sglang_ext.engine_process import RemoteEngine, running_engine
from tests.sglang_ext.test_engine import assert_greedy_equals, load_reference
from tests.time_limits import patient
from tests.tiny_families import FAMILIES, write_family
from tests.tiny_model import write_tiny_qwen3

LAYOUTS: list[dict[str, int]] = [{"tp": 1}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}, {"dp": 2}]
LARGE = {"tp": 2, "pp": 2, "dp": 2}
LAYERS = 4  # two chunks on each of two stages


class OneEngine:
    """The part of `protocols.RolloutPool` that a weight sync needs, over one engine process."""

    def __init__(self, engine: RemoteEngine):
        self.engine, self.version = engine, 0

    def host(self) -> str:
        return this_host()

    def broadcast(self, verb: Callable[..., Any], *arguments: Any) -> list[Any]:
        target = self if verb.__name__ == "host" else self.engine
        return [getattr(target, verb.__name__)(*arguments)]

    def scatter(
        self, verb: Callable[..., Any], arguments: Sequence[Any], *, timeout_seconds: float | None = None
    ) -> list[Any]:
        return self.broadcast(verb, arguments[0])

    new_engines: tuple[int, ...] = ()

    def replace_dead_engines(self, *, patience_seconds: float) -> list[int]:
        return []

    @contextmanager
    def weight_update(self, *, policy_version: int) -> Iterator[None]:
        yield
        self.engine.end_weight_update(policy_version)
        self.version = policy_version


def make_settings(*, verify_every: int = 1, timeout_seconds: float | None = None) -> SimpleNamespace:
    """The settings of `config.weight_sync` that DirectSync reads; unlike those, they may change between syncs."""
    return SimpleNamespace(
        bucket_bytes=20_000, verify_every=verify_every, timeout_seconds=timeout_seconds or patient(60)
    )


def make_sync(
    trainer: ThreadedTrainer,
    pool: OneEngine,
    folder: Path,
    path: Path,
    *,
    tp: int = 1,
    dtype: str = "float32",
    settings: SimpleNamespace | None = None,
) -> DirectSync:
    folder.mkdir()
    config: Any = SimpleNamespace(
        device="cpu",
        weight_sync=settings or make_settings(),
        rollout=SimpleNamespace(engines=1, tp=tp, ep=1, dtype=dtype),
        model=SimpleNamespace(path=path),
    )
    return DirectSync(config, trainer, pool, folder=folder)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A running engine, and checkpoints to send, whose weights differ from the engine's."""
    folder = tmp_path_factory.mktemp("models")
    start, *news = (
        write_tiny_qwen3(folder / f"seed{seed}", layers=LAYERS, tied=request.param, seed=seed)
        for seed in (9, *range(len(LAYOUTS)))
    )
    with running_engine(start) as engine:
        yield {"pool": OneEngine(engine), "news": news}


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=lambda i: "-".join(f"{k}{v}" for k, v in LAYOUTS[i].items()))
def test_engine_holds_the_trainers_weights(case: dict[str, Any], tmp_path: Path, index: int) -> None:
    """Every parameter is verified bit for bit, and greedy tokens equal those of transformers."""
    new, pool = case["news"][index], case["pool"]
    sync = make_sync(ThreadedTrainer(new, engine_tp=1, **LAYOUTS[index]), pool, tmp_path / "s", new)
    sync.sync(policy_version=10 * index + 1)
    sync.sync(policy_version=10 * index + 2)
    assert_greedy_equals(pool.engine, load_reference(new), version=10 * index + 2)


def test_a_sync_that_fails_while_all_engines_live_is_not_repeated(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if an engine that died before the sync has just been replaced."""
    new, pool = case["news"][0], case["pool"]
    sync = make_sync(ThreadedTrainer(new, engine_tp=1), pool, tmp_path / "s", new)
    attempts = []

    def fail(*_: Any, **__: Any) -> None:
        attempts.append(1)
        raise WeightSyncError("checksums differ")

    monkeypatch.setattr(pool, "new_engines", (0,))
    monkeypatch.setattr(sync, "_attempt", fail)
    with pytest.raises(WeightSyncError, match="checksums differ"):
        sync.sync(policy_version=1)
    assert len(attempts) == 1


def test_a_corrupt_bucket_fails_the_sync_and_the_version_stays(case: dict[str, Any], tmp_path: Path) -> None:
    new, pool = case["news"][0], case["pool"]
    trainer = ThreadedTrainer(new, engine_tp=1, **LARGE)
    sync = make_sync(trainer, pool, tmp_path / "s", new)

    def corrupt(channel: ChannelId, number: int, data: Tensor) -> None:
        if channel.source_rank == 0 and number == 0:
            data[3] ^= 1

    version = pool.version
    trainer.on_bucket = corrupt
    with pytest.raises(WeightSyncError, match=r"the engine's rank 0 holds other values than the trainer sent"):
        sync.sync(policy_version=77)
    assert pool.version == version
    pool.engine.end_weight_update(version)  # closes the update, which a run would not do
    trainer.on_bucket = None
    sync.sync(policy_version=78)
    assert_greedy_equals(pool.engine, load_reference(new), version=78)


def test_a_trainer_rank_that_does_not_send_is_named_and_the_version_stays(case: dict[str, Any], tmp_path: Path) -> None:
    new, pool = case["news"][0], case["pool"]
    trainer = ThreadedTrainer(new, engine_tp=1, **LAYOUTS[1])
    sync = make_sync(trainer, pool, tmp_path / "s", new, settings=make_settings(timeout_seconds=2))
    trainer.tasks = trainer.tasks[:1]
    version = pool.version
    with pytest.raises(
        WeightSyncError, match=r"timed out after 2 s: trainer rank 1 to engine 0, rank 0: model.embed_tokens.weight"
    ):
        sync.sync(policy_version=77)
    assert pool.version == version
    pool.engine.end_weight_update(version)


def test_the_engine_rejects_a_plan_for_another_model(case: dict[str, Any], tmp_path: Path) -> None:
    other = write_tiny_qwen3(tmp_path / "other", layers=LAYERS, intermediate=192)
    pool = case["pool"]
    sync = make_sync(ThreadedTrainer(other, engine_tp=1, **LAYOUTS[0]), pool, tmp_path / "s", other)
    with pytest.raises(WeightSyncError, match=r"down_proj.weight: the plan has \(64, 192\), the model \(64, 128\)"):
        sync.sync(policy_version=77)
    pool.engine.end_weight_update(pool.version)


def test_weights_go_by_messages_if_the_engine_is_on_another_host(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gloo group contains the threads that play the trainer, and the process of the real engine."""
    new, pool = case["news"][1], case["pool"]
    monkeypatch.setattr(pool, "host", lambda: "elsewhere")
    trainer, settings = ThreadedTrainer(new, engine_tp=1, **LARGE), make_settings()
    sync = make_sync(trainer, pool, tmp_path / "s", new, settings=settings)
    sync.sync(policy_version=91)
    sync.sync(policy_version=92)
    assert_greedy_equals(pool.engine, load_reference(new), version=92)
    trainer.tasks[1] = replace(trainer.tasks[1], channels=())  # this rank sends nothing
    settings.timeout_seconds = 3.0
    with pytest.raises(WeightSyncError, match=r"timed out after 3 s: trainer rank 1 to engine 0, rank 0: model"):
        sync.sync(policy_version=93)
    assert pool.version == 92
    sync = make_sync(ThreadedTrainer(new, engine_tp=1, **LAYOUTS[0]), pool, tmp_path / "t", new)
    sync.sync(policy_version=94)
    assert_greedy_equals(pool.engine, load_reference(new), version=94)


EXPERT_LAYOUTS = [{}, {"dp": 2, "ep": 2}, {"tp": 2, "pp": 2, "dp": 2, "ep": 4}]


@pytest.mark.slow
@pytest.mark.parametrize("engine_tp", [1, 2])
def test_experts_of_any_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine_tp: int) -> None:
    # On a CPU SGLang pads experts to 32 columns per rank, which the plan rejects; real models are multiples of that.
    prefix, changes = FAMILIES["qwen3_moe"]
    monkeypatch.setitem(FAMILIES, "qwen3_moe", (prefix, {**changes, "moe_intermediate_size": 64}))
    new = write_family(tmp_path / "new", "qwen3_moe")
    with running_engine(new, read_weights=False, tp=engine_tp, context_tokens=256) as engine:
        pool = OneEngine(engine)
        for version, layout in enumerate(EXPERT_LAYOUTS, 1):
            trainer = ThreadedTrainer(new, engine_tp=engine_tp, **layout)
            make_sync(trainer, pool, tmp_path / f"s{version}", new, tp=engine_tp).sync(policy_version=version)
        assert_greedy_equals(engine, load_reference(new), version=len(EXPERT_LAYOUTS))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_engine_ranks(tmp_path: Path, tied: bool) -> None:
    start, *news = (
        write_tiny_qwen3(tmp_path / f"seed{seed}", layers=LAYERS, tied=tied, seed=seed)
        for seed in (9, *range(len(LAYOUTS)))
    )
    with running_engine(start, tp=2) as engine:
        pool = OneEngine(engine)
        for version, (layout, new) in enumerate(zip(LAYOUTS, news, strict=True), 1):
            trainer = ThreadedTrainer(new, engine_tp=2, **layout)
            make_sync(trainer, pool, tmp_path / f"s{version}", new, tp=2).sync(policy_version=version)
            assert_greedy_equals(engine, load_reference(new), version=version)
