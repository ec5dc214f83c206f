"""Prompts from files and generated tasks, and the order in which they are sampled."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_hapo.config import ArithmeticData, FileData, TaskData
from megatron_hapo.data import chat_template
from megatron_hapo.data.problems import file_faults
from megatron_hapo.data.prompts import check_vocabulary, encode_messages, load_prompts, load_tokenizer
from megatron_hapo.errors import DataError
from megatron_hapo.reward.scorers import score
from tests.tiny_model import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen3):
    return load_tokenizer(tiny_qwen3)


def row(question: str, answer: str | int = "7", source: str = "math_dapo") -> dict:
    return {
        "prompt": [{"role": "user", "content": question}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "data_source": source,
        "extra": 1,
    }


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def load(path: Path, tokenizer, *, limit=None, chat_template=True, max_prompt_tokens=100):
    source = FileData(type="file", path=path, limit=limit)
    return load_prompts(source, tokenizer, chat_template=chat_template, max_prompt_tokens=max_prompt_tokens)


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_a_file_gives_tokenized_prompts(tmp_path, tokenizer, write):
    path = write(tmp_path / f"math.{write.__name__.removeprefix('write_')}", [row("1+1"), row("2+2", "4", "aime24")])
    prompts = load(path, tokenizer).prompts
    assert [(p.uid, p.ground_truth, p.data_source) for p in prompts] == [
        ("math/0", "7", "math_dapo"),
        ("math/1", "4", "aime24"),
    ]
    assert prompts[0].token_ids.dtype == np.int32
    text = tokenizer.decode(prompts[0].token_ids)
    assert text == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[0].token_ids.tolist() == tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], add_generation_prompt=True, return_dict=False
    )


def test_a_string_prompt_is_a_user_message(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "plain.jsonl", [{**row(""), "prompt": "1+1"}])
    (prompt,) = load(path, tokenizer).prompts
    assert "user\n1+1<|im_end|>" in tokenizer.decode(prompt.token_ids)


def test_without_the_chat_template_contents_are_joined(tmp_path, tokenizer):
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]
    path = write_jsonl(tmp_path / "two.jsonl", [{**row(""), "prompt": messages}])
    (prompt,) = load(path, tokenizer, chat_template=False).prompts
    assert tokenizer.decode(prompt.token_ids) == "Add.\n1+1="


def test_a_missing_chat_template_is_an_error_that_names_the_setting(tiny_qwen3):
    tokenizer = load_tokenizer(tiny_qwen3)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"has no chat template: set data\.chat_template=false"):
        encode_messages([[{"role": "user", "content": "x"}]], tokenizer, chat_template=True)


def test_the_limit_takes_the_first_rows(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "many.parquet", [row(str(i)) for i in range(5)])
    assert [p.uid for p in load(path, tokenizer, limit=2).prompts] == ["many/0", "many/1"]


def test_long_prompts_are_dropped_counted_and_reported(tmp_path, tokenizer, caplog):
    path = write_jsonl(tmp_path / "long.jsonl", [row("x" * 200), row("1+1"), row("y" * 300)])
    with caplog.at_level(logging.WARNING, logger="megatron_hapo"):
        loaded = load(path, tokenizer)
    assert (len(loaded), loaded.num_too_long) == (1, 2)
    assert [p.uid for p in loaded.prompts] == ["long/1"]
    assert "2 of 3 prompts are longer than rollout.max_prompt_tokens=100 and were dropped" in caplog.text


def test_no_prompt_left_is_an_error(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "long.jsonl", [row("x" * 200)])
    with pytest.raises(
        DataError, match=r"1 of 1 prompts are longer than rollout\.max_prompt_tokens=100; no prompt is left"
    ):
        load(path, tokenizer)


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_a_missing_column_is_named_with_the_existing_ones(tmp_path, name):
    write = write_parquet if name.endswith("parquet") else write_jsonl
    path = write(tmp_path / name, [{"question": "1+1", "reward_model": {"style": "rule"}, "data_source": "x"}])
    there = "its columns: question, reward_model, data_source, reward_model.style"
    assert file_faults(FileData(type="file", path=path)) == [
        f"{path} has no column prompt; {there} (columns.prompt chooses one)",
        f"{path} has no column reward_model.ground_truth; {there} (columns.answer chooses one)",
    ]


def test_each_kind_of_unusable_file_has_its_own_message(tmp_path):
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    fake = tmp_path / "fake.parquet"
    fake.write_text("no parquet")
    other = tmp_path / "data.txt"
    other.touch()
    paths = (tmp_path / "none.jsonl", empty, broken, fake, other, tmp_path)
    faults = [file_faults(FileData(type="file", path=path))[0] for path in paths]
    assert faults[0] == f"no such file: {tmp_path}/none.jsonl"
    assert faults[1] == f"{empty} has no rows"
    assert faults[2].startswith(f"{broken}: line 1 is not JSON")
    assert faults[3].startswith(f"{fake} cannot be read: ")
    assert faults[4] == (
        f"{other} cannot be read: the file name must end in .parquet, .jsonl, .json or .csv, not '.txt'"
    )
    assert faults[5].startswith(f"{tmp_path} is a folder: list its files, or name a split")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"prompt": [{"content": "x"}]}, "prompt must be a string or a list of messages"),
        ({"reward_model": {"ground_truth": ""}}, r"reward_model\.ground_truth is missing"),
        ({"data_source": None}, "data_source must be a string"),
    ],
)
def test_a_bad_row_is_dropped_counted_and_named(tmp_path, tokenizer, caplog, change, fault):
    path = write_jsonl(tmp_path / "bad.jsonl", [row("1+1"), {**row("2+2"), **change}])
    with caplog.at_level(logging.WARNING, logger="megatron_hapo"):
        loaded = load(path, tokenizer)
    assert ([p.uid for p in loaded.prompts], loaded.num_invalid) == (["bad/0"], 1)
    assert re.search(rf"bad\.jsonl: 1 of 2 rows are invalid \(row 1: {fault}.*\) and were dropped", caplog.text)


BAD_LINES = {
    "not JSON": b"{",
    "not UTF-8": b'{"prompt": "\xff"}',
    "not an object": b"[1]",
    "deep nesting": b'{"prompt": ' + b"[" * 100_000,
    "a number of 5000 digits": b'{"prompt": ' + b"9" * 5000 + b"}",
    "half of a surrogate pair": json.dumps(row("\ud800")).encode(),
    "half of a surrogate pair in the answer": json.dumps(row("1", "\udc00")).encode(),
    "infinite answer": json.dumps(row("1") | {"reward_model": {"ground_truth": 1e999}}).encode(),
    "boolean answer": json.dumps(row("1") | {"reward_model": {"ground_truth": True}}).encode(),
    "list as answer": json.dumps(row("1") | {"reward_model": {"ground_truth": ["7"]}}).encode(),
    "prompt is a number": json.dumps(row("1") | {"prompt": 1}).encode(),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_malformed_line_does_not_end_the_run(tmp_path, tokenizer, case):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(BAD_LINES[case] + b"\n" + json.dumps(row("1+1")).encode() + b"\n")
    loaded = load(path, tokenizer)
    assert ([p.uid for p in loaded.prompts], loaded.num_invalid) == (["bad/1"], 1)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 1 s"),
        ("{{ 10 ** (10 ** 10) }}", "takes longer than 1 s"),
        ("{{ 'x' * 10 ** 11 }}", "MemoryError"),
        ("{{ 'x' * 10 ** 7 }}", "renders 10000000 characters, more than"),
        ("{{ raise_exception('no roles') }}", "no roles"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_chat_template_has_limits(tmp_path, tiny_qwen3, monkeypatch, template, fault):
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    tokenizer = load_tokenizer(tiny_qwen3)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=fault):
        load(write_jsonl(tmp_path / "x.jsonl", [row("1+1")]), tokenizer)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'])
def test_a_tokenizer_that_does_not_load_is_named_in_one_line(tmp_path, tiny_qwen3, content):
    for path in tiny_qwen3.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"model\.path: the tokenizer in .* cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_arithmetic_needs_no_file(tokenizer):
    source = ArithmeticData(type="arithmetic", size=20, seed=1)
    loaded = load_prompts(source, tokenizer, chat_template=True, max_prompt_tokens=100)
    assert len({p.uid for p in loaded.prompts}) == 20
    assert {p.data_source for p in loaded.prompts} == {"arithmetic"}
    assert score(f"Answer: {loaded.prompts[0].ground_truth}", loaded.prompts[0].ground_truth, "arithmetic") == 1.0


def test_impossible_arithmetic_is_an_error(tokenizer):
    source = ArithmeticData(type="arithmetic", size=100, min_terms=2, max_terms=2, max_number=1)
    with pytest.raises(DataError, match="arithmetic: found only"):
        load_prompts(source, tokenizer, chat_template=True, max_prompt_tokens=100)


def test_the_ground_truth_of_a_reasoning_gym_task_is_enough_for_its_scorer(tokenizer):
    source = TaskData(type="reasoning_gym", name="chain_sum", size=5, seed=3, options={"max_terms": 3})
    prompt = load_prompts(source, tokenizer, chat_template=True, max_prompt_tokens=300).prompts[4]
    answer = json.loads(prompt.ground_truth)["answer"]
    assert (prompt.uid, prompt.data_source) == ("chain_sum/4", "reasoning_gym/chain_sum")
    assert score(f"so\nAnswer: {answer}", prompt.ground_truth, prompt.data_source) == 1.0
    assert score(f"<answer>{answer}</answer> done", prompt.ground_truth, prompt.data_source) == 1.0
    assert score("Answer: none", prompt.ground_truth, prompt.data_source) < 1.0
    assert score(f"Answer: {answer}", prompt.ground_truth, prompt.data_source, scorer="exact") == 1.0


def test_unknown_task_options_are_an_error(tokenizer):
    source = TaskData(type="reasoning_gym", name="chain_sum", size=5, options={"terms": 3})
    with pytest.raises(DataError, match=r"reasoning_gym/chain_sum: .*unexpected keyword argument 'terms'"):
        load_prompts(source, tokenizer, chat_template=True, max_prompt_tokens=300)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    tokenizer = byte_tokenizer()
    check_vocabulary(tokenizer, vocab_size=259)
    with pytest.raises(DataError, match=r"the tokenizer has 259 tokens, but the model 258 \(vocab_size in its"):
        check_vocabulary(tokenizer, vocab_size=258)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    check_vocabulary(tokenizer, vocab_size=259)  # the model never sees it
    tokenizer.add_special_tokens({"eos_token": "<|stop|>"})
    with pytest.raises(DataError, match="ends responses with token 260, but the model's last one is 258"):
        check_vocabulary(tokenizer, vocab_size=259)
