"""Scores a file of responses by a config's rewards, without a model (`megatron-hapo score`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hapo.config import Config
from megatron_hapo.errors import DataError
from megatron_hapo.reward.composition import Earned
from megatron_hapo.reward.pool import Scorers
from megatron_hapo.types import Prompt


@dataclass(frozen=True)
class ScoredFile:
    """The responses of a file with what they earned, in the file's order."""

    rows: Sequence[Mapping[str, Any]]
    results: Sequence[Earned]

    def summary(self) -> dict[str, float]:
        """Means over all responses, under the names of a run's metrics."""
        outcomes = [result.outcome for result in self.results]
        names = sorted({name for outcome in outcomes for name in outcome.parts})
        return {
            "responses": len(outcomes),
            "reward/mean": float(np.mean([result.reward for result in self.results])),
            "reward/accuracy": float(np.mean([outcome.correctness >= 1 for outcome in outcomes])),
            "reward/failures": sum(outcome.failure is not None for outcome in outcomes),
            **{
                f"reward/{name}": float(np.mean([o.parts[name] for o in outcomes if name in o.parts])) for name in names
            },
        }

    def lines(self) -> Iterator[str]:
        """The rows as JSON, with `reward`, `correctness`, `reward_parts`, and the `failure` with its reason if any."""
        for row, result in zip(self.rows, self.results, strict=True):
            outcome = result.outcome
            scored = {
                "reward": result.reward,
                "correctness": outcome.correctness,
                "reward_parts": dict(outcome.parts),
                "failure": f"{outcome.failure}: {outcome.reason}" if outcome.failure else None,
            }
            yield json.dumps({**row, **scored})


def score_file(config: Config, path: Path) -> ScoredFile:
    """The scores of the responses in a JSONL file; the overlong penalty, which needs tokens, is left out.

    A row has `response` and `ground_truth` or `answer`, perhaps `data_source`, `prompt` for judges, and any other
    column that a reward of the user's own reads. The responses that `megatron-hapo eval` writes are such files.

    Raises:
        DataError: the file cannot be read, or a row lacks a column.
        RewardError: a scorer cannot be used.
    """
    rows = _read_rows(path)
    prompts = [_prompt(path, number, row) for number, row in enumerate(rows)]
    scorers = Scorers(config.reward, tuple(config.reward.used_scorers(config.data)))
    try:
        return ScoredFile(rows, scorers.score(prompts, [row["response"] for row in rows]))
    finally:
        scorers.close()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path}: line {number} is not JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("response"), str):
            raise DataError(f'{path}: line {number} must be an object with the string "response"')
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: has no rows")
    return rows


def _prompt(path: Path, number: int, row: Mapping[str, Any]) -> Prompt:
    truth = row.get("ground_truth", row.get("answer"))
    if isinstance(truth, bool) or not isinstance(truth, str | int | float):
        raise DataError(f"{path}: row {number} must have ground_truth or answer, a string or a number")
    source = row.get("data_source", "")
    if not isinstance(source, str):
        raise DataError(f"{path}: row {number}: data_source must be a string")
    columns = {name: value for name, value in row.items() if name != "response"}
    question = columns.get("prompt", "")
    no_tokens = np.zeros(0, dtype=np.int32)
    return Prompt(
        uid=str(number), token_ids=no_tokens, ground_truth=str(truth), data_source=source, columns=columns,
        question=question if isinstance(question, str) else "",
    )  # fmt: skip
