"""Micro-batches: every row once, balanced, equal in number; and the tensors of one."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from megatron_hapo.batching import pack, plan_microbatches
from megatron_hapo.types import TokenScores, TrainBatch, merge_scores


def make_batch() -> TrainBatch:
    return TrainBatch(
        token_ids=np.array([1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 24, 25], dtype=np.int32),
        sequence_lengths=np.array([4, 3, 5]),
        response_lengths=np.array([2, 1, 3]),
        temperatures=np.arange(6, dtype=np.float32),
        rollout_log_probs=-np.arange(6, dtype=np.float32),
        advantages=np.array([0.5, -1.0, 2.0], dtype=np.float32),
    )


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rows", [1, 5, 64])
def test_every_row_is_in_exactly_one_microbatch_within_the_budget(dp_size: int, num_rows: int) -> None:
    lengths = np.random.default_rng(num_rows).integers(1, 100, num_rows)
    plan = plan_microbatches(lengths, dp_size=dp_size, max_tokens=128)
    rows = [row for microbatches in plan for microbatch in microbatches for row in microbatch]
    assert sorted(rows) == list(range(num_rows))
    assert len({len(microbatches) for microbatches in plan}) == 1
    assert all(lengths[microbatch].sum() <= 128 for microbatches in plan for microbatch in microbatches)


def test_ranks_are_balanced() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 512).astype(int) + 1
    plan = plan_microbatches(lengths, dp_size=8, max_tokens=8192)
    loads = [sum(lengths[row] for microbatch in microbatches for row in microbatch) for microbatches in plan]
    assert max(loads) / np.mean(loads) < 1.02


def test_a_sequence_longer_than_the_budget_stands_alone() -> None:
    plan = plan_microbatches(np.array([10, 300, 20]), dp_size=1, max_tokens=64)
    assert [1] in plan[0]


def test_pack_selects_the_positions_that_predict_response_tokens() -> None:
    microbatch = pack(make_batch(), [2, 0], device=torch.device("cpu"))
    assert microbatch.input_ids.tolist() == [[21, 22, 23, 24, 25, 1, 2, 3, 4]]
    assert microbatch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert microbatch.predicting_positions.tolist() == [1, 2, 3, 6, 7]
    assert microbatch.targets.tolist() == [23, 24, 25, 3, 4]
    assert microbatch.temperatures.tolist() == [3, 4, 5, 0, 1]
    assert microbatch.advantages.tolist() == [2, 2, 2, 0.5, 0.5]


def test_padding_is_a_sequence_of_its_own_without_response() -> None:
    microbatch = pack(make_batch(), [0, 1], device=torch.device("cpu"), multiple=4)
    assert microbatch.sequence_lengths == [4, 3, 1]
    assert microbatch.input_ids.shape == (1, 8)
    assert len(microbatch.targets) == 3


def test_an_empty_microbatch_has_tokens_but_no_response() -> None:
    microbatch = pack(make_batch(), [], device=torch.device("cpu"), multiple=2)
    assert microbatch.sequence_lengths == [2]
    assert microbatch.targets.tolist() == []


def test_select_takes_rows_in_the_given_order() -> None:
    part = make_batch().select([2, 1])
    assert part.token_ids.tolist() == [21, 22, 23, 24, 25, 11, 12, 13]
    assert part.temperatures.tolist() == [3, 4, 5, 2]
    assert part.advantages.tolist() == [2, -1]
    assert len(make_batch().select([])) == 0


def test_merged_scores_are_in_batch_order() -> None:
    batch = make_batch()

    def scores(values: list[float]) -> TokenScores:
        array = np.array(values, dtype=np.float32)
        return TokenScores(log_probs=array, rollout_temperature_log_probs=array + 10, entropies=array + 20)

    merged = merge_scores([([2], scores([5, 6, 7])), None, ([1, 0], scores([3, 1, 2]))], batch)
    assert merged.log_probs.tolist() == [1, 2, 3, 5, 6, 7]
    assert merged.entropies.tolist() == [21, 22, 23, 25, 26, 27]
    with pytest.raises(AssertionError, match="missing or doubled"):
        merge_scores([([2], scores([5, 6, 7]))], batch)


def long_tailed_lengths(number: int, seed: int) -> np.ndarray:
    """Prompt and response together: log-normal responses (mean about 2,900, one in 40 cut off at 12,288)."""
    generator = np.random.default_rng(seed)
    responses = np.minimum(generator.lognormal(7.5, 1.0, number).astype(int) + 1, 12288)
    return responses + generator.integers(60, 1024, number)


@pytest.mark.parametrize("budget", [13312, 16384, 32768])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_large_step_is_balanced_full_and_planned_in_time(seed: int, budget: int) -> None:
    """8,192 responses on 64 ranks: imbalance at most 1.02, filler below 1 %, planned in less than a second."""
    lengths, ranks = long_tailed_lengths(8192, seed), 64
    started = time.process_time()
    plan = plan_microbatches(lengths, dp_size=ranks, max_tokens=budget)
    assert time.process_time() - started < 1
    tokens = np.array([[lengths[rows].sum() for rows in microbatches] for microbatches in plan])
    loads = tokens.sum(1)
    assert loads.max() / loads.mean() <= 1.02
    # An empty micro-batch costs a pass of its own; each rank's tokens are padded to a multiple of tp = 8.
    filler = (tokens == 0).mean() + (-tokens % 8).sum() / tokens.sum()
    assert filler < 0.01
    # No rank could do with fewer: the fullest one needs this many at least.
    assert tokens.shape[1] <= np.ceil(loads.max() / budget) + 1
    # Experts make the ranks wait for each other in every micro-batch: the n-th ones are alike in size.
    assert tokens.max(0).sum() / tokens.mean(0).sum() < 1.02
