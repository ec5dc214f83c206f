"""One response as a request to SGLang, and SGLang's answer as a rollout."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from megatron_hapo.config.rollout_settings import MOST_KEPT
from megatron_hapo.errors import RolloutError
from megatron_hapo.types import AdaptiveTemperature, FinishReason, KeptTokens, Prompt, Rollout, Sampling
from sglang_ext import temperature
from sglang_ext.plugin import REQUEST_KEY, TEMPERATURE_KEY


def sample_seed(seed: int, uid: str, index: int) -> int:
    """Seed of one response, in [0, 2^63): the same in every process and Python version."""
    digest = hashlib.blake2b(f"{seed}\0{index}\0{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sampling_parameters(sampling: Sampling, *, seed: int) -> dict[str, Any]:
    """SGLang's `sampling_params` of one response."""
    top_k = sampling.top_k or (MOST_KEPT if sampling.keep_cut else None)
    return ({} if top_k is None else {"top_k": top_k}) | {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_response_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "no_stop_trim": True,
        "sampling_seed": seed,
        "custom_params": {REQUEST_KEY: adaptive_parameters(sampling.adaptive)},
    }


def adaptive_parameters(adaptive: AdaptiveTemperature | None) -> list[float]:
    """The numbers that a request carries for the plugin; none for the base temperature."""
    return [] if adaptive is None or adaptive.tau == 0 else temperature.row_parameters(adaptive)


def rollout_of(prompt: Prompt, answer: dict, sampling: Sampling) -> Rollout:
    """The rollout in SGLang's answer.

    Raises:
        RolloutError: SGLang aborted the request, or its answer does not say the same of every token.
    """
    meta = answer["meta_info"]
    finish = meta["finish_reason"]
    if finish["type"] == "abort":
        raise RolloutError(
            f"SGLang aborted a response to prompt {prompt.uid}: {finish.get('message', 'no reason given')}"
        )
    response_ids = np.asarray(answer["output_ids"], dtype=np.int32)
    if kept := _kept_tokens(meta) if sampling.keep_cut else None:
        log_probs = np.asarray(meta["output_token_sampling_logprobs"], dtype=np.float32)
    else:
        log_probs = np.asarray([entry[0] for entry in meta["output_token_logprobs"]], dtype=np.float32)
    if sampling.temperature > 0 and adaptive_parameters(sampling.adaptive):
        temperatures = np.asarray(meta[TEMPERATURE_KEY], dtype=np.float32)
    else:
        temperatures = np.full(len(response_ids), sampling.temperature, dtype=np.float32)
    spans = meta["weight_versions"]
    versions = np.repeat(
        np.array([int(span["version"]) for span in spans], dtype=np.int32),
        [span["end"] - span["start"] for span in spans],
    )
    if not len(response_ids) == len(log_probs) == len(temperatures) == len(versions):
        raise RolloutError(
            f"SGLang's answer to prompt {prompt.uid} has {len(response_ids)} tokens, {len(log_probs)} log-probs, "
            f"{len(temperatures)} temperatures and {len(versions)} weight versions"
        )
    if kept is not None and len(kept.lengths) != len(response_ids):
        raise RolloutError(
            f"SGLang's answer to prompt {prompt.uid} has {len(response_ids)} tokens, and kept tokens of "
            f"{len(kept.lengths)}"
        )
    reason: FinishReason = "stop" if finish["type"] == "stop" else "length"
    return Rollout(
        prompt=prompt,
        response_ids=response_ids,
        rollout_log_probs=log_probs,
        temperatures=temperatures,
        policy_versions=versions,
        finish_reason=reason,
        kept=kept,
    )


def _kept_tokens(meta: dict) -> KeptTokens:
    masks = meta["output_token_sampling_mask"]
    return KeptTokens(
        np.fromiter((token for mask in masks for token in mask), np.int32),
        np.array([len(mask) for mask in masks], dtype=np.int32),
    )
