"""What the stages hand to each other: frozen data on numpy arrays, no torch, no behaviour beyond slicing.

Shape letters: `B` responses, `T` tokens of prompts and responses, `N` response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from megatron_hapo.entropy import EntropyStats

FinishReason = Literal["stop", "length", "abort"]
ScoringFailure = Literal["timeout", "crash"]
InFlight = Literal["finish", "pause", "abort"]
"""What a weight sync does with unfinished responses; see config.WeightSyncConfig.in_flight."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem, ready for an engine."""

    uid: str
    """Unique in its data source; stable between runs."""
    token_ids: np.ndarray
    """[P] int32, rendered with the chat template."""
    ground_truth: str
    data_source: str
    """Name that chooses the scorer, as in the DAPO-Math layout."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveTemperature:
    """The sampler's T_t = T (1 + tau h_t), h_t from the token's entropy and the statistics of the previous step."""

    stats: EntropyStats
    tau: float
    sign: Literal["signed", "reference"] = "signed"
    floor: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample; the same for all prompts of a call."""

    samples: int
    """Responses to each prompt."""
    temperature: float
    """Base temperature; 0 is greedy."""
    max_response_tokens: int
    seed: int
    """Every response gets a seed of its own from this one, the prompt's uid and the sample's index."""
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    adaptive: AdaptiveTemperature | None = None
    """None samples every token at the base temperature."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response."""

    prompt: Prompt
    response_ids: np.ndarray
    """[R] int32, with the stop token if one was sampled."""
    rollout_log_probs: np.ndarray
    """[R] float32, log-prob of each sampled token under the engine's distribution at `temperatures`."""
    temperatures: np.ndarray
    """[R] float32, T_t at which each token was sampled."""
    policy_versions: np.ndarray
    """[R] int32, version of the weights that each token was sampled from; it never falls along a response."""
    finish_reason: FinishReason

    @property
    def policy_version(self) -> int:
        """The oldest of its tokens' versions."""
        return int(self.policy_versions[0])


@dataclass(frozen=True)
class Score:
    """What one response earned."""

    reward: float
    """With the overlong penalty."""
    correctness: float
    """In [0, 1]; says nothing about length."""
    failure: ScoringFailure | None = None
    """Why the response could not be scored; it then counts as wrong."""

    @property
    def correct(self) -> bool:
        """Fully."""
        return self.correctness >= 1.0


@dataclass(frozen=True)
class ScoredGroup:
    """The rollouts of one prompt with their scores."""

    rollouts: list[Rollout]
    scores: list[Score]

    @property
    def informative(self) -> bool:
        """Whether some responses are more right than others; that some are longer tells the policy nothing of that."""
        return len({score.correctness for score in self.scores}) > 1


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What the trainer's forward pass says about a batch, in batch order."""

    log_probs: np.ndarray
    """[N] float32, at the base temperature."""
    rollout_temperature_log_probs: np.ndarray
    """[N] float32, at each token's own sampling temperature: comparable with rollout_log_probs."""
    entropies: np.ndarray
    """[N] float32, nats, at the base temperature."""


@dataclass(frozen=True, kw_only=True)
class WeightBucket:
    """Some of the policy's tensors under their Hugging Face names, whole, laid end to end."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    """torch dtype names, e.g. bfloat16."""
    data: np.ndarray
    """[bytes] uint8, the tensors in this order, each starting at a multiple of 16 bytes."""
    checksums: dict[str, list[int]] | None = None
    """For each name, `tensor_checksum` of every engine rank's slice; None where this update is not verified."""


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Responses laid end to end; the arrays over N follow the responses' order."""

    token_ids: np.ndarray
    """[T] int32, prompt and response of each sequence in turn."""
    sequence_lengths: np.ndarray
    """[B] int64, prompt plus response tokens."""
    response_lengths: np.ndarray
    """[B] int64."""
    temperatures: np.ndarray
    """[N] float32, T_t of the rollout."""
    rollout_log_probs: np.ndarray
    """[N] float32."""
    advantages: np.ndarray
    """[B] float32."""
    old_log_probs: np.ndarray | None = None
    """[N] float32, the trainer's before the step's first update."""
    modulation: np.ndarray | None = None
    """[N] float32, h_t in [-1, 1], of the old policy's entropies."""
    weights: np.ndarray | None = None
    """[N] float32, weight of each token's loss beside 1 / (number of tokens); None: 1."""
    reasoning: np.ndarray | None = None
    """[N] bool, Archer's reasoning tokens; None where the method does not tell them apart."""
    stats: EntropyStats | None = None
    """Of the whole step, for a loss that recomputes h."""

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    @property
    def num_response_tokens(self) -> int:
        return int(self.response_lengths.sum())

    def select(self, rows: Sequence[int] | np.ndarray) -> TrainBatch:
        """The batch of these responses, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        tokens = _ragged_index(self.sequence_lengths, rows)
        response_tokens = _ragged_index(self.response_lengths, rows)
        axis = {"token_ids": tokens, "sequence_lengths": rows, "response_lengths": rows, "advantages": rows}
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value = value[axis.get(field.name, response_tokens)]
            chosen[field.name] = value
        return TrainBatch(**chosen)


def _ragged_index(lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Positions, in a concatenation of pieces with these lengths, of the pieces `rows`."""
    sizes = lengths[rows]
    source_starts = (np.cumsum(lengths) - lengths)[rows]
    target_starts = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum())) + np.repeat(source_starts - target_starts, sizes)


def pack_rollouts(rollouts: Sequence[Rollout], advantages: np.ndarray) -> TrainBatch:
    """The training batch of these rollouts, before the trainer scored it."""
    return TrainBatch(
        token_ids=np.concatenate([part for r in rollouts for part in (r.prompt.token_ids, r.response_ids)]),
        sequence_lengths=np.array([len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts], dtype=np.int64),
        response_lengths=np.array([len(r.response_ids) for r in rollouts], dtype=np.int64),
        temperatures=np.concatenate([r.temperatures for r in rollouts]),
        rollout_log_probs=np.concatenate([r.rollout_log_probs for r in rollouts]),
        advantages=advantages.astype(np.float32),
    )


def merge_scores(parts: Sequence[tuple[list[int], TokenScores] | None], batch: TrainBatch) -> TokenScores:
    """Scores in batch order, from the ranks' parts; every row must come exactly once."""
    present = [part for part in parts if part is not None]
    rows = np.concatenate([np.asarray(part_rows, dtype=np.int64) for part_rows, _ in present])
    assert np.array_equal(np.sort(rows), np.arange(len(batch))), "rows are missing or doubled"
    target = _ragged_index(batch.response_lengths, rows)

    def in_order(name: str) -> np.ndarray:
        merged = np.empty(batch.num_response_tokens, dtype=np.float32)
        merged[target] = np.concatenate([getattr(scores, name) for _, scores in present])
        return merged

    return TokenScores(
        log_probs=in_order("log_probs"),
        rollout_temperature_log_probs=in_order("rollout_temperature_log_probs"),
        entropies=in_order("entropies"),
    )
