"""The rows of records, and how they are laid out in a file: a table for every few groups."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hapo.config import Config
from megatron_hapo.observe.record_schema import JOB_KEY, MEASURES, SCHEMA, SCHEMA_VERSION, VERSION_KEY, Origin
from megatron_hapo.observe.token_text import Decode, text_and_ends
from megatron_hapo.types import KeptTokens, Rollout, ScoredGroup

ROW_GROUP_TOKENS = 1 << 18
"""Response tokens that are encoded at once; a single group may have more."""
_STREAMS = [f"{name}.list.element" for name in MEASURES]
_DICTIONARIES = [
    f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
    for field in SCHEMA if field.name not in MEASURES and not pa.types.is_floating(field.type)
]  # fmt: skip
"""Paths of columns in a file, for parquet's encodings."""


class RecordTables:
    """Makes the rows of the records of one run.

    Args:
        decode: token ids to text, with special tokens.
        origin: the model that the run started from.
    """

    def __init__(self, config: Config, decode: Decode, origin: Origin):
        self._config, self._origin = config, origin
        self._decode = lru_cache(maxsize=1 << 16)(decode)

    def of(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        details: Mapping[str, Any],
        advantages_B: np.ndarray | None = None,
        measures: Mapping[str, np.ndarray] | None = None,
    ) -> Iterator[pa.Table]:
        """Tables of a few groups each, so that neither writer nor reader need hold a whole step.

        Args:
            details: what the metadata say besides the run's settings, as JSON values.
            advantages_B: of the responses, in order; None: not known.
            measures: values of the response tokens by column; others are null.
        """
        measures = measures or {}
        schema = SCHEMA.with_metadata(self._metadata(step, details))
        first_row = first_token = 0
        for first, last in row_groups([sum(len(r.response_ids) for r in group.rollouts) for group in groups]):
            some = groups[first:last]
            num_rows = sum(len(group.rollouts) for group in some)
            num_tokens = sum(len(rollout.response_ids) for group in some for rollout in group.rollouts)
            yield self._table(
                step, some, None if advantages_B is None else advantages_B[first_row : first_row + num_rows],
                {name: values_N[first_token : first_token + num_tokens] for name, values_N in measures.items()},
                schema, first_group=first,
            )  # fmt: skip
            first_row, first_token = first_row + num_rows, first_token + num_tokens

    def _table(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        advantages_B: np.ndarray | None,
        measures: Mapping[str, np.ndarray],
        schema: pa.Schema,
        *,
        first_group: int,
    ) -> pa.Table:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = [score for group in groups for score in group.scores]
        texts = [text_and_ends(rollout.response_ids.tolist(), self._decode) for rollout in rollouts]
        prompts = {
            group: self._decode(tuple(g.rollouts[0].prompt.token_ids.tolist())) for group, g in enumerate(groups)
        }
        places = [(group, sample) for group, g in enumerate(groups) for sample in range(len(g.rollouts))]
        columns: dict[str, Any] = {
            "step": [step] * len(rollouts),
            "group": [first_group + group for group, _ in places],
            "sample": [sample for _, sample in places],
            "uid": [rollout.prompt.uid for rollout in rollouts],
            "data_source": [rollout.prompt.data_source for rollout in rollouts],
            "prompt": [prompts[group] for group, _ in places],
            "response": [text for text, _ in texts],
            "ground_truth": [rollout.prompt.ground_truth for rollout in rollouts],
            "answer": [score.answer for score in scores],
            "prompt_ids": _lists([rollout.prompt.token_ids for rollout in rollouts]),
            "response_ids": _lists([rollout.response_ids for rollout in rollouts]),
            "token_ends": _lists([np.asarray(ends, dtype=np.int32) for _, ends in texts]),
            "reward": [score.reward for score in scores],
            "earned": [score.earned for score in scores],
            "correctness": [score.correctness for score in scores],
            "reward_parts": [[{"name": n, "value": v} for n, v in score.parts.items()] for score in scores],
            "finish_reason": [rollout.finish_reason for rollout in rollouts],
            "failure": [score.failure for score in scores],
            "advantage": advantages_B,
            "policy_versions": _lists([rollout.policy_versions for rollout in rollouts]),
            "temperatures": _lists([rollout.temperatures for rollout in rollouts]),
            "rollout_log_probs": _lists([rollout.rollout_log_probs for rollout in rollouts]),
            **_kept([rollout.kept for rollout in rollouts]),
            **{name: _cut(values_N, rollouts) for name, values_N in measures.items()},
        }
        arrays = [_array(columns.get(field.name), field.type, len(rollouts)) for field in SCHEMA]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _metadata(self, step: int, details: Mapping[str, Any]) -> dict[str, str]:
        config = self._config
        job = {
            "name": config.name,
            "step": step,
            "model": str(config.model.path),
            "origin": asdict(self._origin),
            "temperature": config.rollout.temperature,
            "algorithm": config.algorithm.model_dump(mode="json"),
            **details,
        }
        return {VERSION_KEY: SCHEMA_VERSION, JOB_KEY: json.dumps(job)}


def write_row_groups(path: Path, tables: Iterable[pa.Table]) -> None:
    """Writes tables of the records' schema as the row groups of one file, which has the first one's metadata.

    Readers of one prompt's responses read its row group only. Dictionaries would only enlarge columns of floats.
    """
    with ExitStack() as stack:
        writer = None
        for table in tables:
            if writer is None:
                how = {"use_dictionary": _DICTIONARIES, "use_byte_stream_split": _STREAMS, "compression": "zstd"}
                writer = stack.enter_context(pq.ParquetWriter(path, table.schema, **how))
            writer.write_table(table, row_group_size=max(1, len(table)))


def row_groups(tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last + 1 group of each row group, for groups with these numbers of response tokens."""
    first = size = 0
    for group, count in enumerate(tokens):
        if group > first and size + count > ROW_GROUP_TOKENS:
            yield first, group
            first, size = group, 0
        size += count
    if tokens:
        yield first, len(tokens)


def _lists(parts: Sequence[np.ndarray]) -> pa.Array:
    """One list per response."""
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(parts)))


def _kept(kept: Sequence[KeptTokens | None]) -> dict[str, pa.Array]:
    """The columns of kept tokens; none if the choice was not cut."""
    present = [tokens for tokens in kept if tokens is not None]
    if len(present) < len(kept) or not present:
        return {}
    return {
        "kept_lengths": _lists([tokens.lengths for tokens in present]),
        "kept_ids": _lists([tokens.token_ids for tokens in present]),
    }


def _cut(values_N: np.ndarray, rollouts: Sequence[Rollout]) -> pa.Array:
    """One list per response of values that lie end to end."""
    offsets = np.cumsum([0, *(len(rollout.response_ids) for rollout in rollouts)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values_N))


def _array(values: Any, kind: pa.DataType, length: int) -> pa.Array:
    if values is None:
        return pa.nulls(length, kind)
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)
