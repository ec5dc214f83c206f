"""Findings of the rehearsal for values that a healthy run does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hapo.checks.rehearsal import group_findings, hub_findings, logprob_findings, reference_finding
from megatron_hapo.reward.pool import Score
from megatron_hapo.types import Prompt, Rollout, ScoredGroup, TokenScores


def mismatch(mean: float) -> dict[str, float]:
    return {
        "rollout/logprob_abs_diff": mean,
        "rollout/logprob_abs_diff_max": 10 * mean,
        "rollout/mismatch_kl": mean**2,
    }


def group(correct: list[bool], *, failure: Any = None, reason: Any = "stop") -> ScoredGroup:
    prompt = Prompt(uid="0", token_ids=np.zeros(3, np.int32), ground_truth="1", data_source="sums")
    zeros = np.zeros(7, np.float32)
    rollout = Rollout(
        prompt=prompt, response_ids=zeros.astype(np.int32), rollout_log_probs=zeros, temperatures=zeros + 1,
        finish_reason=reason, policy_versions=np.zeros(7, np.int32),
    )  # fmt: skip
    return ScoredGroup(
        [rollout] * len(correct), [Score(reward=float(c), correctness=float(c), failure=failure) for c in correct]
    )


@pytest.mark.parametrize(
    ("mean", "dtype", "verdict"),
    [
        (1e-5, "float32", "ok"),
        (0.01, "float32", "fault"),
        (0.01, "bfloat16", "ok"),
        (0.15, "bfloat16", "fault"),
        (0.15, "fp8", "ok"),
        (0.3, "fp8", "fault"),
    ],
)
def test_log_prob_differences_are_compared_with_the_precisions_limit(mean: float, dtype: str, verdict: str) -> None:
    (finding,) = logprob_findings(mismatch(mean), dtype)
    assert finding.verdict == verdict
    assert f"{mean:.2g} on average" in finding.message


@pytest.mark.parametrize(("difference", "verdict"), [(0.0, "ok"), (1e-3, "ok"), (0.01, "fault")])
def test_the_reference_model_must_be_the_policy(difference: float, verdict: str) -> None:
    zeros = np.zeros(7, np.float32)
    scores = TokenScores(
        log_probs=zeros, rollout_temperature_log_probs=zeros, entropies=zeros, reference_log_probs=zeros - difference
    )
    finding = reference_finding(scores, "float32")
    assert finding.verdict == verdict
    assert f"differ by {difference:.2g} on average" in finding.message


@pytest.mark.parametrize(("correct", "reason"), [([True, True], "too easy"), ([False, False], "too hard")])
def test_groups_with_equal_rewards_are_a_warning(correct: list[bool], reason: str) -> None:
    first, lengths = group_findings([group(correct)] * 3)
    assert (first.verdict, lengths.verdict) == ("warning", "ok")
    assert "0 of 3 groups have both better and worse" in first.message
    assert reason in first.message


def test_failed_rewards_and_truncated_responses_are_warnings() -> None:
    first, failed, lengths = group_findings([group([True, False], failure="timed out", reason="length")])
    assert [first.verdict, failed.verdict, lengths.verdict] == ["ok", "warning", "warning"]
    assert "2 rewards failed, e.g. timed out" in failed.message
    assert "100% were truncated at rollout.max_response_tokens" in lengths.message


def test_a_file_that_differs_from_the_hubs_hash_is_a_fault_if_it_holds_weights(tmp_path: Path) -> None:
    records = tmp_path / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    for name, length in (("model.safetensors", 64), ("config.json", 40)):
        (tmp_path / name).write_text("something else")
        (records / f"{name}.metadata").write_text(f"{'0' * 40}\n{'a' * length}\n1764000000.5\n")
    found = {finding.message.split(": ")[0]: finding.verdict for finding in hub_findings(tmp_path)}
    assert found == {str(tmp_path / "model.safetensors"): "fault", str(tmp_path / "config.json"): "warning"}
