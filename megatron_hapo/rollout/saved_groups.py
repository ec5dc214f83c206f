"""Finished groups as plain arrays, for a checkpoint: numbers end to end, and one JSON text for everything else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_hapo.config import Config
from megatron_hapo.rollout.group_queue import FinishedGroup, Place
from megatron_hapo.types import Asked, KeptTokens, Prompt, Rollout, Score, ScoredGroup

_TEXT = "json"
_TOKENS = ("response_ids", "rollout_log_probs", "temperatures", "policy_versions")
_NOWHERE = Prompt(uid="", token_ids=np.zeros(0, np.int32), ground_truth="", data_source="")
"""Prompts are not saved: they are drawn again."""


def to_arrays(groups: Sequence[FinishedGroup], config: Config) -> dict[str, np.ndarray]:
    """Arrays by name, from which `from_arrays` makes the same groups; empty if there is none.

    Args:
        config: of the run that has generated and scored them.
    """
    if not groups:
        return {}
    rollouts = [rollout for group in groups for rollout in group.scored.rollouts]
    arrays = {name: np.concatenate([getattr(rollout, name) for rollout in rollouts]) for name in _TOKENS}
    kept = [rollout.kept for rollout in rollouts if rollout.kept is not None]
    routes = [rollout.routes for rollout in rollouts if rollout.routes is not None]
    if kept:
        all_kept = KeptTokens.concatenate(kept)
        arrays |= {
            "kept_ids": all_kept.token_ids,
            "kept_lengths": all_kept.lengths,
            "kept_tokens": np.array([len(part.token_ids) for part in kept]),
        }
    if routes:
        arrays |= {"routes": np.concatenate(routes), "positions": np.array([len(part) for part in routes])}
    text = {"settings": _settings(config), "groups": [_described(group) for group in groups]}
    return arrays | {_TEXT: np.frombuffer(json.dumps(text).encode(), np.uint8)}


def from_arrays(arrays: Mapping[str, np.ndarray], config: Config) -> dict[Place, FinishedGroup] | None:
    """The groups by their places, without their prompts; None if this config would have made others."""
    if not arrays:
        return {}
    text = json.loads(arrays[_TEXT].tobytes())
    if text["settings"] != _settings(config):
        return None
    lengths = [length for group in text["groups"] for length in group["lengths"]]
    tokens = {name: iter(_split(arrays[name], lengths)) for name in _TOKENS}
    kept = iter(_kept(arrays, lengths) if "kept_ids" in arrays else [None] * len(lengths))
    routes = iter(_split(arrays["routes"], arrays["positions"]) if "routes" in arrays else [None] * len(lengths))
    groups = {}
    for number, group in enumerate(text["groups"]):
        rollouts = [
            Rollout(
                prompt=_NOWHERE, finish_reason=reason, kept=next(kept), routes=next(routes),
                **{name: next(parts) for name, parts in tokens.items()},
            )
            for reason in group["finish_reasons"]
        ]  # fmt: skip
        place = (group["place"][0], group["place"][1])
        groups[place] = FinishedGroup(
            number=number, place=place, version=group["version"], statistics_step=group["statistics_step"],
            scored=ScoredGroup(rollouts, [_score(score) for score in group["scores"]]),
        )  # fmt: skip
    return groups


def _described(group: FinishedGroup) -> dict[str, Any]:
    return {
        "place": group.place,
        "version": group.version,
        "statistics_step": group.statistics_step,
        "lengths": [len(rollout.response_ids) for rollout in group.scored.rollouts],
        "finish_reasons": [rollout.finish_reason for rollout in group.scored.rollouts],
        "scores": [asdict(score) for score in group.scored.scores],
    }


def _score(values: Mapping[str, Any]) -> Score:
    asked = values["asked"]
    return Score(**{**values, "asked": None if asked is None else Asked(**asked)})


def _kept(arrays: Mapping[str, np.ndarray], lengths: Sequence[int]) -> list[KeptTokens]:
    ids, counts = _split(arrays["kept_ids"], arrays["kept_tokens"]), _split(arrays["kept_lengths"], lengths)
    return [KeptTokens(token_ids=own, lengths=of_tokens) for own, of_tokens in zip(ids, counts, strict=True)]


def _split(array: np.ndarray, lengths: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    return np.split(array, np.cumsum(lengths)[:-1])


def _settings(config: Config) -> dict[str, Any]:
    """What groups and their rewards depend on besides prompts and weights."""
    sections = config.model_dump(mode="json", include={"rollout", "reward", "dynamic_sampling"})
    return sections | {"samples_per_prompt": config.batch.samples_per_prompt}
