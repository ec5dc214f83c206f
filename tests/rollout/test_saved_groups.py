"""Finished groups come back from a file as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_hapo.rollout.group_queue import FinishedGroup
from megatron_hapo.rollout.saved_groups import from_arrays, to_arrays
from megatron_hapo.types import Asked, Rollout, Score, ScoredGroup
from tests.rollout.grouped import numbered_prompts, queue_config, rollouts_of

CONFIG = queue_config(staleness=2)


def finished(number: int, rollouts: list[Rollout]) -> FinishedGroup:
    asked = Asked(requests=2, seconds=0.1 + number, failed=False)
    scores = [
        Score(reward=1 / 3, correctness=0.5, failure="timeout", answer='"4"\n', earned=2.0, parts={"style": 0.25}),
        Score(reward=-1.0, correctness=0.0, asked=asked),
    ]
    return FinishedGroup(
        number=number, place=(7 << 50, f"s/{number}"), version=3, statistics_step=4,
        scored=ScoredGroup(rollouts, scores),
    )  # fmt: skip


def assert_equal(found: Rollout, want: Rollout) -> None:
    assert found.finish_reason == want.finish_reason
    for name in ("response_ids", "rollout_log_probs", "temperatures", "policy_versions", "routes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(want, name))
        if getattr(want, name) is not None:
            assert getattr(found, name).dtype == getattr(want, name).dtype
    assert (found.kept is None) == (want.kept is None)
    if found.kept is not None and want.kept is not None:
        np.testing.assert_array_equal(found.kept.token_ids, want.kept.token_ids)
        np.testing.assert_array_equal(found.kept.lengths, want.kept.lengths)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("routed", [False, True])
def test_groups_come_back_from_a_file_as_they_were(tmp_path: Path, cut: bool, routed: bool) -> None:
    groups = []
    for number, (prompt, versions) in enumerate(zip(numbered_prompts(2), ([3], [3, 4, 4]), strict=True)):
        rollouts = rollouts_of(prompt, versions, cut=cut)
        if routed:
            shape = (len(versions), 2, 2)
            rollouts = [
                replace(one, routes=np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)) for one in rollouts
            ]
        groups.append(finished(number, [rollouts[0], replace(rollouts[1], finish_reason="length")]))
    np.savez(tmp_path / "groups.npz", allow_pickle=False, **to_arrays(groups, CONFIG))
    with np.load(tmp_path / "groups.npz", allow_pickle=False) as arrays:
        found = from_arrays(dict(arrays), CONFIG)
    assert found is not None
    assert list(found) == [group.place for group in groups]
    for got, want in zip(found.values(), groups, strict=True):
        assert replace(got, scored=want.scored) == want
        assert got.scored.scores == want.scored.scores
        for one, other in zip(got.scored.rollouts, want.scored.rollouts, strict=True):
            assert_equal(one, other)


def test_no_group_is_no_array() -> None:
    assert to_arrays([], CONFIG) == {}
    assert from_arrays({}, CONFIG) == {}


def test_groups_of_other_settings_are_refused() -> None:
    arrays = to_arrays([finished(0, rollouts_of(numbered_prompts(1)[0], [3]))], CONFIG)
    changed = CONFIG.rollout.model_copy(update={"temperature": 0.9})
    assert from_arrays(arrays, CONFIG.model_copy(update={"rollout": changed})) is None
    assert from_arrays(arrays, CONFIG.model_copy(update={"steps": 9})) is not None
