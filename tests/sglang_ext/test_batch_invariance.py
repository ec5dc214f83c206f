"""Deterministic mode: a response has the same bits alone, beside others, on another engine and after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_hapo.entropy import EntropyStats
from megatron_hapo.types import AdaptiveTemperature, Prompt, Rollout, Sampling
from sglang_ext import batch_invariance
from sglang_ext.cpu_attention import attention, exact_rectangles
from tests.sglang_ext.engine_process import running_engine
from tests.tiny_families import write_family

SAMPLING = Sampling(
    samples=1, temperature=1.1, max_response_tokens=24, seed=5,
    adaptive=AdaptiveTemperature(stats=EntropyStats(0.2, 1.0, -1.0, 1.0, 1), tau=0.3),
)  # fmt: skip


def make_prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, count)
    return [
        Prompt(
            uid=f"p{i}", token_ids=rng.integers(0, 250, length).astype(np.int32), ground_truth="", data_source="test"
        )
        for i, length in enumerate(lengths)
    ]


def bits(rollout: Rollout) -> tuple[bytes, ...]:
    return tuple(values.tobytes() for values in (rollout.response_ids, rollout.rollout_log_probs, rollout.temperatures))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 192), (72, 100), (576, 1536)])
def test_a_row_of_a_product_does_not_depend_on_the_others(dtype: torch.dtype, size: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    weight, rows = torch.randn(size[1], size[0], dtype=dtype), torch.randn(75, size[0], dtype=dtype)
    together = batch_invariance.linear_in_blocks(F.linear, rows, weight)
    torch.testing.assert_close(together, F.linear(rows, weight))
    for start, end in ((0, 1), (3, 40), (74, 75)):
        assert torch.equal(batch_invariance.linear_in_blocks(F.linear, rows[start:end], weight), together[start:end])


def test_blocks_take_any_shape() -> None:
    weight, bias = torch.randn(3, 5), torch.randn(3)
    for shape in ((5,), (0, 5), (2, 3, 5)):
        given = torch.randn(shape)
        torch.testing.assert_close(
            batch_invariance.linear_in_blocks(F.linear, given, weight, bias), F.linear(given, weight, bias)
        )


def test_attention_of_a_position_does_not_depend_on_how_it_was_computed() -> None:
    """Prefills, chunks of one, and decode steps; two requests, in a table that is narrower than the padded keys."""
    torch.set_num_threads(1)
    table = torch.randperm(80).view(2, 40)
    query, keys, values = torch.randn(37, 4, 16), torch.randn(80, 2, 16), torch.randn(80, 2, 16)

    def attended(requests: list[int], lengths: list[int], new: list[int], rows: torch.Tensor) -> torch.Tensor:
        planned = exact_rectangles(table, torch.tensor(requests), lengths, new)
        return attention(rows, keys, values, planned, scaling=0.25)

    whole = attended([0], [37], [37], query)
    for position in (0, 1, 15, 16, 36):
        reference = F.scaled_dot_product_attention(
            query[position, :, None], *(
                cache[table[0, : position + 1]].transpose(0, 1).repeat_interleave(2, 0) for cache in (keys, values)
            ), scale=0.25,
        )  # fmt: skip
        torch.testing.assert_close(whole[position], reference[:, 0])
        assert torch.equal(attended([0], [position + 1], [1], query[position, None])[0], whole[position])
    chunks = torch.cat([query[10:30], query[:5]])
    assert torch.equal(attended([0, 1], [30, 5], [20, 5], chunks)[:20], whole[10:30])


@pytest.mark.parametrize("family", ["qwen3", "experts", "two ranks, bfloat16"])
def test_a_response_has_the_same_bits_however_it_is_generated(family: str, tiny_qwen3: Path, tmp_path: Path) -> None:
    model = write_family(tmp_path / "model", "qwen3_moe") if family == "experts" else tiny_qwen3
    settings: dict[str, Any] = {"context_tokens": 128}
    if family == "two ranks, bfloat16":
        settings |= {"tp": 2, "dtype": "bfloat16"}
    prompts = make_prompts(40)
    with running_engine(model, deterministic=True, **settings) as engine:
        alone = [engine.generate([prompt], SAMPLING)[0][0] for prompt in prompts[:6]]
        # More than run at once, and more tokens than the cache holds: requests wait, are retracted and computed anew.
        together = [group[0] for group in engine.generate(prompts, SAMPLING)]
    with running_engine(model, deterministic=True, kv_cache_tokens=600, seed=7, **settings) as engine:
        restarted = [group[0] for group in engine.generate(prompts[::-1], SAMPLING)][::-1]
    assert [bits(rollout) for rollout in alone] == [bits(rollout) for rollout in together[:6]]
    assert [bits(rollout) for rollout in together] == [bits(rollout) for rollout in restarted]
    assert len({rollout.response_ids.tobytes() for rollout in together}) > 30
