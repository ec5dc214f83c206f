"""Utilization metrics of batches small enough to count by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hapo.config import Config
from megatron_hapo.sizing.throughput import model_flops
from megatron_hapo.sizing.utilization import Utilization
from megatron_hapo.types import TrainBatch
from tests.shapes import TINY


def utilization(
    *,
    peak_flops: float | None = None,
    max_tokens: int = 10,
    kl: bool = False,
    transformer_engine: bool = False,
    **parallel: Any,
) -> Utilization:
    config = Config.model_validate(
        {
            "name": "counted",
            "steps": 1,
            "model": {"path": Path("none")},
            "parallel": parallel,
            "trainer": {"max_tokens_per_microbatch": max_tokens},
            "rollout": {"engines": 2, "tp": 2},
            "algorithm": {"kl": {"enabled": kl}},
            "data": {"train": {"type": "arithmetic", "size": 1}},
        }
    )
    return Utilization(config=config, shape=TINY, peak_flops=peak_flops, transformer_engine=transformer_engine)


def batch(lengths: list[int], responses: int = 1, *, prompts: list[int] | None = None) -> TrainBatch:
    """Every sequence consists of one token id: that of its prompt, or one of its own."""
    tokens = len(lengths) * responses
    return TrainBatch(
        token_ids=np.repeat(prompts or range(len(lengths)), lengths).astype(np.int32),
        sequence_lengths=np.array(lengths),
        response_lengths=np.full(len(lengths), responses),
        temperatures=np.ones(tokens, np.float32),
        rollout_log_probs=np.zeros(tokens, np.float32),
        advantages=np.zeros(len(lengths), np.float32),
    )


def test_a_single_rank_has_no_padding_and_no_bubble() -> None:
    found = utilization().of_batches([batch([3, 7, 10])])
    assert found["utilization/padding_share"] == 0
    assert found["utilization/dp_imbalance"] == 1
    assert found["utilization/bubble_share"] == 0


def test_sequence_parallelism_pads_to_a_multiple_of_tp() -> None:
    found = utilization(tp=4).of_batches([batch([3, 7, 9])])  # micro-batches of 9 and of 3 + 7 tokens: 12 and 12
    assert found["utilization/padding_share"] == pytest.approx(1 - 19 / 24)


def test_imbalance_is_the_busiest_rank_over_the_mean() -> None:
    found = utilization(dp=2).of_batches([batch([9, 3])])
    assert found["utilization/dp_imbalance"] == pytest.approx(9 / 6)


def test_what_responses_share_counts_once_but_not_under_transformer_engine_or_context_parallelism() -> None:
    """Three of 9, 8 and 9 tokens; the first and the last share 5 of their 6 prompt tokens."""
    shared = batch([9, 8, 9], responses=3, prompts=[4, 5, 4])
    found = utilization(max_tokens=30, tp=4).of_batches([shared])
    assert found["utilization/shared_prompt_share"] == pytest.approx(5 / 26)
    assert found["utilization/padding_share"] == pytest.approx(1 - 21 / 24)
    operations = 4 * model_flops(TINY, tokens=21, length=(81 + 64 + 81 - 25) / 21, response_share=9 / 21)
    assert found["utilization/model_tflops"] == pytest.approx(operations / 1e12)
    apart = [
        utilization(max_tokens=10).of_batches([shared]),
        utilization(max_tokens=30, cp=2).of_batches([shared]),
        utilization(max_tokens=30, transformer_engine=True).of_batches([shared]),
    ]
    assert [metrics["utilization/shared_prompt_share"] for metrics in apart] == [0, 0, 0]


@pytest.mark.parametrize(("sizes", "share"), [({"pp": 2}, 1 / 3), ({"pp": 2, "vpp": 2}, 0.5 / 2.5)])
def test_the_bubble_is_the_time_to_fill_the_pipeline(sizes: dict[str, int], share: float) -> None:
    found = utilization(**sizes).of_batches([batch([9, 9])])  # two micro-batches
    assert found["utilization/bubble_share"] == pytest.approx(share)


def test_mfu_and_idle_shares_of_a_step() -> None:
    of = utilization(peak_flops=1e9, dp=2)
    metrics = of.of_batches([batch([4, 8], responses=3)])
    operations = 4 * model_flops(TINY, tokens=12, length=80 / 12, response_share=0.5)
    assert metrics["utilization/model_tflops"] == pytest.approx(operations / 1e12)
    times = {"time/step": 10, "time/rollout": 6, "time/log_probs": 1, "time/update": 2, "tokens_per_second": 60}
    found = of.of_step(metrics | times)
    assert found["utilization/mfu"] == pytest.approx(operations / (3 * 2 * 1e9))
    assert found["utilization/engine_idle_share"] == pytest.approx(0.4)
    assert found["utilization/trainer_idle_share"] == pytest.approx(0.7)
    assert found["utilization/tokens_per_second_per_gpu"] == 10  # two of the trainer, four of the engines
    assert "utilization/mfu" not in utilization().of_step(metrics | times)


def test_the_pass_of_a_reference_model_counts_as_training() -> None:
    alone, beside = utilization(peak_flops=1e9), utilization(peak_flops=1e9, kl=True)
    batches = [batch([4, 8], responses=3)]
    metrics, more = alone.of_batches(batches), beside.of_batches(batches)
    assert more["utilization/model_tflops"] == pytest.approx(metrics["utilization/model_tflops"] * 5 / 4)
    times = {"time/step": 10, "time/rollout": 6, "time/log_probs": 1, "time/update": 3, "tokens_per_second": 60}
    found = beside.of_step(more | times | {"time/reference": 1})
    assert found["utilization/trainer_idle_share"] == pytest.approx(0.5)
    assert found["utilization/mfu"] == pytest.approx(alone.of_step(metrics | times)["utilization/mfu"])
