"""The rehearsal of a run, `megatron-hapo check`: runs every part once on a few prompts and reports what it finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_hapo.algorithm.controllers import step_controls
from megatron_hapo.algorithm.step_statistics import steering, step_statistics
from megatron_hapo.algorithm.training_batch import training_batch
from megatron_hapo.checkpoint.hub_hashes import hub_differences
from megatron_hapo.config import Config
from megatron_hapo.memory_turns import MemoryTurns
from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.observe.step_metrics import entropy_metrics, mismatch_metrics
from megatron_hapo.protocols import RewardPool, RolloutPool, Trainer
from megatron_hapo.rollout.collect import generate_scored, training_sampling
from megatron_hapo.types import Prompt, ScoredGroup, TokenScores, pack_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_LOGPROB_DIFFERENCE = {"float32": 2e-3, "bfloat16": 0.05, "fp8": 0.2}
"""Largest accepted mean of |engine - trainer| over the log-probs of sampled tokens, by the engines' precision; at
bfloat16 the kernels of the two sides round differently, at fp8 only the engine rounds to three bits."""
SHOWN_RESPONSES = 8

Verdict = Literal["ok", "warning", "fault", "response"]


@dataclass(frozen=True)
class Finding:
    """One result of the rehearsal."""

    verdict: Verdict
    message: str


def rehearse(
    config: Config,
    trainer: Trainer,
    pool: RolloutPool,
    turns: MemoryTurns,
    rewards: RewardPool,
    prompts: Sequence[Prompt],
    *,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Finding]:
    """The findings of a verified sync, rollouts with and without adaptive temperature, rewards and trainer log-probs.

    Raises:
        HapoError: a part failed, e.g. an engine's weights differ from the trainer's.
    """
    clock = StepClock()
    turns.to_engines(policy_version=0)  # the first sync is always verified
    findings = [Finding("ok", "every engine holds the trainer's weights, verified by checksums")]
    sampling = training_sampling(config, step=0, adaptive=None)
    groups = generate_scored(pool, rewards, prompts, sampling, clock)
    batch = pack_groups(groups)
    turns.to_trainer()
    scores = trainer.log_probs(batch)
    if config.algorithm.kl.enabled:
        scores = replace(scores, reference_log_probs=trainer.reference_log_probs(batch))
        findings.append(reference_finding(scores, config.trainer.dtype))
    stats = step_statistics(scores, config.algorithm)
    controls = step_controls({}, scores, config.algorithm)
    training_batch(batch, groups, scores, stats, config.algorithm, controls)  # the method's parts work on these scores
    findings += logprob_findings(mismatch_metrics(batch, scores), config.rollout.precision)
    if batch.routes is not None:
        share = trainer.route_agreement()
        findings.append(Finding("ok", f"engine and trainer would choose {share:.1%} of the experts alike; replayed"))
    entropy = entropy_metrics(scores, stats)
    findings.append(
        Finding("ok", f"entropy: mean {entropy['entropy/mean']:.3f} nats, pivot {entropy['entropy/pivot']:.3f}")
    )
    findings += group_findings(groups)
    findings += response_findings(groups, tokenizer)
    if steered := steering(config.algorithm, stats):
        turns.to_engines(policy_version=0)
        groups = generate_scored(pool, rewards, prompts, replace(sampling, adaptive=steered), clock)
        turns.to_trainer()
        batch = pack_groups(groups)
        low, high = batch.temperatures.min(), batch.temperatures.max()
        findings.append(Finding("ok", f"adaptive temperature: tokens were sampled at {low:.3f} to {high:.3f}"))
        steered_findings = logprob_findings(mismatch_metrics(batch, trainer.log_probs(batch)), config.rollout.precision)
        findings += [Finding(f.verdict, f"at the adaptive temperature, {f.message}") for f in steered_findings]
    return findings


def reference_finding(scores: TokenScores, dtype: str) -> Finding:
    """Whether the reference model is the policy, as it must be before the first update, up to the dtype's accuracy."""
    assert scores.reference_log_probs is not None
    mean = float(np.abs(scores.reference_log_probs - scores.log_probs).mean())
    text = f"log-probs of the reference model and of the policy, both untrained, differ by {mean:.2g} on average"
    if mean <= (limit := LARGEST_LOGPROB_DIFFERENCE[dtype]):
        return Finding("ok", text)
    return Finding("fault", f"{text}; at {dtype} it should be at most {limit:g}")


def response_findings(groups: Sequence[ScoredGroup], tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """SHOWN_RESPONSES responses with their rewards and parts, of as many prompts as possible."""
    scored = [list(zip(group.rollouts, group.scores, strict=True)) for group in groups]
    by_sample = [pair for sample in zip(*scored, strict=True) for pair in sample]
    for rollout, score in by_sample[:SHOWN_RESPONSES]:
        text = tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True)
        shown = text if len(text) <= 120 else f"...{text[-117:]}"
        parts = "".join(f", {name} {value:g}" for name, value in score.parts.items())
        failed = f", {score.failure}" if score.failure else ""
        truth = rollout.prompt.ground_truth
        truth = truth if len(truth) <= 40 else f"{truth[:37]}..."
        yield Finding("response", f"reward {score.reward:g}{parts}{failed}; truth {truth!r}: {shown!r}")


def hub_findings(folder: Path) -> Iterator[Finding]:
    """Whether the model folder's files still have the hashes that the Hub stated when they were downloaded, if any."""
    num_stated, different = hub_differences(folder)
    for path in different:
        if path.suffix == ".safetensors":
            yield Finding(
                "fault", f"{path}: is damaged: its SHA-256 is not the one that the Hub stated; download it again"
            )
        else:
            yield Finding("warning", f"{path}: is not the file that the Hub sent (damaged, or changed on purpose)")
    if num_stated and not different:
        yield Finding("ok", f"{folder}: {num_stated} files have the hashes that the Hub stated")


def logprob_findings(mismatch: Mapping[str, float], dtype: str) -> Iterator[Finding]:
    """Whether engine and trainer give sampled tokens the same log-probs, within the dtype's accuracy."""
    mean, limit = mismatch["rollout/logprob_abs_diff"], LARGEST_LOGPROB_DIFFERENCE[dtype]
    figures = (
        f"log-probs of engine and trainer differ by {mean:.2g} on average, by "
        f"{mismatch['rollout/logprob_abs_diff_max']:.2g} at most (mismatch KL {mismatch['rollout/mismatch_kl']:.2g})"
    )
    if mean <= limit:
        yield Finding("ok", figures)
    else:
        yield Finding(
            "fault",
            f"{figures}; at {dtype} the average should be at most {limit:g}. The importance ratios would be wrong from "
            "the first step: check for a model option that one side ignores, or set algorithm.importance_correction",
        )


def group_findings(groups: Sequence[ScoredGroup]) -> Iterator[Finding]:
    """Whether there is a gradient to learn from, whether rewards failed, and whether responses were truncated."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [score for group in groups for score in group.scores]
    accuracy, informative = np.mean([s.correct for s in scores]), sum(group.informative for group in groups)
    right = f"{accuracy:.0%} of {len(scores)} responses are correct"
    learned = f"{right}; {informative} of {len(groups)} groups have both better and worse ones"
    if informative:
        yield Finding("ok", learned)
    else:
        reason = "too easy" if accuracy > 0.5 else "too hard, or the scorer does not find the answers in the responses"
        yield Finding("warning", f"{learned}, so there is no gradient: the problems are {reason}")
    failures = [score.failure for score in scores if score.failure is not None]
    if failures:
        yield Finding("warning", f"{len(failures)} rewards failed, e.g. {failures[0]}; they count as wrong answers")
    truncated = np.mean([rollout.finish_reason == "length" for rollout in rollouts])
    longest = max(len(rollout.response_ids) for rollout in rollouts)
    lengths = f"responses have up to {longest} tokens; {truncated:.0%} were truncated at rollout.max_response_tokens"
    yield Finding("warning" if truncated > 0.3 else "ok", lengths)
