"""A config and a mini-batch for trainer ranks on tiny models; imports no pytest, so that a benchmark can use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_hapo.config import Config
from megatron_hapo.types import TrainBatch

TEMPERATURE = 1.25


def make_config(model: Path, layout: dict[str, Any], **optimizer: Any) -> Config:
    layout = dict(layout)
    trainer = {
        "dtype": "float32",
        "max_tokens_per_microbatch": layout.pop("max_tokens", 64),
        "recompute": layout.pop("recompute", "none"),
        "overlap_communication": layout.pop("overlap", False),
        "distributed_optimizer": layout.pop("distributed_optimizer", True),
        "output_head": layout.pop("output_head", "logits"),
        "float32_logits": layout.pop("float32_logits", False),
    }
    return Config.model_validate(
        {
            "name": "test",
            "steps": 1,
            "device": "cpu",
            "model": {"path": model},
            "parallel": layout,
            "trainer": trainer,
            "optimizer": {"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.0, **optimizer},
            "rollout": {"temperature": TEMPERATURE, "dtype": "float32"},
            "weight_sync": {"bucket_bytes": 20_000},
            "data": {"train": {"type": "arithmetic", "size": 1}},
        }
    )


def make_batch(*, shared_prompts: bool = False) -> TrainBatch:
    """Uneven sequences, two with a single response token; advantages of both signs.

    Args:
        shared_prompts: whether two pairs of them have one prompt.
    """
    generator = np.random.default_rng(0)
    lengths = np.array([20, 13, 33, 9, 25, 40, 2, 17, 5, 12, 31, 8, 22, 3, 14, 11])
    responses = np.array([10, 5, 20, 8, 1, 30, 1, 9, 2, 11, 16, 4, 21, 1, 7, 6])
    token_ids, starts = generator.integers(0, 259, lengths.sum()).astype(np.int32), np.cumsum(lengths) - lengths
    for first, second in ((0, 5), (1, 7)) if shared_prompts else ():
        prompt = slice(starts[first], starts[first] + lengths[first] - responses[first])
        token_ids[starts[second] :][: lengths[second] - responses[second]] = token_ids[prompt]
    return TrainBatch(
        token_ids=token_ids,
        sequence_lengths=lengths,
        response_lengths=responses,
        temperatures=generator.uniform(0.9, 1.6, responses.sum()).astype(np.float32),
        rollout_log_probs=np.zeros(responses.sum(), np.float32),
        advantages=np.array([1.0, -1, 0.5, -0.5, 2, -2, 1, -1, 1, 0.3, -0.7, 1, -1, 0.5, -0.2, 1.5], np.float32),
    )
