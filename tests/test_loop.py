"""The whole loop with all real parts: Ray, Megatron ranks over gloo, one SGLang engine, reward processes."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors.torch import load_file

from megatron_hapo.algorithm.step_statistics import steering
from megatron_hapo.checkpoint.model_folder import model_fingerprint
from megatron_hapo.checkpoint.run_checkpoints import Checkpoints
from megatron_hapo.checks.rehearsal import rehearse
from megatron_hapo.config import Config, ProfileConfig
from megatron_hapo.data.job_prompts import evaluation_prompts, training_prompts
from megatron_hapo.data.prompts import load_tokenizer
from megatron_hapo.driver import Driver
from megatron_hapo.entropy import adaptive_temperature
from megatron_hapo.launch.ray.engine_pool import RayRolloutPool
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.launch.ray.rank_actors import RankProcesses, RayTrainer
from megatron_hapo.memory_turns import MemoryTurns, make_room_for_trainer
from megatron_hapo.model.families import read_shape
from megatron_hapo.observe.metrics import MetricsLogger
from megatron_hapo.observe.profiling import StepProfiler
from megatron_hapo.observe.record_schema import Origin, vocabulary_fingerprint
from megatron_hapo.observe.records import open_records
from megatron_hapo.reward.pool import ProcessRewardPool
from megatron_hapo.rollout.collect import training_sampling
from megatron_hapo.rollout.evaluation import evaluation_sets
from megatron_hapo.rollout.group_stream import GroupStream
from megatron_hapo.sizing.utilization import Utilization
from megatron_hapo.types import GroupRequest, Prompt, Sampling, Score, pack_rollouts
from megatron_hapo.weight_sync import DirectSync, GatherSync, open_weight_sync
from tests.observe.test_metrics import documented_metrics
from tests.time_limits import patient

COLOCATED = {"tp": 2, "placement": "colocated"}
LAYOUTS = [{"tp": 1}, COLOCATED, {"pp": 2, "top_p": 0.9}]
TAU = 0.3


def make_config(model: Path, folder: Path, layout: dict[str, Any]) -> Config:
    """A small run of two steps on a parallel layout; `layout` may also contain `placement` and `top_p`."""
    layout = dict(layout)
    placement, top_p = layout.pop("placement", "disaggregated"), layout.pop("top_p", 1.0)
    return Config.model_validate(
        {
            "name": "_".join(f"{axis}{size}" for axis, size in layout.items()),
            "output_dir": folder,
            "steps": 2,
            "device": "cpu",
            "placement": placement,
            "model": {"path": model},
            "parallel": layout,
            "trainer": {"dtype": "float32", "max_tokens_per_microbatch": 256, "timeout_seconds": patient(120)},
            "optimizer": {"lr": 3e-3, "warmup_steps": 0},
            "batch": {"prompts_per_step": 4, "samples_per_prompt": 4, "prompts_per_minibatch": 2},
            "rollout": {
                "dtype": "float32",
                "top_p": top_p,
                "max_prompt_tokens": 64,
                "max_response_tokens": 24,
                "kv_cache_tokens": 4096,
                "memory_fraction": 0.1,
                "timeout_seconds": patient(400),
            },
            "algorithm": {"adaptive_temperature": {"tau": TAU}},
            "data": {"train": {"type": "arithmetic", "size": 40}, "eval": {"type": "arithmetic", "size": 4, "seed": 1}},
            # A random model is never right, but the overlong penalty still makes rewards differ within groups.
            "reward": {"overlong": {"buffer_tokens": 20}, "workers": 1},
            "record": {"every": 1, "groups": 3},
            "eval": {"every": 1, "temperature": 0.7, "top_p": 0.9},
            "weight_sync": {"verify_every": 1, "bucket_bytes": 50_000},
        }
    )


@pytest.fixture(scope="module")
def pool(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayRolloutPool]:
    """One engine for all layouts. It can release its memory, and every sync pauses it, needed or not."""
    with pausing_pool(tiny_qwen3, tmp_path_factory.mktemp("pool")) as opened:
        yield opened


@contextmanager
def pausing_pool(model: Path, folder: Path) -> Iterator[RayRolloutPool]:
    """One engine, in a Ray of its own, which every sync pauses."""
    values = make_config(model, folder, COLOCATED).model_dump()
    values |= {"async": {"max_staleness": 1}}
    values["weight_sync"]["in_flight"] = "pause"
    config = Config.model_validate(values)
    with local_ray(), ExitStack() as stack:
        rollout_pool = RayRolloutPool(config, device="cpu")
        stack.callback(rollout_pool.close)
        rollout_pool.wait_until_ready()
        yield rollout_pool


class Recorder:
    """A rollout pool that records everything it generates, also groups of training, in the order of their prompts."""

    def __init__(self, pool: RayRolloutPool):
        self._pool = pool
        self.generated: list[tuple[Sampling, list[Any]]] = []

    def stream(self, requests: Any) -> Iterator[Any]:
        """The pool's groups, which are recorded by the batches in which their prompts were drawn."""
        asked: list[GroupRequest] = []
        groups: dict[int, list[Any]] = {}

        def next_request() -> GroupRequest | None:
            request = requests()
            asked.extend([] if request is None else [request])
            return request

        for request, group in self._pool.stream(next_request):
            groups[id(request)] = group
            yield request, group
        for seed in dict.fromkeys(request.sampling.seed for request in asked):
            batch = [request for request in asked if request.sampling.seed == seed]
            rollouts = [rollout for request in batch for rollout in groups[id(request)]]
            self.generated.append((batch[0].sampling, rollouts))

    def generate(self, prompts: list[Prompt], sampling: Sampling):
        """The pool's groups, which are recorded."""
        groups = self._pool.generate(prompts, sampling)
        self.generated.append((sampling, [rollout for group in groups for rollout in group]))
        return groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)  # includes the methods that load weights


@contextmanager
def finished_run(config: Config, pool: RayRolloutPool, *, rewards: Any = None) -> Iterator[dict[str, Any]]:
    """The parts of a run that the real driver has taken from the newest checkpoint to the last step.

    The engine holds the last weights; the recorder has what it generated.

    Args:
        rewards: None: the config's.
    """
    tokenizer = load_tokenizer(config.model.path)
    eval_prompts = evaluation_prompts(config, tokenizer)
    recorder = Recorder(pool)
    with ExitStack() as stack:
        rewards = rewards or stack.enter_context(
            ProcessRewardPool(config.reward, config.model.path, config.rollout.max_response_tokens)
        )
        make_room_for_trainer(config, recorder, device="cpu")
        trainer = RayTrainer(config, RankProcesses(config, device="cpu"))
        stack.callback(trainer.close)
        weight_sync = stack.enter_context(open_weight_sync(config, trainer, recorder))
        assert isinstance(weight_sync, DirectSync)
        checkpoints = Checkpoints(config.run_dir / "checkpoints", keep=1, resume=True)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        logger = MetricsLogger(config.run_dir, total_steps=config.steps, start_step=checkpoints.newest_step())
        origin = Origin(model_fingerprint(config.model.path), vocabulary_fingerprint(tokenizer))
        start_step = checkpoints.newest_step()
        turns = MemoryTurns(config, trainer, recorder, weight_sync)
        groups = GroupStream(
            config, recorder, rewards, training_prompts(config, tokenizer), restore_engines=turns.restore_engines
        )
        stack.callback(groups.close)
        driver = Driver(
            config=config,
            records=stack.enter_context(open_records(config, tokenizer, origin, start_step=start_step)),
            trainer=trainer,
            pool=recorder,
            turns=turns,
            rewards=rewards,
            groups=groups,
            eval_sets=evaluation_sets(config, eval_prompts),
            logger=stack.enter_context(logger),
            checkpoints=checkpoints,
            utilization=Utilization(
                config=config, shape=read_shape(config.model.path), peak_flops=None, transformer_engine=False
            ),
            profiler=StepProfiler(
                config.profile.steps, config.run_dir / "profile", trainer=trainer, pool=recorder, rewards=rewards
            ),
        )
        driver.run()
        driver.turns.to_engines(policy_version=config.steps)
        yield {
            "config": config,
            "driver": driver,
            "recorder": recorder,
            "trainer": trainer,
            "prompts": [prompt for prompts in eval_prompts.values() for prompt in prompts],
            "rewards": rewards,
            "weight_sync": weight_sync,
        }


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: "_".join(layout))
def trained(
    request: pytest.FixtureRequest, pool: RayRolloutPool, tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """A run of two steps on one layout, the second one profiled, whose model was exported."""
    config = make_config(tiny_qwen3, tmp_path_factory.mktemp("runs"), request.param)
    config = config.model_copy(update={"profile": ProfileConfig(steps=(2,))})
    with finished_run(config, pool) as run:
        run["trainer"].export_hf(config.run_dir / "hf")
        yield run


def is_timed(metric: str) -> bool:
    """Whether the metric depends on the clock, so that equal runs may differ in it."""
    return metric.startswith(("time/", "tokens_per_second", "utilization/tokens")) or metric.endswith("_idle_share")


def metrics_of(trained: dict[str, Any]) -> list[dict[str, float]]:
    """The rows of metrics.jsonl."""
    lines = (trained["config"].run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def sampling_of(run: dict[str, Any], step: int) -> Sampling:
    """How the run's driver would sample this step now."""
    config, stats = run["config"], run["driver"].stats
    return training_sampling(config, step=step, adaptive=steering(config.algorithm, stats))


def test_metrics_have_the_expected_keys(trained: dict[str, Any]) -> None:
    before, *steps = metrics_of(trained)
    assert before["step"] == 0
    assert "eval/accuracy" in before
    assert [row["step"] for row in steps] == [1, 2]
    expected = """step reward/mean eval/accuracy entropy/mean entropy/pivot temperature/min temperature/mean
    temperature/max response_length/mean loss/policy loss/clip_fraction_low loss/clip_fraction_high grad_norm
    rollout/logprob_abs_diff time/rollout time/reward time/log_probs time/update time/weight_sync time/step
    tokens_per_second"""
    for row in steps:
        assert set(expected.split()) <= row.keys()
        assert row.keys() <= documented_metrics() | {"step"}
        assert all(np.isfinite(value) for value in row.values())


def test_trainer_and_engine_agree_on_log_probs(trained: dict[str, Any]) -> None:
    for row in metrics_of(trained)[1:]:
        assert row["rollout/logprob_abs_diff_max"] < 2e-3


def test_the_first_step_samples_at_a_fixed_temperature_and_the_second_adaptively(trained: dict[str, Any]) -> None:
    first, second = metrics_of(trained)[1:]
    assert first["temperature/min"] == first["temperature/max"] == 1.0
    # rounding in float32 may exceed the bounds slightly
    assert 1 - TAU - 1e-6 < second["temperature/min"] < second["temperature/max"] < 1 + TAU + 1e-6


def test_evaluation_samples_at_its_fixed_temperature(trained: dict[str, Any]) -> None:
    evaluations = [rollouts for sampling, rollouts in trained["recorder"].generated if sampling.temperature == 0.7]
    assert len(evaluations) == 3
    for rollout in (rollout for rollouts in evaluations for rollout in rollouts):
        np.testing.assert_array_equal(rollout.temperatures, np.float32(0.7))


def test_temperatures_follow_from_the_entropies_of_the_policy(trained: dict[str, Any]) -> None:
    """Earlier policies are gone, so the last one samples and scores; T_t must follow from its entropies."""
    trainer = trained["trainer"]
    sampling = sampling_of(trained, 3)
    assert sampling.adaptive is not None
    groups = trained["recorder"].generate(trained["prompts"], sampling)
    rollouts = [rollout for group in groups for rollout in group]
    scores = trainer.log_probs(pack_rollouts(rollouts))
    expected = adaptive_temperature(torch.from_numpy(scores.entropies), 1.0, sampling.adaptive.stats, tau=TAU)
    recorded = np.concatenate([rollout.temperatures for rollout in rollouts])
    np.testing.assert_allclose(recorded, expected, atol=2e-4)
    assert recorded.std() > 0.01


def test_the_trainer_scores_tokens_among_those_that_the_cut_kept(trained: dict[str, Any]) -> None:
    """At the adaptive temperature; without the kept tokens the trainer's log-probs are those of another policy."""
    sampling = replace(sampling_of(trained, 3), top_p=0.9, keep_cut=True)
    groups = trained["recorder"].generate(trained["prompts"], sampling)
    batch = pack_rollouts([rollout for group in groups for rollout in group])
    assert batch.kept is not None
    assert 1 < batch.kept.lengths.mean() < batch.kept.lengths.max() < 262
    found = trained["trainer"].log_probs(batch).rollout_temperature_log_probs - batch.rollout_log_probs
    without = trained["trainer"].log_probs(replace(batch, kept=None))
    missed = without.rollout_temperature_log_probs - batch.rollout_log_probs
    assert np.abs(found).max() < 1e-5
    assert np.abs(missed).mean() > 0.05


def test_rollouts_record_the_version_of_the_weights(trained: dict[str, Any]) -> None:
    versions = [{rollout.policy_version for rollout in rollouts} for _, rollouts in trained["recorder"].generated]
    # evaluation, step 1, evaluation, step 2, evaluation; other tests may have generated more with the last version
    assert versions[:5] == [{0}, {0}, {1}, {1}, {2}]


def test_records_hold_what_the_updates_used(trained: dict[str, Any]) -> None:
    folder = trained["config"].run_dir / "rollouts"
    while not (path := folder / "eval_00000002.parquet").is_file():  # written beside the training
        time.sleep(0.1)
    assert set(pq.read_table(path)["step"].to_pylist()) == {2}
    rows = pq.read_table(folder / "step_00000002.parquet").to_pylist()
    assert [(row["group"], row["sample"]) for row in rows] == [(group, i) for group in range(3) for i in range(4)]
    sampled = {tuple(r.response_ids.tolist()) for _, rollouts in trained["recorder"].generated for r in rollouts}
    for row in rows:
        assert tuple(row["response_ids"]) in sampled
        ratios, low, high = (np.array(row[name]) for name in ("importance_ratios", "clip_low", "clip_high"))
        assert len(ratios) == len(row["response_ids"]) == len(row["h"])
        assert ((low >= 0) & (high >= 0) & (np.abs(ratios - 1) < 1)).all()
        assert np.sign(row["token_advantages"]).tolist() == [np.sign(row["advantage"])] * len(ratios)


def test_greedy_responses_equal_those_of_the_exported_model_in_transformers(trained: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    folder = trained["config"].run_dir / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    sampling = replace(training_sampling(trained["config"], step=0, adaptive=None), samples=1, temperature=0.0)
    for (rollout,) in trained["recorder"].generate(trained["prompts"], sampling):
        tokens = torch.from_numpy(rollout.prompt.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            answer = model.generate(tokens, max_new_tokens=24, do_sample=False)[0, tokens.shape[1] :]
        np.testing.assert_array_equal(rollout.response_ids, answer)


def test_the_policy_changed(trained: dict[str, Any], tiny_qwen3: Path) -> None:
    before = load_file(tiny_qwen3 / "model.safetensors")
    after: dict[str, torch.Tensor] = {}
    for path in (trained["config"].run_dir / "hf").glob("*.safetensors"):
        after |= load_file(path)
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_a_profiled_step_is_traced_over_all_processes(trained: dict[str, Any]) -> None:
    config = trained["config"]
    (folder,) = (config.run_dir / "profile").iterdir()
    assert_step_is_traced(folder, config)
    for rank in range(config.parallel.world_size):
        events = read_trace(folder / f"trainer_rank_{rank:05d}.json.gz")
        assert {"log_probs", "update", "aten::mm"} <= {event.get("name") for event in events}


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a gzipped Chrome trace."""
    return json.loads(gzip.open(path).read())["traceEvents"]


def assert_step_is_traced(folder: Path, config: Config) -> None:
    """Every process has its row, and its spans lie within the driver's stage that caused them."""
    events = read_trace(folder / "step.json.gz")
    rows = {e["pid"]: e["args"]["name"].partition(" (")[0] for e in events if e["name"] == "process_name"}
    ranks = [f"trainer rank {rank}" for rank in range(config.parallel.world_size)]
    engines = [f"engine {index}" for index in range(config.rollout.engines)]
    workers = [f"reward worker {index}" for index in range(config.reward.workers)]
    assert list(rows.values()) == ["driver", *ranks, *engines, *workers]
    spans = [(rows[e["pid"]], e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]
    stages = [(name, begin, end) for row, name, begin, end in spans if row == "driver"]
    assert {name for name, _, _ in stages} >= {"rollout_wait", "log_probs", "update", "weight_sync"}
    where = {
        **dict.fromkeys(("advance", "score"), ("rollout_wait", "eval")),
        **{name: (name,) for name in ("log_probs", "update")},
        "updated_tokens": ("update",),
        "save_checkpoint": ("checkpoint",),
        **{name: ("memory_turn", "weight_sync") for name in ("release_memory", "take_memory")},
    }
    for row, name, begin, end in (span for span in spans if span[0] != "driver"):
        stage = where.get(name, ("weight_sync",))
        assert any(s in stage and b <= begin <= end <= e for s, b, e in stages), (row, name, begin, end)
    done = {row: {name for r, name, _, _ in spans if r == row} for row in rows.values()}
    for rank in ranks:
        assert done[rank] >= {"log_probs", "update", "send_weights"}
    for engine in engines:
        assert done[engine] == {"advance", "receive_weights", "verify", "end_weight_update"}
    assert all(done[worker] == {"score"} for worker in workers)


@pytest.mark.parametrize("trained", [COLOCATED], indirect=True)
def test_an_interrupted_run_resumes_on_the_same_trajectory(
    trained: dict[str, Any], pool: RayRolloutPool, tmp_path: Path
) -> None:
    """Interrupted as a disaggregated run and resumed as a colocated one: memory turns do not change the metrics.

    It is interrupted where a kill loses most: the checkpoint is there, and neither the step's evaluation nor its row.
    """
    config = trained["config"].model_copy(update={"output_dir": tmp_path})
    with finished_run(config.model_copy(update={"steps": 1, "placement": "disaggregated"}), pool):
        pass
    metrics_file = config.run_dir / "metrics.jsonl"
    first, _ = metrics_file.read_text().splitlines()
    metrics_file.write_text(first + "\n")
    with finished_run(config, pool) as resumed:
        rows = metrics_of(resumed)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row, want in zip(rows, metrics_of(trained), strict=True):
        same = {name: value for name, value in want.items() if not is_timed(name)}
        assert {name: row[name] for name in same} == pytest.approx(same, rel=1e-3, abs=1e-5)


class RewardsByTokens:
    """One response of two is right, so that some groups differ and others do not."""

    def score(self, rollouts: list[Any]) -> list[Score]:
        """The scores in the order of the rollouts."""
        right = [float(rollout.response_ids.sum() % 2) for rollout in rollouts]
        return [Score(reward=2 * correctness - 1, correctness=correctness) for correctness in right]


def mixed_config(model: Path, folder: Path, steps: int) -> Config:
    """A run on two sources with a curriculum, evaluated on two sets; it writes a checkpoint at its end."""
    values = make_config(model, folder, {"tp": 1}).model_dump()
    values |= {"steps": steps}
    sums = {"type": "arithmetic", "size": 6}
    folder.mkdir(exist_ok=True)
    rows = "".join(f"{number}+{number}=,{2 * number}\n" for number in range(5))
    (folder / "doubles.csv").write_text(f"question,answer\n{rows}")
    doubles = {"type": "file", "path": folder / "doubles.csv", "columns": {"prompt": "question"}}
    values["data"] = {
        "train": {"sums": {**sums, "weight": 3}, "doubles": doubles},
        "eval": {"one": {**sums, "samples": 2}, "greedy": {**sums, "size": 2, "temperature": 0}},
        "curriculum": {"enabled": True, "revisit": 0.5},
    }
    # Controllers whose state follows every step; no entropy of a random model reaches the bonus's target.
    values["algorithm"] |= {
        "entropy_bonus": {"enabled": True, "target": 50.0, "coefficient": 1e-3, "delta": 1e-3},
        "entropic": {"enabled": True, "target": 5.0, "probability": 0.1},
        "repo": {"enabled": True},
        "bapo": {"enabled": True, "target": 1.1},
        # After step 2 its policy is the reference, which the checkpoint then holds.
        "kl": {"enabled": True, "coefficient": 0.1, "target": 1e-3, "reset_every": 2},
    }
    return Config.model_validate(values)


@pytest.mark.slow
def test_a_run_resumed_within_a_mixture_and_a_curriculum_equals_the_uninterrupted_one(
    pool: RayRolloutPool, tiny_qwen3: Path, tmp_path: Path
) -> None:
    """Bit for bit: prompts, responses, state and weights after 4 steps, of which the second run resumes after 2."""

    def run(folder: Path, *lengths: int) -> dict[str, Any]:
        responses: list[Any] = []
        for steps in lengths:
            config = mixed_config(tiny_qwen3, folder, steps)
            with finished_run(config, pool, rewards=RewardsByTokens()) as run:
                for sampling, rollouts in run["recorder"].generated:
                    if sampling.temperature == config.rollout.temperature:  # not an evaluation
                        responses += [(r.prompt.uid, r.prompt.columns, r.response_ids.tolist()) for r in rollouts]
                run["trainer"].export_hf(folder / "hf")
                rows = [
                    {k: v for k, v in row.items() if not is_timed(k) and not k.startswith("utilization/")}
                    for row in metrics_of(run)
                ]
        (state,) = (config.run_dir / "checkpoints").glob("step_*/run_state.json")
        weights = {k: v for path in (folder / "hf").glob("*.safetensors") for k, v in load_file(path).items()}
        return {"responses": responses, "rows": rows, "state": json.loads(state.read_text()), "weights": weights}

    whole, resumed = run(tmp_path / "whole", 4), run(tmp_path / "resumed", 2, 4)
    assert resumed["responses"] == whole["responses"]
    for run_state in (resumed["state"], whole["state"]):
        del run_state["metrics"]  # they are in the rows
    assert resumed["state"] == whole["state"]
    controllers = whole["state"]["controllers"]
    assert controllers["entropy_bonus/coefficient"] == pytest.approx(5e-3)
    assert controllers.keys() > {"entropic/integral", "repo/zeta", "repo/target", "bapo/low", "bapo/high"}
    assert [row["kl/mean"] > 0 for row in whole["rows"][1:]] == [False, True, False, True]
    assert len({row["control/kl_coefficient"] for row in whole["rows"][1:]}) == 4
    assert {"question": "3+3=", "answer": "6"} in [columns for _, columns, _ in whole["responses"]]
    assert whole["state"]["prompts"]["taken"] == {"sums": 12, "doubles": 4}
    assert any(source["unvaried"] for source in whole["state"]["prompts"]["sources"].values())
    assert all(torch.equal(value, whole["weights"][name]) for name, value in resumed["weights"].items())
    for row, want in zip(resumed["rows"], whole["rows"], strict=True):
        # The engine's own log-probs and temperatures depend, in the last bit, on the responses that it decodes at once.
        engines = {name for name in want if name.startswith(("temperature/", "rollout/logprob", "rollout/mismatch"))}
        assert {k: v for k, v in row.items() if k not in engines} == {k: v for k, v in want.items() if k not in engines}
        assert {k: row[k] for k in engines} == pytest.approx({k: want[k] for k in engines}, abs=1e-6)
    expected = {"source/sums/accuracy", "curriculum/rare_share", "eval/one/pass@2", "eval/greedy/accuracy"}
    assert expected <= whole["rows"][-1].keys()


def test_nothing_listens_beyond_loopback(trained: dict[str, Any]) -> None:
    """Checks every listening socket of this process and its descendants: Ray, trainer ranks, engine."""
    import psutil

    me = psutil.Process()
    listening = [
        (process.name(), connection.laddr)
        for process in [me, *me.children(recursive=True)]
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    beyond = [entry for entry in listening if entry[1].ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
    assert not beyond


def test_gathered_weights_are_verified_too(trained: dict[str, Any]) -> None:
    """`gather`, for models whose layout in the engine is unknown: engines load whole tensors and compare checksums."""
    GatherSync(trained["trainer"], trained["recorder"], num_engines=1, verify_every=1).sync(policy_version=9)
    (rollout,) = trained["recorder"].generate(trained["prompts"][:1], replace(sampling_of(trained, 0), samples=1))[0]
    assert rollout.policy_version == 9


def test_the_rehearsal_finds_no_fault(trained: dict[str, Any]) -> None:
    run = trained
    turns = run["driver"].turns
    turns.to_trainer()
    tokenizer = load_tokenizer(run["config"].model.path)
    findings = rehearse(
        run["config"], run["trainer"], run["recorder"], turns, run["rewards"], run["prompts"], tokenizer=tokenizer
    )
    turns.to_engines(policy_version=9)
    assert {finding.verdict for finding in findings} <= {"ok", "warning", "response"}  # a random model is never right
    messages = "\n".join(finding.message for finding in findings)
    assert "every engine holds the trainer's weights" in messages
    assert re.search(r"^log-probs of engine and trainer differ by \S+e-0[4-9] on average", messages, re.MULTILINE)
    assert re.search(
        r"^at the adaptive temperature, log-probs .* differ by \S+e-0[4-9] on average", messages, re.MULTILINE
    )


def test_a_dead_trainer_rank_is_named(pool: RayRolloutPool, tiny_qwen3: Path, tmp_path: Path) -> None:
    from megatron_hapo.errors import TrainingError

    config = make_config(tiny_qwen3, tmp_path, {"tp": 2})
    trainer = RayTrainer(config, RankProcesses(config, device="cpu"))
    try:
        ray.kill(trainer._actors[1])
        with pytest.raises(TrainingError, match="trainer rank 1: the process died"):
            trainer.save_checkpoint(tmp_path)
    finally:
        trainer.close()
