"""`megatron-hapo generate`: engines and reward workers alone, every training prompt once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hapo.checkpoint.hf_reader import HfReader
from megatron_hapo.checkpoint.manifest import check_manifest
from megatron_hapo.checkpoint.model_folder import model_fingerprint
from megatron_hapo.checks.own_rewards import ROWS, check_own_rewards
from megatron_hapo.config import Config
from megatron_hapo.data.job_prompts import ordered_prompts
from megatron_hapo.data.prompts import load_tokenizer
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.launch.run import open_rollouts
from megatron_hapo.model.families import read_shape
from megatron_hapo.observe.record_schema import Origin, vocabulary_fingerprint
from megatron_hapo.observe.record_tables import RecordTables
from megatron_hapo.observe.token_text import decoder
from megatron_hapo.rollout.generation import Generation, Summary

_OF_THE_CHOICE = (
    "temperature",
    "top_p",
    "top_k",
    "max_prompt_tokens",
    "max_response_tokens",
    "stop_token_ids",
    "dtype",
    "quantization",
)
"""Settings of `rollout` on which responses depend."""


def run_generation(config: Config, folder: Path, *, prompts: int | None = None) -> Summary:
    """Samples and scores the training prompts into a folder, and goes on where an earlier call was interrupted.

    Args:
        prompts: only so many, the first; None: all.
    Raises:
        HapoError: an engine failed, or the folder holds records of other settings.
    """
    shape = read_shape(config.model.path)
    tokenizer = load_tokenizer(config.model.path, vocab_size=shape.vocab_size)
    chosen = ordered_prompts(config, tokenizer)[:prompts]
    origin = Origin(model_fingerprint(config.model.path), vocabulary_fingerprint(tokenizer))
    tables = RecordTables(config, decoder(tokenizer), origin)
    generation = Generation(folder, chosen, config, _settings(config, origin), tables)
    if generation.missing():
        check_own_rewards(config, chosen[:ROWS])
        if not check_manifest(config.model.path):
            HfReader(config.model.path, shape).check(values=True)
        with (
            local_ray(config.launch.start_timeout_seconds),
            open_rollouts(config, read_weights=True) as (pool, rewards),
        ):
            pool.wait_until_ready()
            generation.complete(pool, rewards)
    return generation.summary()


def _settings(config: Config, origin: Origin) -> dict[str, Any]:
    """What the responses and their scores depend on."""
    dumped = config.model_dump(mode="json")
    return {
        "model": origin.model,
        "seed": config.seed,
        "batch": {name: dumped["batch"][name] for name in ("prompts_per_step", "samples_per_prompt")},
        "rollout": {name: dumped["rollout"][name] for name in _OF_THE_CHOICE},
        "data": {name: dumped["data"][name] for name in ("train", "chat_template")},
        "reward": {name: value for name, value in dumped["reward"].items() if name not in ("workers", "memory_bytes")},
    }
