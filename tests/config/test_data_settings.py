"""One data source or several by name: how they are read, layered, dumped, compared and rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_hapo.config import Config, FileData, dump_config, load_config
from megatron_hapo.config.resumption import changed_settings
from tests.config.test_config import MINIMAL, faults_of, write

MIXED = """
name: small
steps: 3
model: {path: models/tiny}
data:
  train:
    gsm8k: {type: file, path: [a.jsonl, "hf:openai/gsm8k/main:train"], weight: 3, columns: {prompt: question}}
    sums: {type: arithmetic, size: 100}
  eval:
    aime24: {type: file, path: aime.jsonl, samples: 32, max_response_tokens: 99, scorer: math}
    sums: {type: arithmetic, size: 10, temperature: 0}
"""


def test_several_sources_by_name(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MIXED))
    data = config.data
    assert [key for key, _ in data.sources] == [
        "data.train.gsm8k",
        "data.train.sums",
        "data.eval.aime24",
        "data.eval.sums",
    ]
    assert data.weights == {"gsm8k": 3, "sums": 1}
    gsm8k = data.train_sources["gsm8k"]
    assert isinstance(gsm8k, FileData)
    assert gsm8k.paths == (Path("a.jsonl"), Path("hf:openai/gsm8k/main:train"))
    aime, sums = (config.eval.of_set(part, max_response_tokens=500) for part in data.eval_sets.values())
    assert (aime.samples, aime.temperature, aime.top_p, aime.max_response_tokens, aime.scorer) == (
        *(32, 0.5, 0.7, 99),
        "math",
    )
    assert (sums.samples, sums.temperature, sums.max_response_tokens, sums.scorer) == (1, 0, 500, None)


def test_a_single_source_has_no_name(tmp_path: Path) -> None:
    data = load_config(write(tmp_path)).data
    assert list(data.train_sources) == [""]
    assert [key for key, _ in data.sources] == ["data.train"]
    assert data.eval_sets == {}


def test_named_sources_are_dumped_and_loaded_as_the_same(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MIXED))
    dump_config(config, tmp_path / "dumped.yaml")
    assert load_config(tmp_path / "dumped.yaml") == config


def test_an_overlay_replaces_one_source_by_named_ones_and_the_reverse(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "eval: {samples: 4}\n", "job.yaml")
    write(tmp_path, MIXED, "mixed.yaml")
    write(tmp_path, "data: {eval: {a: {type: arithmetic, size: 2}, b: {type: arithmetic, size: 3}}}\n", "sets.yaml")
    one = "data: {eval: {type: arithmetic, size: 4}}\n"
    write(tmp_path, one, "one.yaml")
    named = load_config(write(tmp_path, "base: [job.yaml, one.yaml, sets.yaml]\n"))
    assert list(named.data.eval_sets) == ["a", "b"]
    single = load_config(write(tmp_path, "base: [job.yaml, sets.yaml, one.yaml]\n"))
    assert list(single.data.eval_sets) == [""]
    more = load_config(write(tmp_path, "base: [mixed.yaml, sets.yaml]\n"), ["data.eval.a.samples=2"])
    assert list(more.data.eval_sets) == ["aime24", "sums", "a", "b"]
    assert getattr(more.data.eval_sets["a"], "samples", None) == 2


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("data.train.gsm8k.wieght=2", "data.train.gsm8k.wieght: unknown key; did you mean weight?"),
        ("data.train.gsm8k.weight=0", "data.train.gsm8k.weight: must be greater than 0, got 0"),
        ("data.train.gsm8k.limit=true", "data.train.gsm8k.limit: must be a number, got True"),
        ("data.train.gsm8k.path=[]", "data.train.gsm8k.path: must not be empty"),
        ("data.train.gsm8k.path=[a.csv,1]", "data.train.gsm8k.path.1: must be a path, got 1"),
        ("data.train.gsm8k.columns.promt=x", "data.train.gsm8k.columns.promt: unknown key; did you mean prompt?"),
        ("data.train.new={size: 3}", "data.train.new.type: is required"),
        ("data.train.new={type: files}", "data.train.new.type: must be one of 'file', 'reasoning_gym', 'arithmetic'"),
        ("data.train.sums.min_terms=9", "data.train.sums.min_terms: must be at most data.train.sums.max_terms=5"),
        ("data.eval.aime24.temperature=0", "data.eval.aime24.samples: must be 1 with data.eval.aime24.temperature=0"),
        ("data.eval.sums.top_p=0.5", "data.eval.sums.top_p: has no effect: the temperature is 0"),
        (
            "data.eval.aime24.max_response_tokens=99999",
            "data.eval.aime24.max_response_tokens: must be at most rollout.max_response_tokens=10240",
        ),
        ("data.eval.aime24.scorer=reasoning_gym", "data.eval.aime24.scorer: reasoning_gym cannot score"),
        ("data.train.gsm8k.answer_pattern=a", "data.train.gsm8k.answer_pattern: must be a regular expression with one"),
        ("data.train.gsm8k.answer_pattern='('", "data.train.gsm8k.answer_pattern: must be a regular expression, got"),
        ("data.train.gsm8k.prompt_template=x", "data.train.gsm8k.prompt_template: must contain {prompt}, where"),
        ("data.curriculum.revisit=0.5", "data.curriculum.revisit: has no effect: data.curriculum.enabled is false"),
    ],
)
def test_a_fault_of_a_named_source_names_its_key(tmp_path: Path, override: str, fault: str) -> None:
    (line,) = faults_of(write(tmp_path, MIXED), override)
    assert line.partition(": ")[2].startswith(fault)


def test_a_name_must_be_usable_on_the_command_line(tmp_path: Path) -> None:
    text = MIXED.replace("aime24:", "aime-24:")
    (line,) = faults_of(write(tmp_path, text))
    assert line == "run.yaml: data.eval.aime-24: must be a name of letters, digits and underscores, got 'aime-24'"


def test_changes_of_named_sources_are_found_on_resume(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MIXED))
    before: dict[str, Any] = config.model_dump(mode="json")
    assert changed_settings(before, config) == []
    changed = load_config(write(tmp_path, MIXED), ["data.train.gsm8k.weight=1", "data.eval.sums.size=11"])
    assert [str(change) for change in changed_settings(before, changed)] == [
        "data.train.gsm8k.weight: 3.0 -> 1.0",
        "data.eval.sums.size: 10 -> 11",
    ]
    single = Config.model_validate({**before, "data": {"train": {"type": "arithmetic", "size": 5}}})
    texts = [str(change) for change in changed_settings(before, single)]
    assert "data.train.gsm8k.type: file -> not set" in texts
    assert "data.train.size: not set -> 5" in texts
