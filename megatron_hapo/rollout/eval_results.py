"""The results of `megatron-hapo eval` on the disk: every response with its score, one JSON line each.

A file holds whole problems, in the order in which they were evaluated. Beside it are the settings that its responses
depend on: an interrupted evaluation goes on only with the same ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_hapo.errors import HapoError
from megatron_hapo.rollout.eval_statistics import ProblemResult
from megatron_hapo.rollout.evaluation import Evaluated, EvaluationSet
from megatron_hapo.types import ScoredGroup

UNNAMED = "eval"
"""What the files of a single evaluation set are called."""


class ResultFile:
    """The responses of one model to one evaluation set.

    Args:
        folder: of the model's results.
        settings: everything that the responses and their scores depend on, as JSON values.
    Raises:
        HapoError: the folder has responses that were made with other settings, or that cannot be read.
    """

    def __init__(self, folder: Path, evaluated: EvaluationSet, settings: Mapping[str, Any]):
        name = evaluated.name or UNNAMED
        self.path = folder / f"{name}.jsonl"
        self._set = evaluated
        self._settings = json.loads(json.dumps({**settings, "sampling": asdict(evaluated.sampling)}))
        self._settings_path = folder / f"{name}.settings.json"
        self._rows: dict[str, list[dict[str, Any]]] = {}
        if self.path.exists():
            self._check_settings()
            self._read()

    def missing(self) -> list[int]:
        """Which of the set's prompts have not been evaluated, by number."""
        return [number for number, prompt in enumerate(self._set.prompts) if prompt.uid not in self._rows]

    def add(self, groups: Sequence[ScoredGroup], texts: Iterable[str]) -> None:
        """Append the responses of these groups; they are on the disk when this returns.

        Args:
            texts: of the responses, one group after another.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._settings_path.write_text(json.dumps(self._settings, indent=2) + "\n")
        text = iter(texts)
        rows = [_row(group, sample, next(text)) for group in groups for sample in range(len(group.rollouts))]
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        for row in rows:
            self._rows.setdefault(row["uid"], []).append(row)

    def evaluated(self) -> list[Evaluated]:
        """What the statistics need, in the order of the set's prompts; all of them must have been evaluated."""
        return [_evaluated(prompt.uid, self._rows[prompt.uid]) for prompt in self._set.prompts]

    def _check_settings(self) -> None:
        try:
            before = _flat(json.loads(self._settings_path.read_text()))
        except (OSError, ValueError):
            before = {}
        different = [
            f"{key} {_short(before[key])} -> {_short(value)}" if key in before else key
            for key, value in _flat(self._settings).items()
            if key not in before or before[key] != value
        ]
        if different:
            raise HapoError(
                f"{self.path} holds responses that were made with other settings ({', '.join(different[:3])}); remove "
                "it, or choose another folder with --output"
            )

    def _read(self) -> None:
        """Read the problems whose responses are all there. What an interruption left of others is removed."""
        rows, damaged = {}, 0
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
                rows.setdefault(row["uid"], []).append(row)
                _evaluated(row["uid"], [row])
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += 1
        samples = self._set.sampling.samples
        self._rows = {
            uid: group for uid, group in rows.items() if [r.get("sample") for r in group] == [*range(samples)]
        }
        if damaged > 1:  # an interruption can cut one line short
            raise HapoError(
                f"{self.path}: {damaged} lines are damaged; remove it, or choose another folder with --output"
            )
        if damaged or len(self._rows) < len(rows):
            temporary = self.path.with_suffix(".partial")
            kept = [row for group in self._rows.values() for row in group]
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
            temporary.replace(self.path)


def _row(group: ScoredGroup, sample: int, text: str) -> dict[str, Any]:
    rollout, score = group.rollouts[sample], group.scores[sample]
    prompt = rollout.prompt
    return {
        "uid": prompt.uid,
        "sample": sample,
        "data_source": prompt.data_source,
        "ground_truth": prompt.ground_truth,
        "response": text,
        "answer": score.answer,
        "correct": score.correct,
        "correctness": score.correctness,
        "reward_parts": dict(score.parts),
        "failure": score.failure,
        "finish_reason": rollout.finish_reason,
        "num_tokens": len(rollout.response_ids),
    }


def _evaluated(uid: str, rows: Sequence[Mapping[str, Any]]) -> Evaluated:
    return Evaluated(
        ProblemResult(uid, tuple(bool(row["correct"]) for row in rows), tuple(row["answer"] for row in rows)),
        tuple(int(row["num_tokens"]) for row in rows),
        tuple(row["finish_reason"] == "length" for row in rows),
        tuple(row.get("reward_parts", {}) for row in rows),  # files of older versions have none
    )


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """The values of nested settings by their dotted keys."""
    if not isinstance(value, Mapping):
        return {key: value}
    parts = (_flat(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items())
    return {name: leaf for part in parts for name, leaf in part.items()}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
