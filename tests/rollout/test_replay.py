"""Replay: the groups that records give back, and records that cannot be replayed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_hapo.config import Config
from megatron_hapo.errors import DataError
from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.observe.record_schema import Origin, vocabulary_fingerprint
from megatron_hapo.observe.records import RecordWriter
from megatron_hapo.rollout.replay import RecordedGroups
from megatron_hapo.types import Sampling, ScoredGroup
from tests.observe.test_records import ORIGIN, TOKENIZER, add_step, decode, make_config, make_groups

VOCABULARY = 256


def recorded(folder: Path, *, steps: int = 3, cut: bool = False, **record: Any) -> Path:
    """The records of a run."""
    config = make_config(folder, **record)
    for step in range(1, steps + 1):
        with RecordWriter(config, decode, ORIGIN, start_step=step - 1) as writer:
            add_step(writer, step, cut=cut)
    return config.run_dir / "rollouts"


def replay_config(folder: Path, **changes: Any) -> Config:
    values = make_config(folder.parent).model_dump()
    return Config.model_validate(values | {"name": "again", "steps": 3, "replay": folder} | changes)


def source(folder: Path, origin: Origin = ORIGIN, **changes: Any) -> RecordedGroups:
    return RecordedGroups(replay_config(folder, **changes), origin, vocab_size=VOCABULARY)


def first_step(replayed: RecordedGroups) -> list[ScoredGroup]:
    """The groups of step 1, after the checks of the start."""
    replayed.check(first_step=0)
    return replayed.collect(1, Sampling(samples=2, temperature=1, max_response_tokens=9, seed=0), StepClock()).groups


def test_groups_come_back_bit_for_bit(tmp_path: Path) -> None:
    """Scores too, which are not exact in single precision, and what else the step's metrics follow from."""
    replayed = source(recorded(tmp_path))
    replayed.check(first_step=0)
    collected = replayed.collect(2, Sampling(samples=2, temperature=1, max_response_tokens=9, seed=0), StepClock())
    for group, want in zip(collected.groups, make_groups(), strict=True):
        assert group.scores == want.scores
        assert group.informative == want.informative
        for rollout, wanted in zip(group.rollouts, want.rollouts, strict=True):
            assert rollout.prompt is group.rollouts[0].prompt
            for name, value in {**vars(wanted.prompt), **vars(wanted)}.items():
                if isinstance(value, np.ndarray):
                    own = getattr(rollout.prompt if name == "token_ids" else rollout, name)
                    assert own.dtype == value.dtype
                    np.testing.assert_array_equal(own, value)
            assert (rollout.prompt.uid, rollout.finish_reason) == (wanted.prompt.uid, "stop")
    assert (collected.kept_share, collected.metrics) == (0.5, {"source/sums/accuracy": 0.1})
    assert replayed.state() == 4


def test_tokens_that_a_cut_kept_come_back(tmp_path: Path) -> None:
    groups = first_step(source(recorded(tmp_path, cut=True)))
    for group, want in zip(groups, make_groups(cut=True), strict=True):
        for rollout, wanted in zip(group.rollouts, want.rollouts, strict=True):
            assert rollout.kept is not None
            assert wanted.kept is not None
            np.testing.assert_array_equal(rollout.kept.token_ids, wanted.kept.token_ids)
            np.testing.assert_array_equal(rollout.kept.lengths, wanted.kept.lengths)


@pytest.mark.parametrize(
    ("lengths", "ids"), [([[1, 1]] * 4, [[1, 1]] * 4), ([[2] * 2, [2] * 6, [2] * 6, [2]], [[1] * 3, [1], [1], [1]])]
)
def test_kept_tokens_that_do_not_fit_are_refused(tmp_path: Path, lengths: list[Any], ids: list[Any]) -> None:
    folder = recorded(tmp_path, cut=True)
    path = folder / "step_00000001.parquet"
    table = set_column("kept_lengths", lengths)(pq.read_table(path))
    pq.write_table(set_column("kept_ids", ids)(table), path)
    with pytest.raises(DataError, match="do not fit the responses"):
        first_step(source(folder))


def test_rows_may_lie_in_any_order(tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    path = folder / "step_00000001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([3, 1, 0, 2]), path)
    groups = first_step(source(folder))
    np.testing.assert_array_equal(groups[0].rollouts[1].response_ids, make_groups()[0].rollouts[1].response_ids)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"steps": 5}, r"no records of 2 of the steps 1 to 5: 4, 5; .*record.every=1.*set steps to at most 3"),
        ({"rollout": {"temperature": 0.5}}, "was sampled with rollout.temperature=1, but this run has 0.5"),
        ({"batch": {"prompts_per_step": 4}}, "with 2 groups, but batch.prompts_per_step is 4"),
        ({"batch": {"prompts_per_step": 2, "samples_per_prompt": 3}}, r"has 4 responses, but .* = 2 \* 3"),
        ({"rollout": {"max_response_tokens": 3}}, "response of 6 tokens, but rollout.max_response_tokens is 3"),
    ],
)  # fmt: skip
def test_records_of_another_run_are_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    if "batch" in changes:
        changes = {"batch": {"prompts_per_minibatch": 1} | changes["batch"]}
    replayed = source(recorded(tmp_path), **changes)
    with pytest.raises(DataError, match=fault) as raised:
        first_step(replayed)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "fault"), [({"model": "x"}, "from another model than model"), ({"vocabulary": "x"}, "another tokenizer")]
)
def test_records_of_another_model_are_refused(tmp_path: Path, change: dict[str, str], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        source(recorded(tmp_path), replace(ORIGIN, **change)).check(first_step=0)


def test_records_of_a_part_of_a_step_are_refused(tmp_path: Path) -> None:
    replayed = source(recorded(tmp_path, groups=1))
    with pytest.raises(DataError, match=r"has 1 of the step's 2 groups; the recorded run needs record.groups=null"):
        first_step(replayed)


def test_records_that_lack_the_engine_s_experts_are_refused(tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    path = folder / "step_00000001.parquet"
    table = pq.read_table(path)
    job = json.loads(table.schema.metadata[b"megatron_hapo.job"])
    assert job["replayed_routes"] is False
    metadata = {"megatron_hapo.schema": "2", "megatron_hapo.job": json.dumps(job | {"replayed_routes": True})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(DataError, match=r"record the run again with rollout\.replay_routes=false"):
        first_step(source(folder))


def test_only_the_steps_still_to_come_are_needed(tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    (folder / "step_00000001.parquet").unlink()
    source(folder).check(first_step=1)
    with pytest.raises(DataError, match="no records of 1 of the steps 1 to 3: 1;"):
        source(folder).check(first_step=0)


def drop(table: pa.Table, name: str) -> pa.Table:
    return table.drop_columns([name])


def set_column(name: str, values: list[Any], kind: pa.DataType | None = None) -> Any:
    return lambda table: table.set_column(
        table.schema.get_field_index(name), name, pa.array(values, kind or table.schema.field(name).type)
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda table: drop(table, "temperatures"), "columns temperatures are missing"),
        (lambda table: drop(table, "earned"), "earned"),
        (set_column("reward", ["1"] * 4, pa.string()), "reward is string, but must be double"),
        (set_column("reward", [1.0, float("nan"), 0.0, 0.0]), "reward is not finite"),
        (set_column("finish_reason", ["stop", "x", "stop", "stop"]), "finish_reason has the unknown value 'x'"),
        (set_column("reward_parts", [[None], [], [], []]), "parts without a name or value"),
        (set_column("reward_parts", [[{"name": "a", "value": None}], [], [], []]), "parts without a name or value"),
        (set_column("uid", ["a", None, "b", "b"]), "uid is missing in some rows"),
        (set_column("temperatures", [[1.0]] * 4), "temperatures has another number of values"),
        (set_column("prompt_ids", [[1], [], [1], [1]]), "a prompt without tokens"),
        (set_column("response_ids", [[1, 999], *[[1] * 6] * 2, [1]]), "token ids that the model, of 256, lacks"),
        (lambda table: table.slice(1), "has 3 responses"),
        (lambda table: table.replace_schema_metadata({"megatron_hapo.schema": "1"}), "records of schema 1"),
        (lambda table: table.replace_schema_metadata({"megatron_hapo.schema": "2"}), "metadata .* are damaged: step"),
        (
            lambda table: table.replace_schema_metadata(
                {"megatron_hapo.schema": "2", "megatron_hapo.job": json.dumps({"step": 1, "collection": [1]})}
            ),
            "metadata .* are damaged",
        ),
    ],
)  # fmt: skip
def test_damaged_records_are_refused(tmp_path: Path, change: Any, fault: str) -> None:
    folder = recorded(tmp_path)
    path = folder / "step_00000001.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    replayed = source(folder)
    with pytest.raises(DataError, match=fault):
        first_step(replayed)


def test_a_vocabulary_is_told_from_another() -> None:
    class Tokenizer:
        def __init__(self, **tokens: int):
            self.get_vocab = lambda: tokens

    assert vocabulary_fingerprint(Tokenizer(a=0, b=1)) == vocabulary_fingerprint(Tokenizer(b=1, a=0))
    assert vocabulary_fingerprint(Tokenizer(a=0, b=1)) != vocabulary_fingerprint(Tokenizer(a=1, b=0))
    assert len(vocabulary_fingerprint(TOKENIZER)) == 32
