"""The plan of micro-batches (every row once, balanced, equally many per rank) and the tensors of one of them."""

from __future__ import annotations

import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from megatron_hapo.algorithm.microbatch_plan import SharedPrompts, computed_tokens, plan_microbatches, shared_prompts
from megatron_hapo.algorithm.microbatches import pack, zigzag
from megatron_hapo.types import KeptTokens, TokenScores, TrainBatch, merge_scores, unknown_route


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


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("multiple", [2, 4])
def test_microbatches_come_in_groups_for_an_interleaved_pipeline(dp_size: int, multiple: int) -> None:
    lengths = np.random.default_rng(3).integers(1, 100, 23)
    free = plan_microbatches(lengths, dp_size=dp_size, max_tokens=128)
    plan = plan_microbatches(lengths, dp_size=dp_size, max_tokens=128, multiple=multiple)
    assert len(plan[0]) == -(-len(free[0]) // multiple) * multiple
    assert {len(microbatches) for microbatches in plan} == {len(plan[0])}
    rows = [row for microbatches in plan for microbatch in microbatches for row in microbatch]
    assert sorted(rows) == list(range(23))
    assert all(microbatch for microbatches in plan for microbatch in microbatches), "filler, where rows could be split"


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
    assert microbatch["temperatures"].tolist() == [3, 4, 5, 0, 1]
    assert microbatch["advantages"].tolist() == [2, 2, 2, 0.5, 0.5]


def test_every_array_along_the_response_tokens_reaches_the_micro_batch() -> None:
    """A field or data that a method adds is listed nowhere else."""
    batch = replace(
        make_batch(),
        old_log_probs=np.arange(6, dtype=np.float32) + 10,
        token_data={"kind": np.array([True, False, False, True, True, False]), "h": np.arange(6) / 8},
    )
    microbatch = pack(batch, [2, 0], device=torch.device("cpu"))
    along = {field.name for field in fields(TrainBatch) if field.metadata.get("axis") == "response_tokens"}
    assert along == {"temperatures", "rollout_log_probs", "old_log_probs", "weights", "token_data", "kept"}
    names = {"temperatures", "rollout_log_probs", "old_log_probs", "advantages", "kind", "h"}
    assert microbatch.per_token.keys() == names
    assert microbatch["old_log_probs"].tolist() == [13, 14, 15, 10, 11]
    assert microbatch["kind"].tolist() == [True, True, False, True, False]
    assert microbatch["kind"].dtype == torch.bool
    assert microbatch["h"].dtype == torch.float32


@pytest.mark.parametrize("cp_rank", [0, 1])
def test_kept_tokens_follow_their_response_tokens(cp_rank: int) -> None:
    """Response token i of the batch keeps i % 3 + 1 tokens, all of them the token itself."""
    targets = np.array([3, 4, 13, 23, 24, 25], dtype=np.int32)
    lengths = np.arange(6, dtype=np.int32) % 3 + 1
    batch = replace(make_batch(), kept=KeptTokens(np.repeat(targets, lengths), lengths))
    microbatch = pack(batch, [2, 0], device=torch.device("cpu"), cp_size=2, cp_rank=cp_rank)
    assert microbatch.kept is not None
    assert "kept" not in microbatch.per_token
    of_token = dict(zip(targets.tolist(), lengths.tolist(), strict=True))
    assert microbatch.kept.lengths.tolist() == [of_token[token] for token in microbatch.targets.tolist()]
    repeated = np.repeat(microbatch.targets.numpy(), microbatch.kept.lengths)
    np.testing.assert_array_equal(microbatch.kept.token_ids, repeated)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize(("cp_size", "cp_rank"), [(1, 0), (2, 0), (2, 1)])
def test_routes_follow_their_tokens_and_are_unknown_elsewhere(dtype: type, cp_size: int, cp_rank: int) -> None:
    """Token id i has the experts (i, i + 1) in one layer and (i + 2, i + 3) in the other; the last are unknown."""
    batch = make_batch()
    routes = (batch.token_ids[:, None, None] + np.arange(4).reshape(2, 2)).astype(dtype)
    routes[[3, 6, 11]] = unknown_route(np.dtype(dtype))
    microbatch = pack(
        replace(batch, routes=routes), [2, 0], device=torch.device("cpu"), multiple=4, cp_size=cp_size, cp_rank=cp_rank
    )
    assert microbatch.routes is not None
    ids = microbatch.input_ids[0]
    known = (ids > 0) & (ids != 25) & (ids != 4)
    assert 0 < known.sum() < len(ids)
    expected = ids[:, None, None] + torch.arange(4).view(2, 2)
    assert torch.equal(microbatch.routes, torch.where(known[:, None, None], expected, -1).short())


def test_missing_per_token_data_are_named() -> None:
    microbatch = pack(make_batch(), [0], device=torch.device("cpu"))
    with pytest.raises(KeyError, match="no per-token data 'weights', only advantages, rollout_log_probs, temperatures"):
        microbatch["weights"]
    assert microbatch.get("weights") is None


def test_every_array_of_a_batch_declares_its_axis() -> None:
    arrays = [field for field in fields(TrainBatch) if "ndarray" in str(field.type)]
    assert len(arrays) > 5
    assert all("axis" in field.metadata for field in arrays)


def shared_batch() -> TrainBatch:
    """Prompts of 3 tokens: 1 2 3 with three responses, of which rows 0 and 3 have two tokens, and 5 2 3 with one."""
    return TrainBatch(
        token_ids=np.array([1, 2, 3, 11, 12, 5, 2, 3, 21, 1, 2, 3, 31, 1, 2, 3, 41, 42], dtype=np.int32),
        sequence_lengths=np.array([5, 4, 4, 5]),
        response_lengths=np.array([2, 1, 1, 2]),
        temperatures=np.arange(6, dtype=np.float32),
        rollout_log_probs=-np.arange(6, dtype=np.float32),
    )


def test_a_shared_prompt_is_packed_once_without_its_last_token() -> None:
    batch = shared_batch()
    microbatch = pack(batch, [3, 1, 0], device=torch.device("cpu"), prompts=shared_prompts(batch), multiple=4)
    assert microbatch.input_ids.tolist() == [[1, 2, 3, 41, 42, 5, 2, 3, 21, 3, 11, 12]]
    assert microbatch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 2, 3, 4]]
    assert microbatch.sequence_lengths == [2, 3, 4, 3]
    assert microbatch.prefixes == [-1, 0, -1, 0]
    assert microbatch.rows == [3, 1, 0]
    assert microbatch.predicting_positions.tolist() == [2, 3, 7, 9, 10]
    assert microbatch.targets.tolist() == [41, 42, 21, 11, 12]
    assert microbatch["temperatures"].tolist() == [4, 5, 2, 0, 1]
    assert microbatch.response_rows.tolist() == [0, 0, 1, 2, 2]


def test_nothing_is_shared_where_prompts_differ_or_have_one_token() -> None:
    batch = shared_batch()
    apart = pack(batch, [0, 1], device=torch.device("cpu"), prompts=shared_prompts(batch))
    assert apart.sequence_lengths == [5, 4]
    assert apart.prefixes is None
    short = replace(shared_batch(), response_lengths=np.array([4, 3, 3, 4]), temperatures=np.zeros(14, np.float32))
    short = replace(short, rollout_log_probs=np.zeros(14, np.float32))
    assert pack(short, [0, 2], device=torch.device("cpu"), prompts=shared_prompts(short)).prefixes is None


def test_responses_with_other_experts_at_their_prompt_do_not_share_it() -> None:
    """Row 2's second token had another expert than that of rows 0 and 3, as on another engine."""
    routes = np.ones((18, 1, 1), dtype=np.uint8)
    routes[10] = 2
    batch = replace(shared_batch(), routes=routes)
    assert shared_prompts(batch).ids.tolist() == [0, 1, 2, 0]
    microbatch = pack(batch, [0, 2, 3], device=torch.device("cpu"), prompts=shared_prompts(batch))
    assert microbatch.sequence_lengths == [2, 3, 4, 3]
    assert microbatch.routes is not None
    assert microbatch.routes.flatten().tolist() == [1] * 6 + [2] + [1] * 5


def test_groups_stay_together_where_that_balances_the_ranks() -> None:
    """Eight responses to each of 16 prompts: a micro-batch holds whole groups, and each prompt is computed once."""
    lengths, prompts = np.full(128, 60), SharedPrompts(np.repeat(np.arange(16), 8), np.full(128, 50))
    plan = plan_microbatches(lengths, dp_size=2, max_tokens=2000, prompts=prompts)
    assert sum(computed_tokens(rows, lengths, prompts) for rank in plan for rows in rank) == 16 * 50 + 128 * 10
    assert all(lengths[rows].sum() <= 2000 for rank in plan for rows in rank)
    assert sorted(row for rank in plan for rows in rank for row in rows) == list(range(128))


def test_a_group_is_divided_where_a_rank_would_have_nothing_to_do() -> None:
    lengths, prompts = np.full(8, 60), SharedPrompts(np.zeros(8, np.int64), np.full(8, 10))
    plan = plan_microbatches(lengths, dp_size=4, max_tokens=1000, prompts=prompts)
    assert [len(rows) for rank in plan for rows in rank] == [2, 2, 2, 2]


@pytest.mark.parametrize("prompt", [0, 200, 4000])
@pytest.mark.parametrize(("prompts_per_minibatch", "dp_size"), [(8, 2), (32, 64), (512, 64)])
def test_sharing_never_makes_a_step_longer(prompt: int, prompts_per_minibatch: int, dp_size: int) -> None:
    """Against the plan that knows of no prompts, in the tokens of the slowest rank of each turn."""
    generator = np.random.default_rng(prompt)
    responses = np.minimum(generator.lognormal(6, 1, 16 * prompts_per_minibatch).astype(int) + 1, 8192)
    lengths = responses + prompt + 1
    prompts = SharedPrompts(np.repeat(np.arange(prompts_per_minibatch), 16), np.full(len(lengths), prompt))

    def slowest(plan: list[list[list[int]]]) -> int:
        return sum(max(computed_tokens(rows, lengths, prompts) for rows in turn) for turn in zip(*plan, strict=True))

    sharing = plan_microbatches(lengths, dp_size=dp_size, max_tokens=16384, prompts=prompts)
    assert slowest(sharing) <= slowest(plan_microbatches(lengths, dp_size=dp_size, max_tokens=16384))
    assert sorted(row for rank in sharing for rows in rank for row in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or lengths[rows].sum() <= 16384 for rank in sharing for rows in rank)


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


def test_a_context_parallel_rank_holds_a_front_and_a_back_chunk_of_each_sequence() -> None:
    assert zigzag([8, 4], cp_size=2, cp_rank=0).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag([8, 4], cp_size=2, cp_rank=1).tolist() == [2, 3, 4, 5, 9, 10]
    assert zigzag([3, 2], cp_size=1, cp_rank=0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("multiple", [1, 3])
def test_the_slices_hold_every_response_token_once_and_what_predicts_it(cp_size: int, multiple: int) -> None:
    batch, device = make_batch(), torch.device("cpu")
    rows = [2, 0]
    slices = [
        pack(batch, rows, device=device, multiple=multiple, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)
    ]
    assert len({part.input_ids.shape for part in slices}) == 1
    assert slices[0].input_ids.shape[1] % multiple == 0
    assert all(length % (2 * cp_size) == 0 for length in slices[0].sequence_lengths) or cp_size == 1
    index = torch.cat([part.response_index for part in slices])
    assert sorted(index.tolist()) == list(range(5)) == list(range(slices[0].num_response_tokens))
    in_order = index.argsort()
    assert torch.cat([part.targets for part in slices])[in_order].tolist() == [23, 24, 25, 3, 4]
    assert torch.cat([part["temperatures"] for part in slices])[in_order].tolist() == [3, 4, 5, 0, 1]
    assert torch.cat([part["advantages"] for part in slices])[in_order].tolist() == [2, 2, 2, 0.5, 0.5]
    assert torch.cat([part.response_rows for part in slices])[in_order].tolist() == [0, 0, 0, 1, 1]
    predictors = torch.cat([part.input_ids[0, part.predicting_positions] for part in slices])[in_order]
    assert predictors.tolist() == [22, 23, 24, 2, 3]
    positions = torch.cat([part.position_ids[0, part.predicting_positions] for part in slices])[in_order]
    assert positions.tolist() == [1, 2, 3, 1, 2]


def test_all_ranks_of_a_context_parallel_group_take_an_empty_micro_batch() -> None:
    for rank in range(2):
        part = pack(make_batch(), [], device=torch.device("cpu"), multiple=3, cp_size=2, cp_rank=rank)
        assert part.input_ids.shape == (1, 6)
        assert part.targets.shape == (0,)


def long_tailed_lengths(number: int, seed: int) -> np.ndarray:
    """Prompt and response together: log-normal responses (mean about 2,900, one in 40 cut off at 12,288)."""
    generator = np.random.default_rng(seed)
    responses = np.minimum(generator.lognormal(7.5, 1.0, number).astype(int) + 1, 12288)
    return responses + generator.integers(60, 1024, number)


@pytest.mark.parametrize("budget", [13312, 16384, 32768])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_large_step_is_balanced_full_and_planned_in_time(seed: int, budget: int) -> None:
    """8,192 responses, 16 to a prompt, on 64 ranks: imbalance at most 1.02, filler below 1 %, planned in a second."""
    lengths, ranks = long_tailed_lengths(8192, seed), 64
    prompts = SharedPrompts(np.repeat(np.arange(512), 16), np.full(8192, 59))
    started = time.process_time()
    plan = plan_microbatches(lengths, dp_size=ranks, max_tokens=budget, prompts=prompts)
    assert time.process_time() - started < 1
    tokens = np.array([[lengths[rows].sum() for rows in microbatches] for microbatches in plan])
    loads = tokens.sum(1)
    assert loads.max() / loads.mean() <= 1.02
    # An empty micro-batch costs a whole pass; each rank's tokens are padded to a multiple of tp = 8.
    filler = (tokens == 0).mean() + (-tokens % 8).sum() / tokens.sum()
    assert filler < 0.01
    # No plan could have fewer: the fullest rank needs at least this many.
    assert tokens.shape[1] <= np.ceil(loads.max() / budget) + 1
    # Experts make the ranks wait for each other in every micro-batch: the n-th ones are alike in size.
    assert tokens.max(0).sum() / tokens.mean(0).sum() < 1.02
