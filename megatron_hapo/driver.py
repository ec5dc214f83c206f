"""The loop: generate, score, advantages, train step, sync weights, log."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from megatron_hapo.algorithm.controllers import next_state, step_controls
from megatron_hapo.algorithm.minibatches import minibatch_rows, minibatches
from megatron_hapo.algorithm.step_statistics import steering, step_statistics
from megatron_hapo.algorithm.training_batch import training_batch
from megatron_hapo.checkpoint.run_checkpoints import Checkpoints, RunState
from megatron_hapo.config import Config
from megatron_hapo.memory_turns import MemoryTurns
from megatron_hapo.observe.metrics import MetricsLogger, StepClock
from megatron_hapo.observe.profiling import StepProfiler
from megatron_hapo.observe.records import RecordWriter, updates_with_tokens
from megatron_hapo.observe.running_stages import stage
from megatron_hapo.observe.step_metrics import step_metrics, unreplayed_metrics
from megatron_hapo.protocols import RewardPool, RolloutPool, Trainer
from megatron_hapo.rollout.collect import Collected, GroupSource, training_sampling
from megatron_hapo.rollout.evaluation import EvaluationSet, evaluate
from megatron_hapo.sizing.utilization import Utilization
from megatron_hapo.types import EntropyStats, TokenScores, TrainBatch, pack_groups


@dataclass(kw_only=True)
class Driver:
    """Runs a training job over its parts; holds the state that a resumed run needs."""

    config: Config
    trainer: Trainer
    pool: RolloutPool
    turns: MemoryTurns
    rewards: RewardPool
    groups: GroupSource
    eval_sets: list[EvaluationSet]
    logger: MetricsLogger
    checkpoints: Checkpoints
    utilization: Utilization
    profiler: StepProfiler
    records: RecordWriter | None = None
    """Writes responses and what is known of their tokens; None: nothing is recorded."""
    stats: EntropyStats | None = None
    """Statistics of the previous step, for the sampler; None before the first step, sampled at the base temperature."""
    controllers: dict[str, float] = field(default_factory=dict)
    """State of the method's controllers after the previous step; empty before the first."""
    stop_requested: bool = False
    """Set by a signal handler: the loop ends after the current step."""
    saved_step: int = field(default=0, init=False)
    """Step of the newest checkpoint that the driver has read or written; 0: none."""
    training_metrics: dict[str, float] = field(default_factory=dict, init=False)
    """Those of the previous step as far as its checkpoint has them: without evaluation and the stages after it."""

    def run(self) -> None:
        """Train from the newest checkpoint, or from the start, to the last step or until a stop is requested."""
        config, step = self.config, self._resume()
        self.turns.to_engines(policy_version=step)
        if self.logger.last_step < step:  # the run is new, or was killed between a checkpoint and its step's row
            self._log(step, self.training_metrics | self._evaluate(step, StepClock()))
        while step < config.steps and not self.stop_requested:
            step += 1
            with stage(f"step {step}"), self.profiler.clock(step) as clock:
                self.train_step(step, clock)
                evaluation = self._evaluate(step, clock)
            self._log(step, self.training_metrics | evaluation | clock.metrics())
        self.turns.to_trainer()
        if self.saved_step != step:
            self._save(step)

    def train_step(self, step: int, clock: StepClock) -> None:
        """One step of the paper's loop; step counts from 1."""
        collected = self._generate(step, clock)
        batch, scores = self._score(collected, clock)
        route_metrics = self._route_metrics(batch, step, clock)
        algorithm = self.config.algorithm
        self.stats = step_statistics(scores, algorithm)
        controls = step_controls(self.controllers, scores, algorithm)
        batch = training_batch(batch, collected.groups, scores, self.stats, algorithm, controls)
        num_recorded = 0 if self.records is None else self.records.num_responses(step, collected.groups)
        parts, updates, tokens = self._update(batch, step, clock, num_recorded)
        self.controllers = next_state(self.controllers, scores, updates, algorithm)
        if self.records is not None and num_recorded:
            collection = collected.details | {"prompts": self.groups.state()}
            self.records.add_step(step, collected.groups, batch, scores, tokens, collection=collection)
        metrics = step_metrics(
            groups=collected.groups, kept_share=collected.kept_share, batch=batch, scores=scores, stats=self.stats,
            updates=updates, step=step,
        )  # fmt: skip
        self.training_metrics = {
            **metrics,
            **route_metrics,
            **collected.metrics,
            **collected.seconds,
            **self.utilization.of_batches(parts),
            **clock.metrics(),
        }
        self._write_checkpoint(step, clock)
        self._sync_weights(step, clock)

    def _generate(self, step: int, clock: StepClock) -> Collected:
        """The step's groups with their rewards; afterwards the memory is the trainer's."""
        adaptive = steering(self.config.algorithm, self.stats)
        collected = self.groups.collect(step, training_sampling(self.config, step=step, adaptive=adaptive), clock)
        with clock("memory_turn"):
            self.turns.to_trainer()
        return collected

    def _score(self, collected: Collected, clock: StepClock) -> tuple[TrainBatch, TokenScores]:
        """The groups' responses as one batch, and the old policy's and the reference model's scores of their tokens."""
        batch = pack_groups(collected.groups)
        with clock("log_probs"):
            scores = self.trainer.log_probs(batch)
        if self.config.algorithm.kl.enabled:
            with clock("reference"):
                scores = replace(scores, reference_log_probs=self.trainer.reference_log_probs(batch))
        return batch, scores

    def _route_metrics(self, batch: TrainBatch, step: int, clock: StepClock) -> dict[str, float]:
        """How far engine and trainer choose the same experts, and at some steps what their log-probs would be without
        replay."""
        if batch.routes is None:
            return {}
        metrics = {"rollout/route_agreement": self.trainer.route_agreement()}
        if (every := self.config.rollout.compare_routes_every) and step % every == 0:
            with clock("log_probs"):
                scores = self.trainer.log_probs(replace(batch, routes=None))
            metrics |= unreplayed_metrics(batch, scores)
        return metrics

    def _update(
        self, batch: TrainBatch, step: int, clock: StepClock, num_recorded: int
    ) -> tuple[list[TrainBatch], list[dict[str, float]], dict[str, np.ndarray]]:
        """One optimizer step on each mini-batch: the mini-batches, their metrics, and what the updates used of the
        tokens of the batch's first `num_recorded` responses."""
        config = self.config
        with clock("update"):
            parts = minibatches(
                batch, config.algorithm, config.batch, max_tokens=config.rollout.max_response_tokens,
                seed=config.seed, step=step,
            )  # fmt: skip
            rows = minibatch_rows(config.batch, seed=config.seed, step=step)
            lengths_B = batch.response_lengths[:num_recorded]
            updated = updates_with_tokens(self.trainer, parts, rows, lengths_B, step=step)
            if (every := config.algorithm.kl.reset_every) and step % every == 0:
                self.trainer.replace_reference()
            return parts, *updated

    def _sync_weights(self, step: int, clock: StepClock) -> None:
        """Brings the new weights into the engines."""
        if self.config.weight_sync.in_flight == "finish":  # otherwise the engines deal with what is being generated
            self.groups.settle(clock)
        with clock("weight_sync"):
            self.turns.to_engines(policy_version=step)

    def _evaluate(self, step: int, clock: StepClock) -> dict[str, float]:
        """The evaluation's metrics; none after a step that is not evaluated."""
        every = self.config.eval.every
        if not self.eval_sets or not every or (step % every and step != self.config.steps):
            return {}
        with clock("eval"):
            if self.records is None:
                return evaluate(self.pool, self.rewards, self.eval_sets)
            record = partial(self.records.add_evaluation, step)
            return evaluate(self.pool, self.rewards, self.eval_sets, record=record)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the row of a step, or of the model before the first, if there is anything to write."""
        if "time/step" in metrics:
            metrics["tokens_per_second"] = metrics["num_response_tokens"] / metrics["time/step"]
            metrics |= self.utilization.of_step(metrics)
        if metrics:
            self.logger.log(step, metrics)

    def _write_checkpoint(self, step: int, clock: StepClock) -> None:
        with clock("checkpoint"):
            if (every := self.config.checkpoint.every) and step % every == 0:
                self._save(step)
            if (every := self.config.checkpoint.hf_every) and step % every == 0:
                self.trainer.export_hf(self.config.run_dir.absolute() / "hf_steps" / f"step_{step:08d}")

    def _save(self, step: int) -> None:
        # The state first: what finishes in between is among the finished groups as well, which then decide.
        prompts, finished = self.groups.state(), self.groups.finished_groups()
        state = RunState(
            step=step, prompts=prompts, stats=self.stats, controllers=self.controllers, finished_groups=finished,
            metrics=self.training_metrics,
        )  # fmt: skip
        self.checkpoints.save(state, self.trainer)
        self.saved_step = step

    def _resume(self) -> int:
        state = self.checkpoints.newest(self.trainer)
        if state is None:
            return 0
        self.groups.restore(state.prompts, state.finished_groups)
        self.stats, self.controllers, self.saved_step = state.stats, state.controllers, state.step
        self.training_metrics = dict(state.metrics)
        return state.step
