"""The evaluation of model folders: engines alone, one model after another, every response kept on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from itertools import batched
from pathlib import Path
from typing import Any

from megatron_hapo.checkpoint.hf_reader import HfReader
from megatron_hapo.checkpoint.manifest import check_manifest
from megatron_hapo.checkpoint.model_folder import model_fingerprint
from megatron_hapo.checks.own_rewards import ROWS, check_own_rewards
from megatron_hapo.config import Config
from megatron_hapo.config.service_settings import ServiceConfig
from megatron_hapo.data.job_prompts import evaluation_prompts
from megatron_hapo.data.prompts import load_tokenizer
from megatron_hapo.launch.ray.local_ray import local_ray
from megatron_hapo.launch.run import open_rollouts
from megatron_hapo.model.families import read_shape
from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.observe.running_stages import stage
from megatron_hapo.protocols import RewardPool, RolloutPool
from megatron_hapo.rollout.collect import generate_scored
from megatron_hapo.rollout.eval_results import ResultFile
from megatron_hapo.rollout.evaluation import Evaluated, EvaluationSet, evaluation_sets

logger = logging.getLogger(__name__)

_RESPONSES_PER_SLOT = 8
"""Responses of a call for each request that the engines decode at once: few calls, since the last responses of each
leave engines idle, but a call's responses are lost if it is interrupted."""
_SAMPLING = {"samples", "temperature", "top_p", "max_response_tokens"}
"""Settings of a set that its sampling has with the values in effect."""
_NOT_OF_SCORES: dict[str, Any] = {
    **dict.fromkeys(("workers", "memory_bytes", "overlong", "correct", "wrong"), True),
    "judges": {"__all__": set(ServiceConfig.model_fields)},
    "code": {"server"},
}
"""Settings of rewards on which correctness does not depend: a server may have moved."""


def run_evaluations(configs: Mapping[str, Config], output: Path) -> dict[str, dict[str, list[Evaluated]]]:
    """For each model the results of each evaluation set. Goes on where an earlier call was interrupted.

    Args:
        configs: the checked config of each model, under its name in the result.
        output: folder of the results; each model has a folder in it, with every response.
    Raises:
        HapoError: an engine failed, or the folder holds results of other settings.
    """
    results = {}
    with contextlib.ExitStack() as stack:
        has_ray = False
        for label, config in configs.items():
            tokenizer = load_tokenizer(config.model.path, vocab_size=read_shape(config.model.path).vocab_size)
            sets = evaluation_sets(config, evaluation_prompts(config, tokenizer))
            check_own_rewards(config, [prompt for part in sets for prompt in part.prompts[:ROWS]])
            folder = output / _folder_name(config.model.path)
            files = [ResultFile(folder, part, _settings(config, part)) for part in sets]
            if any(file.missing() for file in files):
                if not check_manifest(config.model.path):
                    HfReader(config.model.path, read_shape(config.model.path)).check(values=True)
                if not has_ray:
                    stack.enter_context(local_ray(config.launch.start_timeout_seconds))
                    has_ray = True
                with open_rollouts(config, read_weights=True) as (pool, rewards):
                    pool.wait_until_ready()
                    for part, file in zip(sets, files, strict=True):
                        _complete(file, part, pool, rewards, tokenizer, config)
            logger.info("%s: responses in %s", label, folder)
            results[label] = {part.name: file.evaluated() for part, file in zip(sets, files, strict=True)}
    return results


def _complete(
    file: ResultFile, part: EvaluationSet, pool: RolloutPool, rewards: RewardPool, tokenizer: Any, config: Config
) -> None:
    """Evaluate the prompts that the file does not have yet."""
    missing = file.missing()
    if len(missing) < len(part.prompts):
        logger.info(
            "%s: %d of %d problems are there already", file.path, len(part.prompts) - len(missing), len(part.prompts)
        )
    slots = config.rollout.engines * config.rollout.max_running_requests
    for numbers in batched(missing, max(1, _RESPONSES_PER_SLOT * slots // part.sampling.samples)):
        with stage(part.name or "eval"):
            groups = generate_scored(pool, rewards, [part.prompts[n] for n in numbers], part.sampling, StepClock())
        ids = [rollout.response_ids.tolist() for group in groups for rollout in group.rollouts]
        file.add(groups, tokenizer.batch_decode(ids, skip_special_tokens=True))
        logger.info("%s: %d of %d problems", file.path, len(part.prompts) - len(file.missing()), len(part.prompts))


def _settings(config: Config, part: EvaluationSet) -> dict[str, Any]:
    """What the responses to a set depend on, besides its sampling."""
    source = config.data.eval_sets[part.name]
    return {
        "model": model_fingerprint(config.model.path),
        "data": source.model_dump(mode="json", exclude=_SAMPLING),
        "chat_template": config.data.chat_template,
        "max_prompt_tokens": config.rollout.max_prompt_tokens,
        "dtype": config.rollout.dtype,
        "quantization": config.rollout.quantization,
        "reward": config.reward.model_dump(mode="json", exclude=_NOT_OF_SCORES),
    }


def _folder_name(model: Path) -> str:
    """The same for a model folder every time, and another one for every other."""
    path = model.resolve()
    return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def write_summary(path: Path, results: Mapping[str, Any]) -> None:
    """Write the statistics of an evaluation as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
