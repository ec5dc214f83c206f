"""What the stages hand to each other: frozen data on numpy arrays, without torch and without behaviour beyond slicing.

Shape letters: `B` responses, `T` tokens of prompts and responses, `N` response tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]
ScoringFailure = Literal["timeout", "crash"]
InFlight = Literal["finish", "pause", "abort"]
"""What a weight sync does with unfinished responses; see config.WeightSyncConfig.in_flight."""
Sign = Literal["signed", "reference"]
"""Sign of h below the pivot; see config.EntropyConfig.sign."""
TemperatureRule = Literal["scaled", "z_score"]
"""What tau is multiplied with; see config.AdaptiveTemperatureConfig.rule."""
Axis = Literal["tokens", "responses", "response_tokens"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem, ready for an engine."""

    uid: str
    """Unique in its data source and stable between runs."""
    token_ids: np.ndarray
    """[P] int32, rendered with the chat template."""
    ground_truth: str
    data_source: str
    """Name that selects the scorer, as in the DAPO-Math layout."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All columns of the row that it comes from, as JSON values, for a reward of the user's own; they stay in the
    driver. Empty for generated problems."""
    question: str = ""
    """Its last message as text, for judges; it stays in the driver."""
    scorer: str | None = None
    """Overrides reward.scorer; only prompts of an evaluation set with a scorer of its own have one."""


@dataclass(frozen=True)
class EntropyStats:
    """Order statistics of log entropy (of nats) over all response tokens of a step."""

    pivot: float
    """Pivot quantile of log entropy."""
    log_max: float
    """Largest log entropy, or its high quantile."""
    log_min: float
    """Smallest log entropy, or its low quantile."""
    rms: float
    """Root mean square of log entropy about the pivot. The modulation does not use it; it is exported for the z-score
    in the paper's temperature formula."""
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class AdaptiveTemperature:
    """The sampler's T_t = T (1 + tau h_t), with h_t from the token's entropy and the previous step's statistics."""

    stats: EntropyStats
    tau: float
    rule: TemperatureRule = "scaled"
    sign: Sign = "signed"
    floor: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample the responses to a prompt."""

    samples: int
    """Responses to each prompt."""
    temperature: float
    """Base temperature; 0 is greedy."""
    max_response_tokens: int
    seed: int
    """The seed of each response is derived from this one, the prompt's uid and the sample's index."""
    top_p: float = 1.0
    top_k: int | None = None
    """None: as many as there are, or `rollout_settings.MOST_KEPT` with `keep_cut`."""
    keep_cut: bool = False
    """Whether rollouts tell which tokens top-p and top-k kept, and log-probs are those among them."""
    keep_routes: bool = False
    """Whether rollouts tell the experts that the engine chose, if its model has any."""
    stop_token_ids: tuple[int, ...] = ()
    adaptive: AdaptiveTemperature | None = None
    """None samples every token at the base temperature."""


@dataclass(frozen=True)
class GroupRequest:
    """A group that an engine is to generate: `sampling.samples` responses to one prompt."""

    prompt: Prompt
    sampling: Sampling


@dataclass(frozen=True)
class KeptTokens:
    """The tokens among which the sampler chose each response token, where top-p and top-k cut the others off.

    `K` kept tokens of all response tokens together: 4 bytes each, and 4 bytes a response token.
    """

    token_ids: np.ndarray
    """[K] int32, response token after response token; among them the one that was sampled."""
    lengths: np.ndarray
    """[N] int32, number of kept tokens of each response token, at least 1."""

    def __getitem__(self, index: np.ndarray) -> KeptTokens:
        """Those of the response tokens at these places."""
        return KeptTokens(self.token_ids[ragged_index(self.lengths, index)], self.lengths[index])

    @staticmethod
    def concatenate(parts: Sequence[KeptTokens]) -> KeptTokens:
        """One after another."""
        return KeptTokens(
            np.concatenate([part.token_ids for part in parts]), np.concatenate([part.lengths for part in parts])
        )


@dataclass(frozen=True, kw_only=True)
class RouteFormat:
    """How the experts that an engine chose are stored: `[positions, expert layers, top_k]`, one number each."""

    num_layers: int
    """Of the whole model."""
    expert_layers: tuple[int, ...]
    """Those with experts, from 0."""
    num_experts: int
    top_k: int

    @property
    def dtype(self) -> np.dtype:
        """uint8 where it can also hold `unknown`, else int16."""
        return np.dtype(np.uint8 if self.num_experts < 256 else np.int16)

    @property
    def bytes_per_token(self) -> int:
        """Of one position's routes."""
        return len(self.expert_layers) * self.top_k * self.dtype.itemsize


def unknown_route(dtype: np.dtype) -> int:
    """The number that stands for an expert which no engine chose: the trainer's router chooses there."""
    return int(np.iinfo(dtype).max)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response."""

    prompt: Prompt
    response_ids: np.ndarray
    """[R] int32, including the stop token if one was sampled."""
    rollout_log_probs: np.ndarray
    """[R] float32, log-prob of each sampled token under the engine's distribution at `temperatures`, among the kept
    tokens."""
    temperatures: np.ndarray
    """[R] float32, T_t at which each token was sampled."""
    policy_versions: np.ndarray
    """[R] int32, version of the weights that each token was sampled from; it never decreases along a response."""
    finish_reason: FinishReason
    kept: KeptTokens | None = None
    """Of its R tokens; None: the whole vocabulary, or not known."""
    routes: np.ndarray | None = None
    """[P + R - 1, expert layers, top_k] in RouteFormat's dtype, the experts of every position but the last, which no
    token follows, by the weights that sampled the position's next token. None: no experts, or not known."""

    @property
    def policy_version(self) -> int:
        """The oldest version among its tokens."""
        return int(self.policy_versions[0])


@dataclass(frozen=True)
class Asked:
    """What it took to have a response scored by a server."""

    requests: int
    """That were sent, repeated ones included."""
    seconds: float
    """From sending the first request to the end of the last one."""
    failed: bool
    """Whether there was no useful answer."""


@dataclass(frozen=True)
class Score:
    """What one response earned."""

    reward: float
    """Includes the overlong penalty."""
    correctness: float
    """In [0, 1]; independent of length."""
    failure: ScoringFailure | None = None
    """Why the response could not be scored; it then counts as wrong."""
    answer: str | None = None
    """The answer that the response states, as text; None if it states none. Majority votes compare it."""
    earned: float | None = None
    """The reward before the overlong penalty, where it does not follow from correctness: with a scorer of the user's
    own, or several scorers. None: it follows."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named parts of the reward, for the metrics and the records of responses."""
    asked: Asked | None = None
    """None: no server was asked."""

    @property
    def correct(self) -> bool:
        """Whether the response earned full credit."""
        return self.correctness >= 1.0


@dataclass(frozen=True)
class ScoredGroup:
    """The rollouts of one prompt with their scores."""

    rollouts: list[Rollout]
    scores: list[Score]

    @property
    def informative(self) -> bool:
        """Whether rewards differ between responses; a difference in length alone teaches the policy nothing."""
        return len({score.correctness if score.earned is None else score.earned for score in self.scores}) > 1


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """The trainer's forward pass over a batch, in batch order."""

    log_probs: np.ndarray
    """[N] float32, at the base temperature; among the kept tokens where the batch has them."""
    rollout_temperature_log_probs: np.ndarray
    """[N] float32, at each token's own sampling temperature, so comparable with rollout_log_probs."""
    entropies: np.ndarray
    """[N] float32, nats, at the base temperature, of the whole vocabulary."""
    reference_log_probs: np.ndarray | None = None
    """[N] float32, the reference model's, otherwise as `log_probs`; None without `algorithm.kl`."""


@dataclass(frozen=True, kw_only=True)
class WeightBucket:
    """Whole tensors of the policy under their Hugging Face names, laid end to end."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    """torch dtype names, e.g. bfloat16."""
    data: np.ndarray
    """[bytes] uint8, the tensors in this order, each starting at a multiple of 16 bytes."""
    checksums: dict[str, list[int]] | None = None
    """For each name the `tensor_checksum` of every engine rank's slice; None if this update is not verified."""


def _along(axis: Axis) -> dict[str, Axis]:
    """Metadata of a TrainBatch field that holds one array, or a mapping of arrays, along this axis."""
    return {"axis": axis}


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Responses laid end to end; the arrays over N follow the order of the responses.

    The axis of a field is declared once, in its metadata; `select`, `per_token` and the micro-batches follow from it.
    Per-token data of a single method needs no field: it goes into `token_data`.
    """

    token_ids: np.ndarray = field(metadata=_along("tokens"))
    """[T] int32, prompt and response of each sequence in turn."""
    routes: np.ndarray | None = field(default=None, metadata=_along("tokens"))
    """[T, expert layers, top_k] uint8 or int16, the experts that the engine chose; `unknown_route` at the last token of
    each sequence. None: the trainer's router chooses."""
    sequence_lengths: np.ndarray = field(metadata=_along("responses"))
    """[B] int64, prompt plus response tokens."""
    response_lengths: np.ndarray = field(metadata=_along("responses"))
    """[B] int64."""
    temperatures: np.ndarray = field(metadata=_along("response_tokens"))
    """[N] float32, T_t of the rollout."""
    rollout_log_probs: np.ndarray = field(metadata=_along("response_tokens"))
    """[N] float32, the engine's."""
    kept: KeptTokens | None = field(default=None, metadata=_along("response_tokens"))
    """Tokens among which log-probs are normalised; None: the whole vocabulary."""
    advantages: np.ndarray | None = field(default=None, metadata=_along("responses"))
    """[B] float32; None before the trainer has scored the batch."""
    old_log_probs: np.ndarray | None = field(default=None, metadata=_along("response_tokens"))
    """[N] float32, the trainer's before the step's first update."""
    weights: np.ndarray | None = field(default=None, metadata=_along("response_tokens"))
    """[N] float32, weight of each token's loss on top of 1 / (number of tokens); None means 1."""
    token_data: Mapping[str, np.ndarray] = field(default_factory=dict, metadata=_along("response_tokens"))
    """[N] float32 or bool each, by name: what the parts of the method add (`Part.token_data`)."""
    stats: EntropyStats | None = None
    """Statistics of the whole step, for a loss that recomputes h."""
    controls: Mapping[str, float] = field(default_factory=dict)
    """What the method's controllers set for the step's updates, by name (`Part.controls`)."""

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    @property
    def num_response_tokens(self) -> int:
        """Response tokens of all responses."""
        return int(self.response_lengths.sum())

    def select(self, rows: Sequence[int] | np.ndarray) -> TrainBatch:
        """The batch of these responses, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        index: dict[Axis, np.ndarray] = {
            "tokens": ragged_index(self.sequence_lengths, rows),
            "responses": rows,
            "response_tokens": ragged_index(self.response_lengths, rows),
        }
        selected = {}
        for declared in fields(self):
            value = getattr(self, declared.name)
            if "axis" in declared.metadata and value is not None:
                chosen = index[declared.metadata["axis"]]
                is_mapping = isinstance(value, Mapping)
                value = {name: array[chosen] for name, array in value.items()} if is_mapping else value[chosen]
            selected[declared.name] = value
        return TrainBatch(**selected)

    def per_token(self) -> dict[str, np.ndarray]:
        """[N] arrays by name: every array along the response tokens, and each response's advantage repeated."""
        arrays = dict(self._response_token_arrays())
        if self.advantages is not None:
            arrays["advantages"] = np.repeat(self.advantages, self.response_lengths)
        return arrays

    def _response_token_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for declared in fields(self):
            value = getattr(self, declared.name)
            if declared.metadata.get("axis") == "response_tokens" and isinstance(value, np.ndarray | Mapping):
                yield from value.items() if isinstance(value, Mapping) else [(declared.name, value)]


def ragged_index(lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Positions of the pieces `rows` in a concatenation of pieces with these lengths."""
    sizes = lengths[rows]
    source_starts = (np.cumsum(lengths) - lengths)[rows]
    target_starts = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum())) + np.repeat(source_starts - target_starts, sizes)


def pack_rollouts(rollouts: Sequence[Rollout]) -> TrainBatch:
    """The batch of these rollouts before the trainer has scored it."""
    kept = [r.kept for r in rollouts if r.kept is not None]
    assert len(kept) in (0, len(rollouts)), "some rollouts lack their kept tokens"
    return TrainBatch(
        token_ids=np.concatenate([part for r in rollouts for part in (r.prompt.token_ids, r.response_ids)]),
        sequence_lengths=np.array([len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts], dtype=np.int64),
        response_lengths=np.array([len(r.response_ids) for r in rollouts], dtype=np.int64),
        temperatures=np.concatenate([r.temperatures for r in rollouts]),
        rollout_log_probs=np.concatenate([r.rollout_log_probs for r in rollouts]),
        kept=KeptTokens.concatenate(kept) if kept else None,
        routes=_pack_routes([r.routes for r in rollouts if r.routes is not None], len(rollouts)),
    )


def _pack_routes(routes: Sequence[np.ndarray], num_rollouts: int) -> np.ndarray | None:
    """The routes of sequences laid end to end, each with a position of unknown ones at its end."""
    if not routes:
        return None
    assert len(routes) == num_rollouts, "some rollouts lack their routes"
    end = np.full((1, *routes[0].shape[1:]), unknown_route(routes[0].dtype), routes[0].dtype)
    return np.concatenate([part for of_rollout in routes for part in (of_rollout, end)])


def pack_groups(groups: Sequence[ScoredGroup]) -> TrainBatch:
    """The batch of the groups' rollouts, one group after another, before the trainer has scored it."""
    return pack_rollouts([rollout for group in groups for rollout in group.rollouts])


def merge_tokens(
    parts: Iterable[tuple[Sequence[int], Mapping[str, np.ndarray]]], lengths_B: np.ndarray
) -> dict[str, np.ndarray]:
    """Per-token values by name, [N] each, in the order of responses of these lengths; every row must occur once."""
    present = list(parts)
    rows = np.concatenate([np.asarray(part_rows, dtype=np.int64) for part_rows, _ in present])
    assert np.array_equal(np.sort(rows), np.arange(len(lengths_B))), "rows are missing or doubled"
    target = ragged_index(lengths_B, rows)
    merged = {}
    for name in present[0][1]:
        values = np.concatenate([columns[name] for _, columns in present])
        merged[name] = np.empty_like(values)
        merged[name][target] = values
    return merged


def merge_scores(parts: Sequence[tuple[list[int], TokenScores] | None], batch: TrainBatch) -> TokenScores:
    """Scores in batch order from the parts of the ranks; every row must occur exactly once."""
    present = [(rows, vars(scores)) for rows, scores in (part for part in parts if part is not None)]
    named = [(rows, {name: a for name, a in arrays.items() if a is not None}) for rows, arrays in present]
    return TokenScores(**merge_tokens(named, batch.response_lengths))
