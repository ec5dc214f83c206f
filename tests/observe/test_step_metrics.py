"""The step's metrics against hand-worked numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_hapo.observe.step_metrics import mismatch_metrics, staleness, step_metrics, unreplayed_metrics
from megatron_hapo.types import (
    EntropyStats,
    KeptTokens,
    Prompt,
    Rollout,
    Score,
    ScoredGroup,
    TokenScores,
    TrainBatch,
    pack_groups,
    pack_rollouts,
)
from tests.observe.test_metrics import documented_metrics


def make_rollout(versions: list[int]) -> Rollout:
    zeros = np.zeros(len(versions), np.float32)
    return Rollout(
        prompt=Prompt(uid="0", token_ids=np.ones(1, np.int32), ground_truth="", data_source=""),
        response_ids=zeros.astype(np.int32), rollout_log_probs=zeros, temperatures=zeros + 1,
        policy_versions=np.array(versions, np.int32), finish_reason="stop",
    )  # fmt: skip


def test_staleness_is_a_mean_over_tokens():
    """Step 6 starts from version 5: two tokens are one version behind, of four."""
    partial, fresh = make_rollout([4, 4, 5]), make_rollout([5])
    found = staleness([ScoredGroup([partial, fresh], [])], 6)
    assert found == {"rollout/staleness": 0.5, "rollout/staleness_max": 1}
    assert (partial.policy_version, fresh.policy_version) == (4, 5)


def make_metrics(weights: np.ndarray | None, kept: KeptTokens | None = None) -> dict[str, float]:
    groups = [ScoredGroup([make_rollout([5, 5]), make_rollout([5])], [Score(1.0, 1.0), Score(-1.0, 0.0, "timeout")])]
    batch: TrainBatch = pack_groups(groups)
    values = np.array([0.25, 0.5, 0.75], np.float32)
    scores = TokenScores(log_probs=values, rollout_temperature_log_probs=values, entropies=values)
    return step_metrics(
        groups=groups, kept_share=0.5, batch=replace(batch, weights=weights, kept=kept), scores=scores,
        stats=EntropyStats(0.0, 1.0, -1.0, 1.0, 3), updates=[{"grad_norm": 1.0}, {"grad_norm": 3.0}], step=6,
    )  # fmt: skip


def test_the_metrics_of_a_step_are_documented_and_follow_from_its_data():
    metrics = make_metrics(np.array([0.0, 1.0, 2.0], np.float32))
    assert metrics.keys() <= documented_metrics()
    expected = {
        "reward/mean": 0, "reward/failures": 1, "rollout/kept_groups": 0.5, "rollout/informative_groups": 1,
        "rollout/staleness": 0, "rollout/staleness_max": 0, "num_response_tokens": 3,
        "response_length/mean": 1.5, "entropy/mean": 0.5, "entropy/pivot": 1, "weights/mean": 1,
        "weights/zero_fraction": 1 / 3, "rollout/logprob_abs_diff_max": 0.75,
        "grad_norm": 2,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_a_method_without_token_weights_has_no_metrics_of_them():
    assert not [name for name in make_metrics(None) if name.startswith("weights/")]


def test_a_cut_choice_has_metrics_of_the_tokens_that_it_left():
    kept = KeptTokens(np.arange(6, dtype=np.int32), np.array([1, 4, 1], dtype=np.int32))
    metrics = make_metrics(None, kept)
    assert metrics.keys() <= documented_metrics()
    assert (metrics["rollout/kept_tokens"], metrics["rollout/kept_tokens_max"]) == (2, 4)
    assert not [name for name in make_metrics(None) if name.startswith("rollout/kept_tokens")]


def test_metrics_without_replay_are_those_of_the_mismatch_under_their_own_names():
    batch = pack_groups([ScoredGroup([make_rollout([5, 5])], [Score(1.0, 1.0)])])
    values = np.array([0.25, -0.5], np.float32)
    scores = TokenScores(log_probs=values, rollout_temperature_log_probs=values, entropies=values)
    metrics = unreplayed_metrics(batch, scores)
    assert metrics.keys() <= documented_metrics()
    assert metrics["rollout/unreplayed_logprob_abs_diff"] == pytest.approx(0.375)
    assert metrics["rollout/unreplayed_mismatch_kl"] == mismatch_metrics(batch, scores)["rollout/mismatch_kl"]


def test_routes_of_rollouts_get_an_unknown_one_where_no_token_follows():
    """A prompt of one token and responses of two and one: routes of two and one positions."""
    rollouts = [replace(make_rollout([0] * count), routes=np.full((count, 1, 2), count, np.uint8)) for count in (2, 1)]
    routes = pack_rollouts(rollouts).routes
    assert routes is not None
    assert routes.dtype == np.uint8
    assert routes[:, 0].tolist() == [[2, 2], [2, 2], [255, 255], [1, 1], [255, 255]]
