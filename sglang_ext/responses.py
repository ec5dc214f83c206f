"""One response as a request to SGLang, and SGLang's answer as a rollout."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import numpy as np

from megatron_hapo.config.rollout_settings import MOST_KEPT
from megatron_hapo.errors import RolloutError
from megatron_hapo.types import AdaptiveTemperature, FinishReason, KeptTokens, Prompt, Rollout, RouteFormat, Sampling
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


def rollout_of(prompt: Prompt, answer: dict, sampling: Sampling, *, routes: RouteFormat | None = None) -> Rollout:
    """The rollout in SGLang's answer, with the experts of its tokens if `routes`.

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
        routes=routes and routes_of(meta, routes, len(prompt.token_ids) + len(response_ids) - 1),
    )


def routes_of(meta: dict, routes: RouteFormat, num_positions: int) -> np.ndarray:
    """The experts of each position, as `RouteFormat` stores them. [num_positions, expert layers, top_k]

    Raises:
        RolloutError: SGLang returned none, or another number.
    """
    encoded = meta.get("routed_experts")
    numbers = np.frombuffer(base64.b64decode(encoded or ""), dtype=np.int32)
    expected = (num_positions, routes.num_layers, routes.top_k)
    if numbers.size != np.prod(expected):
        raise RolloutError(
            f"SGLang returned {numbers.size} numbers of experts where {num_positions} positions, {routes.num_layers} "
            f"layers and {routes.top_k} experts a token need {np.prod(expected)}. If it cannot return them, set "
            "rollout.replay_routes=false; the trainer's log-probs may then be those of other experts"
        )
    return numbers.reshape(expected)[:, list(routes.expert_layers)].astype(routes.dtype)


def _kept_tokens(meta: dict) -> KeptTokens:
    masks = meta["output_token_sampling_mask"]
    return KeptTokens(
        np.fromiter((token for mask in masks for token in mask), np.int32),
        np.array([len(mask) for mask in masks], dtype=np.int32),
    )
