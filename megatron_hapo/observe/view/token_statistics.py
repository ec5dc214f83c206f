"""What the tokens of one file of records have in common: forking tokens, distributions and scales of colour."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_hapo.observe.view.record_files import RecordFile

FORKING_TOKENS = 50
FOLLOWERS = 5
EXAMPLES = 3
BINS = 48
QUANTILES = 10

Measures = dict[str, np.ndarray]


def measures(file: RecordFile) -> Measures:
    """What the pages colour tokens by: [N] float32 each, NaN where not recorded."""
    entropy, temperature, h, advantage, ratio, engines, trainers = file.tokens(
        "entropies", "temperatures", "h", "token_advantages", "importance_ratios", "rollout_log_probs",
        "rollout_temperature_log_probs",
    )  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "entropy": entropy, "temperature": temperature, "h": h, "advantage": advantage,
            "log_ratio": np.log(ratio), "surprisal": -engines, "mismatch": engines - trainers,
        }  # fmt: skip


def scales(values: Measures) -> dict[str, list[float] | None]:
    """The 1st and 99th percentile of each measure; None if nothing was recorded."""
    return {name: _percentiles(array) for name, array in values.items()}


def _percentiles(values: np.ndarray) -> list[float] | None:
    finite = values[np.isfinite(values)]
    return [float(value) for value in np.percentile(finite, [1, 99])] if finite.size else None


def response_means(values: np.ndarray, lengths: np.ndarray) -> list[float | None]:
    """The mean over each response's tokens; None for a response without recorded values."""
    known = np.isfinite(values)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    counts = np.bincount(rows, known, minlength=len(lengths))
    sums = np.bincount(rows, np.where(known, values, 0.0), minlength=len(lengths))
    return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]


def token_statistics(file: RecordFile) -> dict[str, Any]:
    """Forking tokens, the distributions of entropy and h, and what was clipped by quantile of entropy."""
    values = measures(file)
    return {
        "num_tokens": int(file.lengths.sum()),
        "scales": scales(values),
        "entropy": _histogram(np.log10(np.maximum(values["entropy"], 1e-8))),
        "h": _histogram(values["h"]),
        "quantiles": _by_quantile(file, values),
        "forking": _forking_tokens(file, values),
    }


def _histogram(values: np.ndarray) -> dict[str, list[float]] | None:
    """Edges of equal bins and the share of the tokens in each; None without values."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    counts, edges = np.histogram(finite, bins=BINS)
    return {"edges": [float(edge) for edge in edges], "shares": [float(count) / finite.size for count in counts]}


def clipped(file: RecordFile) -> tuple[np.ndarray, np.ndarray]:
    """[N] bool each: tokens whose ratio is below 1 - clip_low with a negative advantage, or above 1 + clip_high with a
    positive one, so that their gradient was zero at the last update that saw them."""
    ratios, advantages, low, high = file.tokens("importance_ratios", "token_advantages", "clip_low", "clip_high")
    return (ratios < 1 - low) & (advantages < 0), (ratios > 1 + high) & (advantages > 0)


def _by_quantile(file: RecordFile, values: Measures) -> list[dict[str, float | None]]:
    """Ten equal parts of the tokens, in the order of their entropy: means, the shares that were clipped, and the shares
    of the sum of |advantage| over all tokens that lie on its positive and negative advantages."""
    entropy = values["entropy"]
    known = np.flatnonzero(np.isfinite(entropy))
    order = known[np.argsort(entropy[known], kind="stable")]
    low, high = clipped(file)
    updated = ~np.isnan(values["log_ratio"])
    advantages = np.nan_to_num(values["advantage"].astype(np.float64))
    mass = np.abs(advantages).sum()
    parts = []
    for part in np.array_split(order, min(QUANTILES, len(order)) or 1):
        seen = part[updated[part]]
        means = {name: _mean(values[name][part]) for name in ("entropy", "temperature", "h", "advantage", "mismatch")}
        clipping = {"low": _mean(low[seen]), "high": _mean(high[seen])}
        up, down = (np.clip(sign * advantages[part], 0, None).sum() for sign in (1, -1))
        masses = {"up": float(up / mass) if mass else None, "down": float(down / mass) if mass else None}
        parts.append({**means, **clipping, **masses})
    return parts if len(order) else []


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else None


def _forking_tokens(file: RecordFile, values: Measures) -> list[dict[str, Any]]:
    """The token ids with the highest mean entropy where they were sampled, among those that are not rare.

    Rare tokens have noisy means: an id must occur at least 3 times, and at least once in 20,000 tokens.
    """
    (ids,), entropy = file.tokens("response_ids"), values["entropy"]
    known = np.isfinite(entropy)
    kinds, inverse = np.unique(ids, return_inverse=True)
    counts = np.bincount(inverse, known)
    sums = np.bincount(inverse, np.where(known, entropy, 0.0))
    means = sums / np.maximum(counts, 1)
    frequent = np.flatnonzero(counts >= max(3, len(ids) / 20_000))
    top = frequent[np.argsort(-means[frequent], kind="stable")][:FORKING_TOKENS]
    texts = _Texts(file)
    rows = np.repeat(np.arange(len(file.lengths)), file.lengths)
    found = []
    for kind in top:
        positions = np.flatnonzero((inverse == kind) & known)
        with_next = positions[positions + 1 < len(ids)]
        following = with_next[rows[with_next] == rows[with_next + 1]] + 1
        next_ids, first, next_counts = np.unique(ids[following], return_index=True, return_counts=True)
        most = np.argsort(-next_counts, kind="stable")[:FOLLOWERS]
        spread = positions[np.linspace(0, len(positions) - 1, min(EXAMPLES, len(positions))).astype(int)]
        found.append(
            {
                "id": int(kinds[kind]),
                "text": texts.at(int(positions[0])),
                "count": len(positions),
                "entropy": float(means[kind]),
                "temperature": _mean(values["temperature"][positions]),
                "h": _mean(values["h"][positions]),
                "followers": [
                    {
                        "id": int(next_ids[i]),
                        "text": texts.at(int(following[first[i]])),
                        "count": int(next_counts[i]),
                        "entropy": _mean(entropy[following[ids[following] == next_ids[i]]]),
                    }
                    for i in most
                ],
                "examples": [texts.place(int(position)) for position in spread],
            }
        )
    return found


class _Texts:
    """The text of single tokens, cut from the responses."""

    def __init__(self, file: RecordFile):
        self._responses = file.column("response")
        self._groups, self._samples = file.column("group"), file.column("sample")
        (self._ends,) = file.tokens("token_ends")
        self._starts = np.cumsum(file.lengths) - file.lengths
        self._last_of = np.cumsum(file.lengths)

    def _row(self, position: int) -> int:
        return int(np.searchsorted(self._last_of, position, side="right"))

    def at(self, position: int) -> str:
        """The characters that are complete after this token and were not before; empty within a character."""
        row = self._row(position)
        begin = int(self._ends[position - 1]) if position > self._starts[row] else 0
        return self._responses[row][begin : int(self._ends[position])]

    def place(self, position: int) -> list[int]:
        """Group, sample and index in the response of this token."""
        row = self._row(position)
        return [int(self._groups[row]), int(self._samples[row]), int(position - self._starts[row])]
