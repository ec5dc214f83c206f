"""Each method's own formulas against hand-worked numbers and slow references, and their composition in the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hapo.algorithm.methods.archer import kl_to_old_policy, reasoning_mask
from megatron_hapo.algorithm.methods.edge_grpo import entropy_driven_advantage
from megatron_hapo.algorithm.methods.forking_tokens import forking_weights
from megatron_hapo.algorithm.methods.gspo import sequence_log_ratio
from megatron_hapo.algorithm.methods.importance import importance_weights
from megatron_hapo.algorithm.microbatches import MicroBatch
from megatron_hapo.algorithm.minibatches import aggregation_weights, minibatches
from megatron_hapo.algorithm.objective import policy_loss
from megatron_hapo.algorithm.step_statistics import step_statistics
from megatron_hapo.algorithm.training_batch import advantages, with_token_data
from megatron_hapo.config import AlgorithmConfig, BatchConfig, load_config
from megatron_hapo.entropy import entropy_modulation, entropy_stats
from megatron_hapo.observe.step_metrics import mismatch_metrics, weight_metrics
from megatron_hapo.types import EntropyStats, Prompt, Rollout, Score, ScoredGroup, TokenScores, TrainBatch
from tests.test_loss import hapo_loss

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LENGTHS = torch.tensor([3, 1, 0, 4])
EMPTY = np.zeros(0, np.int32)
ROLLOUT = Rollout(
    prompt=Prompt(uid="0", token_ids=EMPTY, ground_truth="", data_source=""), response_ids=EMPTY,
    rollout_log_probs=EMPTY, temperatures=EMPTY, policy_versions=EMPTY, finish_reason="stop",
)  # fmt: skip


def algorithm(**settings: object) -> AlgorithmConfig:
    """GRPO's objective with these settings."""
    off = {"enabled": False}
    plain = {"adaptive_temperature": off, "adaptive_clip": off, "redistribution": off, "advantage": "group_mean"}
    return AlgorithmConfig.model_validate(plain | settings)


def scored_batch(*, groups: int = 2, size: int = 3, seed: int = 0) -> tuple[TrainBatch, TokenScores]:
    generator = np.random.default_rng(seed)
    responses = generator.integers(1, 9, groups * size)
    tokens = int(responses.sum())
    batch = TrainBatch(
        token_ids=np.zeros(tokens + 2 * len(responses), np.int32),
        sequence_lengths=responses + 2,
        response_lengths=responses,
        temperatures=np.ones(tokens, np.float32),
        rollout_log_probs=generator.normal(-1, 0.5, tokens).astype(np.float32),
        advantages=generator.normal(size=len(responses)).astype(np.float32),
    )
    noise = generator.normal(0, 0.3, tokens).astype(np.float32)
    entropies = generator.gamma(1.0, 0.5, tokens).astype(np.float32)
    log_probs = batch.rollout_log_probs + noise
    return batch, TokenScores(log_probs=log_probs, rollout_temperature_log_probs=log_probs, entropies=entropies)


def with_scores(
    batch: TrainBatch, scores: TokenScores, settings: AlgorithmConfig, controls: Mapping[str, float] | None = None
) -> tuple[TrainBatch, EntropyStats]:
    """The batch as `training_batch` completes it, with its advantages kept."""
    stats = step_statistics(scores, settings)
    scored = replace(batch, old_log_probs=scores.log_probs, stats=stats, controls=controls or {})
    return with_token_data(scored, scores, settings), stats


def as_microbatch(batch: TrainBatch) -> MicroBatch:
    """All responses of the batch, with only the fields that the objective reads."""
    lengths = torch.from_numpy(batch.response_lengths)
    empty = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        rows=list(range(len(batch))),
        sequence_lengths=batch.sequence_lengths.tolist(),
        num_response_tokens=batch.num_response_tokens,
        input_ids=empty, position_ids=empty, predicting_positions=empty, response_index=empty, targets=empty,
        response_rows=torch.arange(len(batch)).repeat_interleave(lengths),
        per_token={name: torch.from_numpy(array) for name, array in batch.per_token().items()},
    )  # fmt: skip


# ----- aggregations


@pytest.mark.parametrize(
    ("aggregation", "mean"),
    [
        ("token_mean", lambda x: x.sum() / 8),
        ("sequence_mean_token_mean", lambda x: (x[:3].mean() + x[3:4].mean() + x[4:].mean()) / 3),
        ("sequence_mean_token_sum_norm", lambda x: (x[:3].sum() + x[3:4].sum() + x[4:].sum()) / 3 / 10),
    ],
)
def test_aggregation_weights_give_the_aggregation_they_name(aggregation, mean):
    losses = torch.arange(1.0, 9.0)
    weights = aggregation_weights(LENGTHS, algorithm(aggregation=aggregation), max_tokens=10)
    if weights is None:
        weights = torch.ones(8)
    assert weights.dtype == torch.float32
    torch.testing.assert_close((weights * losses).sum() / 8, mean(losses))


def test_the_aggregation_counts_within_each_minibatch():
    batch, scores = scored_batch(groups=4)
    settings = algorithm(aggregation="sequence_mean_token_mean")
    scored, _ = with_scores(batch, scores, settings)
    sizes = BatchConfig(prompts_per_step=4, samples_per_prompt=3, prompts_per_minibatch=2)
    for part in minibatches(scored, settings, sizes, max_tokens=10, seed=0, step=1):
        per_response = np.add.reduceat(part.weights, np.cumsum(part.response_lengths) - part.response_lengths)
        np.testing.assert_allclose(per_response / part.num_response_tokens, 1 / 6, rtol=1e-6)


# ----- token filters


def test_forking_tokens_are_the_top_share_with_ties():
    entropies = torch.tensor([0.1, 5.0, 0.3, 0.2, 4.0, 0.0, 0.3, 0.1, 0.2, 0.1])
    assert forking_weights(entropies, share=0.2).nonzero()[:, 0].tolist() == [1, 4]
    assert forking_weights(entropies, share=0.3).nonzero()[:, 0].tolist() == [1, 2, 4, 6]
    assert (forking_weights(entropies, share=1.0) == 1).all()
    assert forking_weights(torch.tensor([0.5]), share=0.01).tolist() == [1]
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got 0"):
        forking_weights(entropies, share=0)


def test_forking_tokens_alone_move_the_policy_and_divide():
    batch, scores = scored_batch()
    settings = algorithm(forking_tokens={"enabled": True, "share": 0.25})
    scored, _ = with_scores(batch, scores, settings)
    log_probs = torch.from_numpy(scores.log_probs).requires_grad_()
    policy_loss(log_probs, torch.zeros(0), as_microbatch(scored), settings, num_tokens=batch.num_response_tokens)[
        0
    ].backward()
    kept = torch.zeros(len(scores.entropies), dtype=torch.bool)
    kept[torch.from_numpy(scores.entropies).topk(math.ceil(0.25 * len(kept))).indices] = True
    assert (log_probs.grad[~kept] == 0).all()
    advantages = torch.from_numpy(np.repeat(batch.advantages, batch.response_lengths))
    torch.testing.assert_close(log_probs.grad[kept], -advantages[kept] / kept.sum())
    assert weight_metrics(scored)["weights/mean"] == pytest.approx(1)
    assert weight_metrics(scored)["weights/zero_fraction"] == pytest.approx(float((~kept).float().mean()))


# ----- Archer


def test_reasoning_tokens_exceed_their_own_responses_quantile():
    entropies = torch.tensor([1.0, 2.0, 3.0, 0.5, 10.0, 11.0, 12.0, 13.0])
    # k = round(0.8 (n - 1)): the 3rd of 3, the only one, the 3rd of 4.
    assert reasoning_mask(entropies, LENGTHS, quantile=0.8).nonzero()[:, 0].tolist() == [7]
    assert reasoning_mask(entropies, LENGTHS, quantile=0.4).nonzero()[:, 0].tolist() == [2, 6, 7]


def test_archer_clips_by_token_kind_and_holds_knowledge_tokens():
    batch, scores = scored_batch()
    settings = algorithm(dual_constraint={"enabled": True, "quantile": 0.5, "clip_high": 0.5, "kl": 0.1})
    scored, _ = with_scores(batch, scores, settings)
    old = torch.from_numpy(scores.log_probs)
    log_probs = (old + torch.linspace(-0.9, 0.9, len(old))).requires_grad_()
    num_tokens, kind = len(old), torch.from_numpy(scored.token_data["reasoning"])
    assert 0 < kind.sum() < num_tokens
    loss, _ = policy_loss(log_probs, torch.zeros(0), as_microbatch(scored), settings, num_tokens=num_tokens)
    expected = torch.zeros(())
    advantages = np.repeat(batch.advantages, batch.response_lengths)
    for i in range(num_tokens):
        eps = 0.5 if kind[i] else 0.2
        ratio, advantage = (log_probs[i] - old[i]).exp(), float(advantages[i])
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)
        divergence = 0 if kind[i] else 1 / ratio - 1 + ratio.log()
        expected = expected - (surrogate - 0.1 * divergence) / num_tokens
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, log_probs, retain_graph=True)
    (want,) = torch.autograd.grad(expected, log_probs)
    torch.testing.assert_close(got, want)


def test_the_kl_is_zero_at_the_old_policy_and_finite_far_from_it():
    far = torch.tensor([-1.0, -200.0, -1.0], requires_grad=True)
    kl = kl_to_old_policy(far, torch.tensor([-1.0, -1.0, -200.0]))
    kl.sum().backward()
    assert kl[0] == 0
    assert (kl >= 0).all()
    assert far.grad.isfinite().all()


# ----- EDGE-GRPO


def test_certain_responses_count_more_within_their_group():
    entropies = torch.tensor([1.0, 1.0, 3.0, 0.0, 0.0])
    lengths, groups = torch.tensor([2, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    advantages = entropy_driven_advantage(torch.tensor([1.0, -1.0, 0.5, -0.5]), entropies, lengths, groups)
    # group 0: mean entropies 1 and 3, their mean 2; group 1 has no entropy at all and stays unchanged.
    torch.testing.assert_close(advantages, torch.tensor([2.0, -2 / 3, 0.5, -0.5]))


def test_the_entropy_share_is_bounded():
    entropies = torch.tensor([0.0, 4.0])
    ones = torch.ones(2, dtype=torch.int64)
    advantages = entropy_driven_advantage(torch.tensor([1.0, 1.0]), entropies, ones, ones)
    torch.testing.assert_close(advantages, torch.tensor([10.0, 0.5]))


# ----- GSPO


def test_gspo_is_the_clipped_sequence_objective_value_and_gradient():
    batch, scores = scored_batch()
    settings = algorithm(ratio="sequence", aggregation="sequence_mean_token_mean", clip_low=0.01, clip_high=0.02)
    scored, _ = with_scores(batch, scores, settings)
    sizes = BatchConfig(prompts_per_step=2, samples_per_prompt=3, prompts_per_minibatch=2)
    (part,) = minibatches(scored, settings, sizes, max_tokens=10, seed=0, step=1)
    old = torch.from_numpy(part.old_log_probs)
    generator = torch.Generator().manual_seed(0)
    log_probs = (old + 0.05 * torch.randn(len(old), generator=generator)).requires_grad_()
    loss, _ = policy_loss(log_probs, torch.zeros(0), as_microbatch(part), settings, num_tokens=len(old))
    lengths = part.response_lengths.tolist()
    expected = torch.zeros(())
    for new, before, advantage in zip(log_probs.split(lengths), old.split(lengths), part.advantages, strict=True):
        s = (new - before).mean().exp()
        clipped = s.clamp(1 - 0.01, 1 + 0.02)
        expected = expected - torch.minimum(s * float(advantage), clipped * float(advantage)) / len(lengths)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, log_probs, retain_graph=True)
    (want,) = torch.autograd.grad(expected, log_probs)
    torch.testing.assert_close(got, want)
    assert (got == 0).any(), "no response was clipped"
    assert (got != 0).any()


def test_the_sequence_ratio_of_a_microbatch_without_tokens_is_empty():
    empty = torch.zeros(0)
    assert not len(sequence_log_ratio(empty, empty, torch.zeros(0, dtype=torch.int64), num_rows=0))


# ----- entropy source


def test_current_entropies_are_measured_against_the_steps_statistics():
    batch, scores = scored_batch()
    settings = AlgorithmConfig.model_validate({"entropy": {"source": "current"}})
    scored, stats = with_scores(batch, scores, settings)
    microbatch, old = as_microbatch(scored), torch.from_numpy(scores.log_probs)
    entropies = (torch.from_numpy(scores.entropies) * 3).requires_grad_()
    log_probs = (old + 0.15).requires_grad_()
    options = {"clip_low": 0.2, "clip_high": 0.2, "num_tokens": len(old)}
    loss, _ = policy_loss(log_probs, entropies, microbatch, settings, num_tokens=len(old), stats=stats)
    loss.backward()
    assert entropies.grad is None
    want, _ = hapo_loss(log_probs, old, microbatch["advantages"], entropy_modulation(entropies, stats), **options)
    torch.testing.assert_close(loss, want)
    same, _ = policy_loss(old, torch.from_numpy(scores.entropies), microbatch, settings, num_tokens=1, stats=stats)
    by_old, _ = policy_loss(old, entropies, microbatch, AlgorithmConfig(), num_tokens=1)
    torch.testing.assert_close(same, by_old)


def test_micro_batch_statistics_are_those_of_the_micro_batch():
    batch, scores = scored_batch()
    settings = AlgorithmConfig.model_validate({"entropy": {"source": "micro_batch", "sign": "reference"}})
    scored, _ = with_scores(batch, scores, settings)
    microbatch, old = as_microbatch(scored), torch.from_numpy(scores.log_probs)
    entropies = torch.from_numpy(scores.entropies).flip(0)
    log_probs = old + 0.15
    loss, _ = policy_loss(log_probs, entropies, microbatch, settings, num_tokens=len(old))
    h = entropy_modulation(entropies, entropy_stats(entropies), sign="reference")
    want, _ = hapo_loss(log_probs, old, microbatch["advantages"], h, clip_low=0.2, clip_high=0.2, num_tokens=len(old))
    torch.testing.assert_close(loss, want)


def test_the_robust_scale_ignores_single_tokens():
    entropies = torch.linspace(0.1, 1.0, 1001)
    outlier = torch.cat([entropies[:-1], torch.tensor([50.0])])
    plain, robust = entropy_stats(outlier), entropy_stats(outlier, scale_quantile=0.01)
    assert plain.log_max == pytest.approx(np.log(50.0))
    assert robust.log_max == pytest.approx(float(entropies[990].log()))
    assert robust.log_min == pytest.approx(float(entropies[10].log()))
    assert robust.pivot == plain.pivot
    h = entropy_modulation(outlier, robust)
    assert h[-1] == 1
    assert (h.abs() <= 1).all()
    crossed = entropy_stats(entropies, pivot=0.99, scale_quantile=0.4)
    assert crossed.log_max == crossed.pivot
    with pytest.raises(ValueError, match=r"scale_quantile must lie in \[0, 0.5\), got 0.5"):
        entropy_stats(entropies, scale_quantile=0.5)


# ----- importance correction and mismatch


def test_importance_weights_by_token_and_by_response():
    old = torch.log(torch.tensor([1.0, 3.0, 0.2, 0.6, 1.0, 1.0, 1.0, 1.5]))
    zeros = torch.zeros(8)

    def weights(level: str, mode: str) -> list[float]:
        got = importance_weights(old, zeros, LENGTHS, level=level, mode=mode, max_weight=2.0)
        return got.tolist()

    assert weights("token", "clip") == pytest.approx([1, 2, 0.2, 0.6, 1, 1, 1, 1.5])
    assert weights("token", "mask") == pytest.approx([1, 0, 0, 0.6, 1, 1, 1, 1.5])
    assert weights("sequence", "clip") == pytest.approx([0.6, 0.6, 0.6, 0.6, 1.5, 1.5, 1.5, 1.5])
    old[1] = 5.0
    assert weights("sequence", "mask")[:3] == [0, 0, 0]
    with pytest.raises(ValueError, match="max_weight must be at least 1, got"):
        importance_weights(old, zeros, LENGTHS, level="token", mode="clip", max_weight=0.5)


def test_the_importance_correction_weighs_the_gradient():
    batch, scores = scored_batch()
    settings = algorithm(importance_correction={"level": "token", "max_weight": 1.2})
    scored, _ = with_scores(batch, scores, settings)
    log_probs = torch.from_numpy(scores.log_probs).requires_grad_()
    num_tokens = batch.num_response_tokens
    policy_loss(log_probs, torch.zeros(0), as_microbatch(scored), settings, num_tokens=num_tokens)[0].backward()
    weights = np.minimum(np.exp(scores.log_probs - batch.rollout_log_probs), 1.2)
    advantages = np.repeat(batch.advantages, batch.response_lengths)
    np.testing.assert_allclose(log_probs.grad, -advantages * weights / num_tokens, rtol=1e-5)
    assert with_scores(batch, scores, algorithm())[0].weights is None


def test_the_token_correction_is_the_decoupled_objective():
    """Behaviour, proximal and current policy differ; four tokens of one response, clip range 0.2, worked out by hand.

    token  behaviour  proximal  current   w    u    A    w min(u A, clip(u) A)          gradient flows
    1      0.5        0.4       0.44      0.8  1.1  +1   0.8 * 1.1           =  0.88    yes
    2      0.2        0.3       0.39      1.5  1.3  +1   1.5 * 1.2           =  1.80    no: clipped
    3      0.4        0.2       0.14      0.5  0.7  -1   0.5 * max(.7, .8) * -1 = -0.40 no: clipped
    4      0.1        0.4       0.52      4.0  1.3  -1   4.0 * 1.3 * -1      = -5.20    yes

    With one ratio to the behaviour policy, token 2 (1.95) would be clipped at 1.2, and token 3 (0.35) at 0.8.
    """
    behaviour, proximal, current = ([0.5, 0.2, 0.4, 0.1], [0.4, 0.3, 0.2, 0.4], [0.44, 0.39, 0.14, 0.52])
    settings = algorithm(importance_correction={"level": "token", "max_weight": 1e6})
    parts = []
    for advantage, tokens in ((1.0, slice(0, 2)), (-1.0, slice(2, 4))):
        batch = TrainBatch(
            token_ids=np.zeros(3, np.int32), sequence_lengths=np.array([3]), response_lengths=np.array([2]),
            temperatures=np.ones(2, np.float32), rollout_log_probs=np.log(behaviour[tokens], dtype=np.float32),
            advantages=np.array([advantage], np.float32),
        )  # fmt: skip
        old = np.log(proximal[tokens], dtype=np.float32)
        scores = TokenScores(log_probs=old, rollout_temperature_log_probs=old, entropies=np.ones(2, np.float32))
        scored, _ = with_scores(batch, scores, settings)
        log_probs = torch.tensor(current[tokens]).log().requires_grad_()
        loss, _ = policy_loss(log_probs, torch.ones(2), as_microbatch(scored), settings, num_tokens=4)
        loss.backward()
        parts.append((loss.item(), log_probs.grad))
    assert [loss for loss, _ in parts] == pytest.approx([-(0.88 + 1.8) / 4, (0.4 + 5.2) / 4], rel=1e-5)
    expected = [-0.88 / 4, 0, 0, 5.2 / 4]
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), torch.tensor(expected))


def test_the_mismatch_is_measured_at_one_temperature_with_its_quantiles():
    batch, scores = scored_batch()
    difference = scores.rollout_temperature_log_probs - batch.rollout_log_probs
    kl = np.exp(difference) - 1 - difference
    metrics = mismatch_metrics(batch, scores)
    assert metrics["rollout/mismatch_kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert metrics["rollout/mismatch_kl_p95"] == pytest.approx(np.quantile(kl, 0.95), rel=1e-4)
    assert (
        metrics["rollout/mismatch_kl_p50"] <= metrics["rollout/mismatch_kl_p99"] <= metrics["rollout/mismatch_kl_p999"]
    )


# ----- shipped configs

EXPECTED = {
    "grpo": {"advantage": "group_mean", "aggregation": "sequence_mean_token_mean", "ratio": "token"},
    "grpo_kl": {"advantage": "group_mean", "aggregation": "sequence_mean_token_mean", "ratio": "token"},
    "dapo": {"advantage": "group_mean", "aggregation": "token_mean"},
    "forking_tokens": {"aggregation": "token_mean"},
    "archer": {"aggregation": "token_mean"},
    "edge_grpo": {"advantage": "entropy_driven"},
    "dr_grpo": {"norm_by_std": False, "aggregation": "sequence_mean_token_sum_norm"},
    "entropy_bonus": {"aggregation": "token_mean"},
    "adaptive_entropy": {"aggregation": "token_mean"},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "aggregation": "token_mean"},
    "sapo": {"surrogate": "sapo", "aggregation": "sequence_mean_token_mean"},
    "ce_gppo": {"surrogate": "ce_gppo"},
    "clip_cov": {"surrogate": "clipped"},
    "kl_cov": {"surrogate": "unclipped"},
    "qae": {"advantage": "group_quantile", "advantage_quantile": 0.4},
    "entropic": {"aggregation": "token_mean"},
    "repo": {"aggregation": "token_mean"},
    "repo_subtracted": {"aggregation": "token_mean"},
    "adapo": {"aggregation": "token_mean"},
    "bapo": {"surrogate": "clipped"},
    "multi_temperature": {"aggregation": "token_mean"},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "hapo": {"advantage": "token_level_group_average"},
    "hapo_none": {"advantage": "group_mean"},
    "hapo_only_temperature": {"advantage": "group_mean"},
    "hapo_only_group_average": {"advantage": "token_level_group_average"},
    "hapo_only_redistribution": {"advantage": "group_mean"},
    "hapo_only_clip": {"advantage": "group_mean"},
    "hapo_temperature_average": {"advantage": "token_level_group_average"},
    "hapo_temperature_average_redistribution": {"advantage": "token_level_group_average"},
}
NO_CLIP_RANGE = (0.2, 0.2)
"""The defaults, of a method that does not use them."""
OWN_CLIP_RANGE = {
    "gspo": (3e-4, 4e-4), "cispo": (1.0, 0.28), "bapo": NO_CLIP_RANGE, "kl_cov": NO_CLIP_RANGE, "sapo": NO_CLIP_RANGE
}  # fmt: skip
"""Methods to which all or part of the job's clip range means nothing."""
SWITCHES = {
    "hapo": {"adaptive_temperature", "adaptive_clip", "redistribution"},
    "hapo_only_temperature": {"adaptive_temperature"},
    "hapo_only_redistribution": {"redistribution"},
    "hapo_only_clip": {"adaptive_clip"},
    "grpo_kl": {"kl"},
    "hapo_temperature_average": {"adaptive_temperature"},
    "hapo_temperature_average_redistribution": {"adaptive_temperature", "redistribution"},
    "forking_tokens": {"forking_tokens"},
    "archer": {"dual_constraint"},
    "entropy_bonus": {"entropy_bonus"},
    "adaptive_entropy": {"entropy_bonus"},
    **{name: {name} for name in ("clip_cov", "kl_cov", "entropic", "repo", "bapo", "adapo", "multi_temperature")},
    "repo_subtracted": {"repo"},
}


@pytest.mark.parametrize("path", sorted((CONFIGS / "methods").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_methods_overlay_loads_on_a_job_and_leaves_it_what_is_the_jobs(tmp_path, path):
    """Otherwise a comparison on one job would compare more than the methods."""
    job, ground = tmp_path / "job.yaml", tmp_path / "ground.yaml"
    ground.write_text(f"base: [{CONFIGS}/demo_cpu.yaml, {CONFIGS}/presets/paper.yaml]\nalgorithm: {{dual_clip: 7}}")
    job.write_text(f"base: [{ground}, {path}]\nname: {path.stem}\n")
    config, of_job = load_config(job), load_config(ground)
    settings = config.algorithm
    assert (settings.clip_low, settings.clip_high) == OWN_CLIP_RANGE.get(path.stem, (0.2, 0.28))
    assert settings.dual_clip == (10 if path.stem in ("cispo", "kl_cov", "sapo") else 7)  # unless it has no effect
    for name in SWITCHES.get(path.stem, set()) & SWITCHES["hapo"]:  # a part that is off keeps no values
        assert getattr(settings, name) == getattr(of_job.algorithm, name)
    assert config.model_dump(exclude={"name", "algorithm"}) == of_job.model_dump(exclude={"name", "algorithm"})
    assert {key: getattr(settings, key) for key in EXPECTED[path.stem]} == EXPECTED[path.stem]
    switches = {name for name in AlgorithmConfig.model_fields if hasattr(getattr(settings, name), "enabled")}
    assert switches >= set().union(*SWITCHES.values())
    assert {name for name in switches if getattr(settings, name).enabled} == SWITCHES.get(path.stem, set())


def test_entropy_driven_advantages_come_with_the_scores():
    batch, scores = scored_batch()
    groups = [
        ScoredGroup([ROLLOUT] * 3, [Score(reward=r, correctness=0.0) for r in (1.0, -1.0, i)]) for i in (0.0, 2.0)
    ]
    plain = advantages(batch, groups, scores, algorithm(advantage="group_mean"))
    driven = advantages(batch, groups, scores, algorithm(advantage="entropy_driven"))
    lengths = torch.from_numpy(batch.response_lengths)
    want = entropy_driven_advantage(
        torch.from_numpy(plain),
        torch.from_numpy(scores.entropies),
        lengths,
        torch.tensor([0, 0, 0, 1, 1, 1]),
    )
    assert plain.dtype == driven.dtype == np.float32
    np.testing.assert_array_equal(driven, want)
    assert not np.array_equal(driven, plain)
