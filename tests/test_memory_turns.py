"""Who holds which memory when: the real driver and rehearsal over parts that account for the GPU's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from megatron_hapo.checkpoint.manifest import damaged_files
from megatron_hapo.checkpoint.run_checkpoints import Checkpoints
from megatron_hapo.checks.rehearsal import rehearse
from megatron_hapo.config import Config
from megatron_hapo.data.sampling import PromptSampler
from megatron_hapo.driver import Driver
from megatron_hapo.errors import RolloutError
from megatron_hapo.memory_turns import MemoryTurns, make_room_for_trainer
from megatron_hapo.observe.metrics import MetricsLogger
from megatron_hapo.observe.profiling import StepProfiler
from megatron_hapo.reward.pool import Score
from megatron_hapo.rollout.evaluation import evaluation_sets
from megatron_hapo.rollout.group_stream import GroupStream
from megatron_hapo.types import GroupRequest, Prompt, Rollout, Sampling, TokenScores, TrainBatch

SIZES = {"engine weights": 1, "engine kv_cache": 10, "trainer gradients": 4, "trainer optimizer": 8}


class Books:
    """What is held at each moment, and what happened meanwhile, for trainer, engines and sync."""

    def __init__(self, config: Config):
        self.config = config
        self.held = {"engine weights", "engine kv_cache"}
        self.events: list[str] = []
        self.peak = 0

    def note(self, event: str, *, needs: Sequence[str] = ()) -> None:
        self.events.append(event)
        assert {*needs} <= self.held, f"{event} needs {needs}, held are {self.held}"
        self.peak = max(self.peak, sum(SIZES[part] for part in self.held))

    def move(self, who: str, parts: Sequence[str], *, take: bool) -> None:
        names = {f"{who} {part}" for part in parts}
        assert names.isdisjoint(self.held) if take else names <= self.held
        self.held = self.held | names if take else self.held - names
        self.note(f"{who} {'takes' if take else 'releases'} {' '.join(parts)}")


class Engines:
    def __init__(self, books: Books):
        self.books, self.version = books, 0

    def wait_until_ready(self) -> None:
        self.books.note("ready")

    def broadcast(self, verb: Callable[..., Any], *arguments: Any) -> list[Any]:
        return [getattr(self, verb.__name__)(*arguments)]

    new_engines: tuple[int, ...] = ()

    def replace_dead_engines(self, *, patience_seconds: float) -> list[int]:
        return []

    def release_memory(self, parts: Sequence[str]) -> None:
        self.books.move("engine", parts, take=False)

    def take_memory(self, parts: Sequence[str]) -> None:
        self.books.move("engine", parts, take=True)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        self.books.note("generate", needs=("engine weights", "engine kv_cache"))
        ids, zeros = np.arange(3, dtype=np.int32), np.full(3, -1.0, np.float32)
        return [
            [
                Rollout(
                    prompt=prompt, response_ids=ids, rollout_log_probs=zeros, temperatures=zeros * 0 + 1,
                    finish_reason="stop", policy_versions=np.full(3, self.version, np.int32),
                )
            ]
            * sampling.samples
            for prompt in prompts
        ]  # fmt: skip

    def stream(self, requests: Callable[[], GroupRequest | None]) -> Iterator[tuple[GroupRequest, list[Rollout]]]:
        batch = list(iter(requests, None))
        groups = self.generate([request.prompt for request in batch], batch[0].sampling)
        yield from zip(batch, groups, strict=True)

    waits_for_sync = False


class Ranks:
    def __init__(self, books: Books):
        self.books = books
        books.held |= {"trainer gradients", "trainer optimizer"}

    def broadcast(self, verb: Callable[..., Any], *arguments: Any) -> list[Any]:
        return [getattr(self, verb.__name__)(*arguments)]

    def release_memory(self, parts: Sequence[str]) -> None:
        self.books.move("trainer", parts, take=False)

    def take_memory(self, parts: Sequence[str]) -> None:
        self.books.move("trainer", parts, take=True)

    def log_probs(self, batch: TrainBatch) -> TokenScores:
        self.books.note("log_probs")
        zeros = np.zeros(batch.num_response_tokens, np.float32)
        return TokenScores(log_probs=zeros - 1, rollout_temperature_log_probs=zeros - 1, entropies=zeros + 0.5)

    def update(self, batch: TrainBatch, *, step: int, keep_tokens: bool = False) -> dict[str, float]:
        self.books.note("update", needs=("trainer gradients", "trainer optimizer"))
        return {"loss/policy": 0.0}

    def save_checkpoint(self, folder: Path) -> dict[str, str]:
        self.books.note("save", needs=("trainer optimizer",))
        return {}

    def damaged_files(self, folder: Path) -> list[str]:
        return damaged_files(folder)

    def load_checkpoint(self, folder: Path) -> None:
        self.books.note("load", needs=("trainer optimizer",))

    def export_hf(self, folder: Path) -> None:
        self.books.note("export")


class Sync:
    def __init__(self, books: Books, engines: Engines):
        self.books, self.engines = books, engines

    def sync(self, *, policy_version: int) -> None:
        self.books.note("sync", needs=("engine weights",))
        self.engines.version = policy_version


class Rewards:
    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [Score(reward=float(i % 2), correctness=float(i % 2)) for i, _ in enumerate(rollouts)]


class Shares:
    def of_batches(self, parts: Any) -> dict[str, float]:
        return {}

    def of_step(self, metrics: Any) -> dict[str, float]:
        return {}


def make_config(folder: Path, placement: str, **settings: Any) -> Config:
    return Config.model_validate(
        {
            "name": "turns",
            "output_dir": folder,
            "steps": 2,
            "device": "cpu",
            "placement": placement,
            "model": {"path": folder},
            "batch": {"prompts_per_step": 2, "samples_per_prompt": 2, "prompts_per_minibatch": 1},
            "rollout": {"max_prompt_tokens": 8, "max_response_tokens": 8},
            "data": {"train": {"type": "arithmetic", "size": 4}, "eval": {"type": "arithmetic", "size": 4}},
            "eval": {"every": 2},
            "checkpoint": {"every": 1, "hf_every": 2},
            **settings,
        }
    )


@contextmanager
def opened(config: Config) -> Iterator[tuple[Books, Engines, Ranks, MemoryTurns]]:
    """The parts, opened in the order of `run.open_parts`."""
    books = Books(config)
    engines: Any = Engines(books)
    make_room_for_trainer(config, engines, device="cpu")
    ranks: Any = Ranks(books)
    sync: Any = Sync(books, engines)
    yield books, engines, ranks, MemoryTurns(config, ranks, engines, sync)


PROMPTS = [
    Prompt(uid=str(i), token_ids=np.arange(4, dtype=np.int32), ground_truth="1", data_source="sums") for i in range(4)
]


def run(config: Config) -> Books:
    with opened(config) as (books, engines, ranks, turns):
        parts: Any = {"trainer": ranks, "pool": engines, "rewards": Rewards()}
        profiler = StepProfiler((), config.run_dir, **parts)
        parts |= {"utilization": Shares(), "profiler": profiler}
        config.run_dir.mkdir(parents=True, exist_ok=True)
        prompts = PromptSampler(PROMPTS, seed=0, shuffle=False)
        stream = GroupStream(config, engines, parts["rewards"], prompts, restore_engines=turns.restore_engines)
        checkpoints = Checkpoints(config.run_dir / "checkpoints", keep=1, resume=True)
        logged = MetricsLogger(config.run_dir, total_steps=config.steps, start_step=checkpoints.newest_step())
        with closing(stream) as groups, logged as logger:
            Driver(
                config=config,
                turns=turns,
                groups=groups,
                eval_sets=evaluation_sets(config, {"": PROMPTS}),
                logger=logger,
                checkpoints=checkpoints,
                **parts,
            ).run()
    return books


TO_TRAINER = ["engine releases kv_cache weights", "trainer takes optimizer gradients"]
TO_ENGINES = ["trainer releases gradients optimizer", "engine takes weights", "sync", "engine takes kv_cache"]
TRAIN = ["log_probs", "update", "update", "save"]


def test_the_order_of_a_run_and_of_a_resumed_one(tmp_path: Path) -> None:
    config = make_config(tmp_path, "colocated")
    books = run(config)
    assert books.events == [
        *["ready", "engine releases kv_cache weights", *TO_ENGINES, "generate"],  # evaluation of the first weights
        *["generate", *TO_TRAINER, *TRAIN, *TO_ENGINES],
        *["generate", *TO_TRAINER, *TRAIN, "export", *TO_ENGINES, "generate"],
        *TO_TRAINER,  # for exports after the run; everything is saved already
    ]
    again = run(config.model_copy(update={"steps": 3}))
    assert again.events == [
        *["ready", "engine releases kv_cache weights", "load", *TO_ENGINES],
        *["generate", *TO_TRAINER, *TRAIN, *TO_ENGINES, "generate"],
        *TO_TRAINER,
    ]


@pytest.mark.parametrize(
    ("trainer", "engines", "peak"),
    # Engines need 11 and the trainer 12, never at once; what is kept counts in both turns.
    [("all", "all", 12), ("gradients", "all", 19), ("all", "kv_cache", 13), ("gradients", "kv_cache", 19)],
)
def test_the_peak_is_never_the_sum_of_both_sides(
    tmp_path: Path, trainer: Literal["all", "gradients"], engines: Literal["all", "kv_cache"], peak: int
) -> None:
    books = run(make_config(tmp_path, "colocated", memory_turns={"trainer": trainer, "engines": engines}))
    assert books.peak == peak


def test_a_run_that_saves_only_at_its_end_does_so_in_the_trainers_turn(tmp_path: Path) -> None:
    books = run(make_config(tmp_path, "colocated", checkpoint={"every": 0}))
    assert books.events[-3:] == [*TO_TRAINER, "save"]


def test_on_separate_gpus_nothing_is_released(tmp_path: Path) -> None:
    books = run(make_config(tmp_path, "disaggregated"))
    assert not [event for event in books.events if "releases" in event or "takes" in event]
    assert books.events.count("sync") == 3


def test_a_rehearsal_takes_the_same_turns(tmp_path: Path) -> None:
    config = make_config(tmp_path, "colocated")
    with opened(config) as (books, engines, ranks, turns):
        parts: Any = {"trainer": ranks, "pool": engines, "rewards": Rewards()}
        tokenizer: Any = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
        rehearse(config, turns=turns, prompts=PROMPTS, tokenizer=tokenizer, **parts)
    steered = [*TO_ENGINES, "generate", *TO_TRAINER, "log_probs"]
    assert books.events == ["ready", "engine releases kv_cache weights", *steered, *steered]


def test_engines_do_not_get_two_turns_in_a_row(tmp_path: Path) -> None:
    with opened(make_config(tmp_path, "disaggregated")) as (_, _, _, turns):
        turns.to_engines(policy_version=0)
        with pytest.raises(AssertionError, match="it is the engines' turn already"):
            turns.to_engines(policy_version=1)


def test_new_engines_are_restored_in_the_engines_turn_by_the_trainers_thread_only(tmp_path: Path) -> None:
    with opened(make_config(tmp_path, "colocated")) as (books, engines, _, turns), ThreadPoolExecutor(1) as thread:
        assert not turns.restore_engines()  # the trainer's turn
        turns.to_engines(policy_version=7)
        engines.version = 0  # a new engine
        assert not thread.submit(turns.restore_engines).result()
        assert engines.version == 0
        assert turns.restore_engines()
        assert engines.version == 7
        assert books.events[-2:] == ["engine takes kv_cache", "sync"]


def test_an_engine_that_dies_between_the_sync_and_its_cache_is_synced_again(tmp_path: Path, monkeypatch) -> None:
    with opened(make_config(tmp_path, "colocated")) as (books, engines, _, turns):
        dead = [0]
        take_memory = engines.take_memory

        def dies_once(parts: Sequence[str]) -> None:
            if dead and "kv_cache" in parts:
                raise RolloutError("take_memory: engine 0: the process died")
            take_memory(parts)

        monkeypatch.setattr(engines, "take_memory", dies_once)
        monkeypatch.setattr(
            engines, "replace_dead_engines", lambda patience_seconds: [dead.pop()] if "sync" in books.events else []
        )
        turns.to_engines(policy_version=7)
        assert books.events[-3:] == ["sync", "sync", "engine takes kv_cache"]
