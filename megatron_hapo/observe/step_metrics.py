"""The metrics of a training step, from what its stages made: pure. docs/metrics.md says what each means.

A metric of the step is added here and there. Beside them a row has what the trainer's updates report
(`TrainerRank.update`), evaluation (`rollout.evaluation`), seconds (`StepClock`) and utilization (`sizing.utilization`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_hapo.types import EntropyStats, Score, ScoredGroup, TokenScores, TrainBatch

MISMATCH_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p999": 0.999}


def step_metrics(
    *,
    groups: Sequence[ScoredGroup],
    kept_share: float,
    batch: TrainBatch,
    scores: TokenScores,
    stats: EntropyStats,
    updates: Sequence[Mapping[str, float]],
    step: int,
) -> dict[str, float]:
    """All metrics of a step that follow from its data.

    Args:
        groups: those that the step trains on.
        kept_share: of the generated groups, the share that was kept.
        batch: all responses of the groups, with token weights.
        scores: the trainer's, before the step's first update.
        updates: metrics of each mini-batch, which are averaged.
        step: counts from 1.
    """
    return {
        **group_metrics(groups),
        "rollout/kept_groups": kept_share,
        **staleness(groups, step),
        **entropy_metrics(scores, stats),
        **weight_metrics(batch),
        **cut_metrics(batch),
        **mismatch_metrics(batch, scores),
        **reference_metrics(scores),
        **update_metrics(updates),
        **{f"control/{name}": float(value) for name, value in batch.controls.items()},
    }


def update_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the mini-batches; sums for controllers (`measured/NAME`) are left out."""
    names = [name for name in updates[0] if not name.startswith("measured/")]
    return {name: float(np.mean([update[name] for update in updates])) for name in names}


def group_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Rewards, lengths and temperatures of the groups' responses."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [score for group in groups for score in group.scores]
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
    temperatures = np.concatenate([rollout.temperatures for rollout in rollouts])
    return {
        "reward/mean": float(np.mean([score.reward for score in scores])),
        "reward/accuracy": float(np.mean([score.correct for score in scores])),
        "reward/failures": sum(score.failure is not None for score in scores),
        **part_metrics(scores),
        **judge_metrics(scores),
        "rollout/informative_groups": float(np.mean([group.informative for group in groups])),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/truncated": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        "temperature/min": float(temperatures.min()),
        "temperature/mean": float(temperatures.mean()),
        "temperature/max": float(temperatures.max()),
        "num_response_tokens": float(lengths.sum()),
    }


def part_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """The mean of each named part of the rewards, over the responses that have it."""
    names = sorted({name for score in scores for name in score.parts})
    return {f"reward/{name}": float(np.mean([s.parts[name] for s in scores if name in s.parts])) for name in names}


def judge_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """What it took to have responses scored by judges; empty if none was."""
    asked = [score.asked for score in scores if score.asked is not None]
    if not asked:
        return {}
    return {
        "judge/judged": sum(not one.failed for one in asked),
        "judge/failed": sum(one.failed for one in asked),
        "judge/requests": sum(one.requests for one in asked),
        "judge/seconds": float(np.mean([one.seconds for one in asked])),
    }


def staleness(groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
    """Over tokens: the steps by which the weights that sampled a token lag behind those at this step's start."""
    lags = step - 1 - np.concatenate([rollout.policy_versions for group in groups for rollout in group.rollouts])
    return {"rollout/staleness": float(lags.mean()), "rollout/staleness_max": float(lags.max())}


def entropy_metrics(scores: TokenScores, stats: EntropyStats) -> dict[str, float]:
    """Entropies in nats, at the base temperature."""
    return {
        "entropy/mean": float(scores.entropies.mean()),
        "entropy/pivot": float(np.exp(stats.pivot)),
        "entropy/min": float(scores.entropies.min()),
        "entropy/max": float(scores.entropies.max()),
    }


def weight_metrics(batch: TrainBatch) -> dict[str, float]:
    """The step's token weights, if the method has any."""
    if batch.weights is None:
        return {}
    return {
        "weights/mean": float(batch.weights.mean()),
        "weights/max": float(batch.weights.max()),
        "weights/zero_fraction": float((batch.weights == 0).mean()),
    }


def cut_metrics(batch: TrainBatch) -> dict[str, float]:
    """Among how many tokens the sampler chose, if top-p or top-k cut its choice."""
    if batch.kept is None:
        return {}
    return {
        "rollout/kept_tokens": float(batch.kept.lengths.mean()),
        "rollout/kept_tokens_max": float(batch.kept.lengths.max()),
    }


def mismatch_metrics(batch: TrainBatch, scores: TokenScores) -> dict[str, float]:
    """How far the engine's log-probs are from the trainer's at the same temperature."""
    difference = scores.rollout_temperature_log_probs - batch.rollout_log_probs
    # k3 estimate of KL(engine || trainer) from the engine's samples, never negative: E[r - 1 - log r]
    kl = np.expm1(difference) - difference
    return {
        "rollout/logprob_abs_diff": float(np.abs(difference).mean()),
        "rollout/logprob_abs_diff_max": float(np.abs(difference).max()),
        "rollout/mismatch_kl": float(kl.mean()),
        **{f"rollout/mismatch_kl_{name}": float(np.quantile(kl, q)) for name, q in MISMATCH_QUANTILES.items()},
    }


def reference_metrics(scores: TokenScores) -> dict[str, float]:
    """How far the policy is from the reference model, if there is one."""
    if scores.reference_log_probs is None:
        return {}
    difference = scores.log_probs.astype(np.float64) - scores.reference_log_probs
    return {
        "kl/mean": float(np.mean(np.expm1(-difference) + difference)),
        "kl/log_ratio": float(np.mean(difference)),
    }


def unreplayed_metrics(batch: TrainBatch, scores: TokenScores) -> dict[str, float]:
    """Of `mismatch_metrics` what shows the effect of replaying the engine's experts, from scores without replay."""
    mismatch = mismatch_metrics(batch, scores)
    return {
        f"rollout/unreplayed_{name}": mismatch[f"rollout/{name}"]
        for name in ("logprob_abs_diff", "logprob_abs_diff_max", "mismatch_kl", "mismatch_kl_p99")
    }
