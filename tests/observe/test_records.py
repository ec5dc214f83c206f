"""Records: what a file holds, what happens to old files, and faults that must not reach the training."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_hapo.config import Config
from megatron_hapo.observe import record_tables
from megatron_hapo.observe.record_schema import SCHEMA, Origin
from megatron_hapo.observe.record_tables import row_groups
from megatron_hapo.observe.records import RecordWriter, updates_with_tokens
from megatron_hapo.observe.token_text import text_and_ends
from megatron_hapo.types import (
    EntropyStats,
    KeptTokens,
    Prompt,
    Rollout,
    Score,
    ScoredGroup,
    TokenScores,
    TrainBatch,
    pack_groups,
)

ORIGIN = Origin(model="m", vocabulary="v")
UPDATED = ("token_advantages", "importance_ratios", "clip_low", "clip_high", "h")


def bytes_tokenizer() -> Tokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


TOKENIZER = bytes_tokenizer()


def decode(ids: tuple[int, ...]) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=False)


def encode(text: str) -> np.ndarray:
    return np.array(TOKENIZER.encode(text).ids, dtype=np.int32)


def make_config(folder: Path, **record: Any) -> Config:
    return Config.model_validate(
        {"name": "run", "output_dir": folder, "steps": 9, "model": {"path": "model"},
         "batch": {"prompts_per_step": 2, "samples_per_prompt": 2, "prompts_per_minibatch": 1},
         "data": {"train": {"type": "arithmetic", "size": 4}}, "record": {"every": 1, **record}}
    )  # fmt: skip


def make_groups(*, cut: bool = False) -> list[ScoredGroup]:
    texts = [("ab", "héllo"), ("日本", "x")]
    groups = []
    for number, pair in enumerate(texts):
        prompt = Prompt(uid=f"p{number}", token_ids=encode("1+1="), ground_truth="2", data_source="arithmetic")
        rollouts = []
        for text in pair:
            ids = encode(text)
            kept = KeptTokens(np.repeat(ids, 2), np.full(len(ids), 2, dtype=np.int32)) if cut else None
            draw = np.random.default_rng(len(ids)).random((2, len(ids)), dtype=np.float32)
            rollouts.append(
                Rollout(prompt=prompt, response_ids=ids, rollout_log_probs=-draw[0], temperatures=1 + draw[1],
                        policy_versions=np.full(len(ids), 3, dtype=np.int32), finish_reason="stop", kept=kept)
            )  # fmt: skip
        groups.append(
            ScoredGroup(
                rollouts,
                [Score(1.0, 1.0, answer="2"), Score(-0.1, 0.0, "timeout", earned=-1 / 3, parts={"exact": 0.1})],
            )
        )
    return groups


def add_step(writer: RecordWriter, step: int, *, cut: bool = False) -> tuple[Any, TokenScores, dict[str, np.ndarray]]:
    groups = make_groups(cut=cut)
    stats = EntropyStats(pivot=0.0, log_max=1.0, log_min=-1.0, rms=0.5, num_tokens=7)
    batch = replace(pack_groups(groups), advantages=np.array([1, -1, 0.5, -0.5], dtype=np.float32), stats=stats)
    count = batch.num_response_tokens
    values = np.random.default_rng(0).random((8, count), dtype=np.float32)
    scores = TokenScores(log_probs=-values[0], rollout_temperature_log_probs=-values[1], entropies=values[2])
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    recorded = sum(len(rollout.response_ids) for rollout in rollouts[: writer.num_responses(step, groups)])
    updated = {name: values[3 + i][:recorded] for i, name in enumerate(UPDATED)}
    collection = {"kept_share": 0.5, "metrics": {"source/sums/accuracy": 0.1}, "prompts": 2 * step}
    writer.add_step(step, groups, batch, scores, updated, collection=collection)
    return batch, scores, updated


def test_a_file_holds_every_token_and_who_wrote_it(tmp_path: Path) -> None:
    with RecordWriter(make_config(tmp_path), decode, ORIGIN, start_step=0) as writer:
        batch, scores, updated = add_step(writer, 2)
    path = tmp_path / "run/rollouts/step_00000002.parquet"
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    assert table["response"].to_pylist() == ["ab", "héllo", "日本", "x"]
    assert table["token_ends"].to_pylist() == [[1, 2], [1, 1, 2, 3, 4, 5], [0, 0, 1, 1, 1, 2], [1]]
    assert table["group"].to_pylist() == [0, 0, 1, 1]
    assert table["sample"].to_pylist() == [0, 1, 0, 1]
    assert table["failure"].to_pylist() == [None, "timeout"] * 2
    assert table["advantage"].to_pylist() == [1, -1, 0.5, -0.5]
    for name, values in {
        **updated, "old_log_probs": scores.log_probs, "entropies": scores.entropies,
        "rollout_temperature_log_probs": scores.rollout_temperature_log_probs,
        "temperatures": batch.temperatures, "rollout_log_probs": batch.rollout_log_probs,
    }.items():  # fmt: skip
        np.testing.assert_array_equal(table[name].combine_chunks().flatten().to_numpy(), values, err_msg=name)
        assert table[name].combine_chunks().value_lengths().to_pylist() == batch.response_lengths.tolist()
    metadata = table.schema.metadata
    assert metadata[b"megatron_hapo.schema"] == b"2"
    job = json.loads(metadata[b"megatron_hapo.job"])
    assert (job["name"], job["step"], job["stats"]["pivot"], job["num_groups"]) == ("run", 2, 0.0, 2)
    assert job["origin"] == {"model": "m", "vocabulary": "v"}
    assert pd.read_parquet(path).uid.tolist() == ["p0", "p0", "p1", "p1"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_groups_are_written_and_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values stay with their responses where the file's row groups begin."""
    with RecordWriter(make_config(tmp_path / "whole"), decode, ORIGIN, start_step=0) as writer:
        add_step(writer, 1)
    monkeypatch.setattr(record_tables, "ROW_GROUP_TOKENS", 1)
    with RecordWriter(make_config(tmp_path / "split"), decode, ORIGIN, start_step=0) as writer:
        add_step(writer, 1)
    whole, split = (tmp_path / name / "run/rollouts/step_00000001.parquet" for name in ("whole", "split"))
    assert [pq.ParquetFile(path).num_row_groups for path in (whole, split)] == [1, 2]
    assert pq.read_table(split).equals(pq.read_table(whole), check_metadata=True)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([], []), ([9], [(0, 1)]), ([4, 4, 4, 9, 1], [(0, 2), (2, 3), (3, 4), (4, 5)]), ([8, 0, 0], [(0, 3)])],
)
def test_row_groups_hold_whole_groups(
    monkeypatch: pytest.MonkeyPatch, tokens: list[int], expected: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(record_tables, "ROW_GROUP_TOKENS", 8)
    assert list(row_groups(tokens)) == expected


def test_an_evaluation_has_no_values_of_the_trainer(tmp_path: Path) -> None:
    with RecordWriter(make_config(tmp_path, groups=1), decode, ORIGIN, start_step=0) as writer:
        writer.add_evaluation(0, make_groups())
    table = pq.read_table(tmp_path / "run/rollouts/eval_00000000.parquet")
    assert table["response"].to_pylist() == ["ab", "héllo"]
    assert all(table[name].null_count == 2 for name in (*UPDATED, "entropies", "old_log_probs", "advantage"))
    assert table["temperatures"].null_count == 0


def test_old_files_make_room_and_a_resumed_run_replaces_later_ones(tmp_path: Path) -> None:
    folder = tmp_path / "run/rollouts"

    def names() -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    for step in range(1, 5):
        with RecordWriter(make_config(tmp_path, keep=3), decode, ORIGIN, start_step=step - 1) as writer:
            add_step(writer, step)
    assert names() == [f"step_0000000{step}.parquet" for step in (2, 3, 4)]
    (folder / ".step_00000003.parquet.partial").touch()
    (folder / "notes.parquet").touch()
    with RecordWriter(make_config(tmp_path), decode, ORIGIN, start_step=3):
        pass
    assert names() == ["notes.parquet", "step_00000002.parquet", "step_00000003.parquet"]
    with RecordWriter(make_config(tmp_path, max_gigabytes=1e-6), decode, ORIGIN, start_step=3) as writer:
        add_step(writer, 4)
    assert names() == ["notes.parquet", "step_00000004.parquet"]
    with RecordWriter(make_config(tmp_path), decode, ORIGIN, start_step=0):
        pass
    assert names() == ["notes.parquet"]


def test_a_fault_is_told_once_and_later_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, failures = pq.ParquetWriter.write_table, iter(range(2))

    def full_disk(*arguments: Any, **options: Any) -> None:
        if next(failures, math.inf) < 2:
            raise OSError(28, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full_disk)
    told: set[str] = set()
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            with RecordWriter(make_config(tmp_path), decode, ORIGIN, start_step=step - 1) as writer:
                writer._told = told
                add_step(writer, step)
    assert [path.name for path in (tmp_path / "run/rollouts").iterdir()] == ["step_00000003.parquet"]
    assert len(caplog.messages) == 1
    assert "No space left on device" in caplog.messages[0]


@pytest.mark.parametrize("text", ["", "plain", "日本 العربية हिन्दी 😀👩‍👩‍👧", "\ufffd?", "\n\t é"])
def test_token_ends_count_complete_characters(text: str) -> None:
    ids = encode(text).tolist()
    decoded, ends = text_and_ends(ids, decode)
    assert decoded == text
    assert len(ends) == len(ids)
    data = text.encode()
    for count, end in enumerate(ends[:-1], start=1):
        complete = len(data[:count].decode(errors="ignore"))
        # A replacement character that was really sampled looks complete only when the next one follows.
        assert end == complete or ("\ufffd" in text and end == complete - 1)
    assert not ends or ends[-1] == len(text)


def test_invalid_bytes_neither_stop_nor_shift_the_text() -> None:
    ids = [int(encode("é")[1])] * 40 + encode("ok").tolist()
    text, ends = text_and_ends(ids, decode)
    assert text.endswith("ok")
    assert ends == sorted(ends)
    assert ends[-1] == len(text)


class EchoTrainer:
    """Returns each token's rollout log-prob as what the update used of it, from two ranks in a mixed order."""

    def __init__(self) -> None:
        self.kept: list[bool] = []

    def update(self, batch: TrainBatch, *, step: int, keep_tokens: bool = False) -> dict[str, float]:
        self.batch = batch
        self.kept.append(keep_tokens)
        return {"loss": float(step)}

    def updated_tokens(self, rows: list[int]) -> list[tuple[list[int], dict[str, np.ndarray]]]:
        shares = [rows[1::2], rows[::2]]
        return [(share, {"h": self.batch.select(share).rollout_log_probs}) for share in shares]


@pytest.mark.parametrize(("num_rows", "kept"), [(4, [True, True]), (2, [True, False]), (0, [False, False])])
def test_values_of_scattered_minibatches_come_back_in_batch_order(num_rows: int, kept: list[bool]) -> None:
    batch = pack_groups(make_groups())
    rows = [np.array([1, 3]), np.array([2, 0])] if num_rows == 4 else [np.array([1, 0]), np.array([3, 2])]
    trainer: Any = EchoTrainer()
    metrics, tokens = updates_with_tokens(
        trainer, [batch.select(part) for part in rows], rows, batch.response_lengths[:num_rows], step=1
    )
    assert metrics == [{"loss": 1.0}] * 2
    assert trainer.kept == kept
    if num_rows == 0:
        assert tokens == {}
    else:
        np.testing.assert_array_equal(tokens["h"], batch.select(range(num_rows)).rollout_log_probs)
