"""The loop: generate, score, advantages, update, sync weights, log."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_hapo.algorithm.prepare import (
    entropy_metrics,
    minibatches,
    mismatch_metrics,
    weight_metrics,
    with_advantages,
    with_scores,
)
from megatron_hapo.checkpoint.run_checkpoints import Checkpoints, RunState
from megatron_hapo.config import Config
from megatron_hapo.data.prompts import PromptSampler
from megatron_hapo.entropy import EntropyStats
from megatron_hapo.memory_turns import MemoryTurns
from megatron_hapo.observe.metrics import MetricsLogger, StepClock
from megatron_hapo.observe.profiling import StepProfiler
from megatron_hapo.protocols import RewardPool, RolloutPool, Trainer
from megatron_hapo.rollout.collect import collect_groups, staleness, steering
from megatron_hapo.rollout.evaluation import evaluate
from megatron_hapo.rollout.source import Collected, Generation, RolloutSource
from megatron_hapo.sizing.utilization import Utilization
from megatron_hapo.types import Prompt, Sampling


@dataclass(kw_only=True)
class Driver:
    """Runs a training job over its parts; holds what a resumed run must know again."""

    config: Config
    trainer: Trainer
    pool: RolloutPool
    turns: MemoryTurns
    rewards: RewardPool
    prompts: PromptSampler
    eval_prompts: list[Prompt]
    logger: MetricsLogger
    checkpoints: Checkpoints
    utilization: Utilization
    profiler: StepProfiler
    stats: EntropyStats | None = None
    """Of the previous step, for the sampler; None before the first, which samples at the base temperature."""
    stop_requested: bool = False
    """Set from a signal handler: the loop ends after the step under way."""
    _saved_step: int = field(default=0, init=False)
    _prompts_after: dict[int, int] = field(default_factory=dict, init=False)
    """State of the prompt sampler after each step's generation."""

    def run(self) -> None:
        """Train from the newest checkpoint, or from the start, to the last step or until a stop is requested."""
        config, step = self.config, self._resume()
        self.turns.to_engines(policy_version=step)
        if step == 0 and self._evaluates(0):
            self.logger.log(0, evaluate(self.pool, self.rewards, self.eval_prompts, config))
        rollouts = RolloutSource(self._generation, ahead=config.async_.max_staleness, last_step=config.steps)
        while step < config.steps and not self.stop_requested:
            step += 1
            with self.profiler.clock(step) as clock:
                metrics = self.train_step(step, rollouts, clock)
                if self._evaluates(step):
                    with clock("eval"):
                        metrics |= evaluate(self.pool, self.rewards, self.eval_prompts, config)
                metrics |= clock.metrics()
            metrics["tokens_per_second"] = metrics["num_response_tokens"] / metrics["time/step"]
            self.logger.log(step, metrics | self.utilization.of_step(metrics))
        self.turns.to_trainer()
        if self._saved_step != step:
            self._save(step)

    def train_step(self, step: int, rollouts: RolloutSource, clock: StepClock) -> dict[str, float]:
        """One step of the paper's loop; step counts from 1."""
        config, (groups, metrics) = self.config, rollouts.take(step, clock)
        with clock("memory_turn"):
            self.turns.to_trainer()
        batch = with_advantages(groups, config.algorithm)
        with clock("log_probs"):
            scores = self.trainer.log_probs(batch)
        batch, self.stats = with_scores(batch, scores, config.algorithm, group_size=config.batch.samples_per_prompt)
        with clock("update"):
            parts = minibatches(
                batch, config.algorithm, config.batch, max_tokens=config.rollout.max_response_tokens,
                seed=config.seed, step=step,
            )  # fmt: skip
            updates = [self.trainer.update(part, step=step) for part in parts]
        self._write(step, clock)
        if config.weight_sync.in_flight == "finish":
            rollouts.wait(clock)
        with clock("weight_sync"):
            self.turns.to_engines(policy_version=step)
        means = {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
        return {
            **metrics, **entropy_metrics(scores, self.stats), **weight_metrics(batch),
            **mismatch_metrics(batch, scores), **means, "rollout/staleness": staleness(groups, step),
            **self.utilization.of_batches(parts),
        }  # fmt: skip

    def _generation(self, step: int) -> Generation:
        """How to collect a step's groups, with the sampling that the present statistics ask for."""
        sampling, config = self._sampling(step), self.config

        def collect(clock: StepClock) -> Collected:
            collected = collect_groups(
                self.pool, self.rewards, self.prompts.next, sampling, clock,
                num_groups=config.batch.prompts_per_step, dynamic=config.dynamic_sampling,
            )  # fmt: skip
            self._prompts_after[step] = self.prompts.state()
            return collected

        return collect

    def _sampling(self, step: int) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            samples=self.config.batch.samples_per_prompt, temperature=rollout.temperature,
            max_response_tokens=rollout.max_response_tokens, stop_token_ids=rollout.stop_token_ids,
            seed=(self.config.seed << 50) + (step << 10), adaptive=steering(self.config.algorithm, self.stats),
        )  # fmt: skip

    def _evaluates(self, step: int) -> bool:
        every = self.config.eval.every
        return bool(self.eval_prompts and every) and (step % every == 0 or step == self.config.steps)

    def _write(self, step: int, clock: StepClock) -> None:
        with clock("checkpoint"):
            if (every := self.config.checkpoint.every) and step % every == 0:
                self._save(step)
            if (every := self.config.checkpoint.hf_every) and step % every == 0:
                self.trainer.export_hf(self.config.run_dir.absolute() / "hf_steps" / f"step_{step:08d}")

    def _save(self, step: int) -> None:
        # Prompts of rollouts made ahead are not used up: a resumed run generates them anew.
        prompts = self._prompts_after.get(step, self.prompts.state())
        self.checkpoints.save(RunState(step=step, prompts=prompts, stats=self.stats), self.trainer)
        self._saved_step = step

    def _resume(self) -> int:
        state = self.checkpoints.newest(self.trainer)
        if state is None:
            return 0
        self.prompts.restore(state.prompts)
        self.stats, self._saved_step = state.stats, state.step
        return state.step
