"""Rows of every file format as problems: columns, answers, templates, the Hub, and rows that cannot be used."""

from __future__ import annotations

import csv
import datetime
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_hapo.config import FileData
from megatron_hapo.data.hub_rows import HubName, parse_hub_name
from megatron_hapo.data.problems import Problem, file_faults, problems
from megatron_hapo.data.prompts import load_prompts, load_tokenizer
from megatron_hapo.data.rows import InvalidRow
from megatron_hapo.errors import DataError

ROWS = [{"question": "1+1", "answer": "2", "level": "a"}, {"question": "2+2", "answer": "4", "level": "b"}]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, rows: list[dict]) -> None:
    path.write_text("\n " + json.dumps(rows, indent=1))


def write_parquet(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, list[dict]], None]] = {
    "rows.jsonl": write_jsonl,
    "rows.json": write_json,
    "rows.parquet": write_parquet,
    "rows.csv": write_csv,
}


def file_data(path: Any, **settings: Any) -> FileData:
    return FileData.model_validate({"type": "file", "path": path, "columns": {"prompt": "question"}, **settings})


def valid(source: FileData) -> list[Problem]:
    found = list(problems(source))
    assert not [row for row in found if isinstance(row, InvalidRow)], found
    return [row for row in found if isinstance(row, Problem)]


def reasons(source: FileData) -> list[str]:
    return [f"{row.row}: {row.reason}" for row in problems(source) if isinstance(row, InvalidRow)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_problems(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    first, second = valid(file_data(tmp_path / name))
    assert (first.uid, first.messages, first.ground_truth) == (
        "rows/0",
        [{"role": "user", "content": "1+1"}],
        "2",
    )
    assert first.data_source == "rows", "without a column for it, the file names the data"
    assert second.columns == ROWS[1], "all columns stay with the problem"


def test_json_lines_may_have_the_name_of_json(tmp_path):
    write_jsonl(tmp_path / "rows.json", ROWS)
    assert [p.ground_truth for p in valid(file_data(tmp_path / "rows.json"))] == ["2", "4"]


def test_a_list_of_files_is_read_in_its_order_with_unique_uids(tmp_path):
    (tmp_path / "b").mkdir()
    paths = [tmp_path / "rows.jsonl", tmp_path / "b/rows.csv", tmp_path / "other.parquet"]
    for path in paths:
        WRITERS[f"rows{path.suffix}"](path, ROWS)
    found = valid(file_data(paths, limit=5))
    assert [p.uid for p in found] == ["0-rows/0", "0-rows/1", "1-rows/0", "1-rows/1", "other/0"]
    assert [p.data_source for p in found] == ["rows"] * 4 + ["other"]


def test_each_file_of_a_list_has_its_own_fault(tmp_path):
    write_csv(tmp_path / "a.csv", [{"problem": "1+1", "answer": 2}])
    assert file_faults(file_data([tmp_path / "none.csv", tmp_path / "a.csv"])) == [
        f"no such file: {tmp_path}/none.csv",
        f"{tmp_path}/a.csv has no column question; its columns: problem, answer (columns.prompt chooses one)",
    ]


def test_columns_may_be_nested_and_messages_are_kept(tmp_path):
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    write_parquet(tmp_path / "x.parquet", [{"chat": messages, "meta": {"solution": {"value": 2}}, "origin": "sums"}])
    columns = {"prompt": "chat", "answer": "meta.solution.value", "data_source": "origin"}
    (problem,) = valid(file_data(tmp_path / "x.parquet", columns=columns))
    assert (problem.messages, problem.ground_truth, problem.data_source) == (messages, "2", "sums")
    (fault,) = file_faults(file_data(tmp_path / "x.parquet", columns={**columns, "answer": "meta.answer"}))
    assert "has no column meta.answer; its columns: chat, meta, origin, meta.solution (columns.answer" in fault


def test_the_layout_of_dapo_math_needs_no_mapping(tmp_path):
    row = {"prompt": "1+1", "reward_model": {"ground_truth": 2, "style": "rule"}, "data_source": "math_dapo"}
    write_jsonl(tmp_path / "x.jsonl", [row])
    (problem,) = valid(FileData(type="file", path=tmp_path / "x.jsonl"))
    assert (problem.ground_truth, problem.data_source) == ("2", "math_dapo")
    (renamed,) = valid(FileData(type="file", path=tmp_path / "x.jsonl", data_source="mine"))
    assert renamed.data_source == "mine"


def test_the_answer_is_what_the_pattern_finds(tmp_path):
    rows = [{"question": "1", "answer": "so 5\n#### 1,000 "}, {"question": "2", "answer": "none"}]
    write_jsonl(tmp_path / "gsm8k.jsonl", rows)
    source = file_data(tmp_path / "gsm8k.jsonl", answer_pattern="#### (.+)")
    assert [p.ground_truth for p in problems(source) if isinstance(p, Problem)] == ["1,000"]
    assert reasons(source) == ["row 1: answer_pattern finds nothing in answer"]


def test_template_and_system_prompt(tmp_path):
    messages = [
        {"role": "system", "content": "old"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "{level}?"},
    ]
    write_jsonl(tmp_path / "x.jsonl", [{"question": messages, "answer": "1", "level": [1, "ü"]}])
    template = "{level}: {prompt}\n\\boxed{} {none}"
    (problem,) = valid(file_data(tmp_path / "x.jsonl", prompt_template=template, system_prompt="Add."))
    assert [message["content"] for message in problem.messages] == [
        "Add.",
        "first",
        "yes",
        '[1, "ü"]: {level}?\n\\boxed{} {none}',
    ]
    assert problem.columns["question"] == messages


def test_values_that_json_does_not_have_are_converted(tmp_path):
    row = {"question": "1", "answer": "1", "day": datetime.date(2025, 9, 16), "image": b"png", "score": float("nan")}
    write_parquet(tmp_path / "x.parquet", [row])
    (problem,) = valid(file_data(tmp_path / "x.parquet"))
    assert {name: problem.columns[name] for name in ("day", "image", "score")} == {
        "day": "2025-09-16",
        "image": None,
        "score": None,
    }


def test_rows_of_a_csv_file_that_cannot_be_used(tmp_path):
    lines = [b"question,answer", b'"1,\n1",2', b"2", b"", b"3,4,5", b"\xff,1", b'4,"5']
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    source = file_data(tmp_path / "x.csv")
    assert [p.uid for p in problems(source) if isinstance(p, Problem)] == ["x/0", "x/4"]
    assert reasons(source) == [
        "row 1: has 1 fields, but the header has 2",
        "row 2: has 3 fields, but the header has 2",
        "row 3: is not UTF-8 text",
    ]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("[1]", "row 0 is not a JSON object"),
        ("[", "Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "has no rows"),
    ],
)
def test_a_json_file_without_rows_is_one_line(tmp_path, content, fault):
    (tmp_path / "x.json").write_text(content)
    (message,) = file_faults(file_data(tmp_path / "x.json"))
    assert fault in message


def test_unusable_rows_are_counted_by_their_reasons(tmp_path, tiny_qwen3, caplog):
    rows = [{"question": "1", "answer": "1"}, {"question": 1, "answer": "1"}, *[{"question": "1", "answer": ""}] * 3]
    write_jsonl(tmp_path / "x.jsonl", rows)
    with caplog.at_level(logging.WARNING, logger="megatron_hapo"):
        load_prompts(
            file_data(tmp_path / "x.jsonl"), load_tokenizer(tiny_qwen3), chat_template=True, max_prompt_tokens=99
        )
    assert (
        "4 of 5 rows are invalid (row 2: answer is missing, and 2 more; row 1: question must be a string or a list of "
        "messages with role and content) and were dropped"
    ) in caplog.text


def test_a_prompt_keeps_the_columns_of_its_row(tmp_path, tiny_qwen3):
    write_csv(tmp_path / "x.csv", ROWS)
    loaded = load_prompts(
        file_data(tmp_path / "x.csv"), load_tokenizer(tiny_qwen3), chat_template=True, max_prompt_tokens=99
    )
    assert [prompt.columns for prompt in loaded.prompts] == ROWS


def test_names_of_the_hub():
    assert parse_hub_name(Path("hf:openai/gsm8k/main@e53f048:test")) == HubName(
        "openai/gsm8k", "main", "e53f048", "test"
    )
    assert parse_hub_name(Path("hf:HuggingFaceH4/MATH-500")) == HubName("HuggingFaceH4/MATH-500", None, None, "train")
    assert parse_hub_name(Path("hf:./data/gsm8k:test")) == HubName("./data/gsm8k", None, None, "test")
    for wrong in ("hf:gsm8k", "hf:a/b/c/d", "hf:a/b:", "hf:"):
        with pytest.raises(DataError, match=r"must have the form hf:ORG/NAME"):
            parse_hub_name(Path(wrong))


def test_a_split_of_a_downloaded_data_set(tmp_path, monkeypatch):
    """By the library that also reads the Hub itself."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "sums").mkdir()
    write_jsonl(tmp_path / "sums/train.jsonl", ROWS)
    write_jsonl(tmp_path / "sums/test.jsonl", ROWS[1:])
    (problem,) = valid(file_data(f"hf:{tmp_path}/sums:test"))
    assert (problem.uid, problem.ground_truth, problem.data_source) == ("sums:test/0", "4", "sums:test")
    assert problem.columns == ROWS[1]
    (fault,) = file_faults(file_data(f"hf:{tmp_path}/sums:valid"))
    assert (
        fault
        == f"hf:{tmp_path}/sums:valid: cannot be loaded: Unknown split \"valid\". Should be one of ['train', 'test']"
    )
    (fault,) = file_faults(file_data(f"hf:{tmp_path}/none:test"))
    assert fault == f"hf:{tmp_path}/none:test: no such folder: {tmp_path}/none"


def test_without_a_network_the_hub_is_one_line_that_says_what_to_do(tmp_path):
    script = (
        "from megatron_hapo.config import FileData\n"
        "from megatron_hapo.data.problems import file_faults\n"
        "print(*file_faults(FileData(type='file', path='hf:openai/gsm8k/main:test')), sep='\\n')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "hf:openai/gsm8k/main:test: the Hub cannot be reached (ConnectionError), and the data set is not in the cache; "
        "where there is a network: hf download --repo-type dataset openai/gsm8k --local-dir data/gsm8k, then "
        "path=hf:./data/gsm8k:test\n"
    )
