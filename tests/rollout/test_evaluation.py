"""Evaluation sets with a scripted pool: metrics, files that go on after an interruption, tables and comparisons."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_hapo.config import Config
from megatron_hapo.errors import HapoError
from megatron_hapo.rollout.eval_results import ResultFile
from megatron_hapo.rollout.eval_statistics import ProblemResult
from megatron_hapo.rollout.eval_table import as_json, compare, print_table
from megatron_hapo.rollout.evaluation import Evaluated, EvaluationSet, evaluate, evaluation_metrics, evaluation_sets
from megatron_hapo.types import Prompt, Rollout, Sampling, Score, ScoredGroup
from tests.observe.test_metrics import documented_metrics

SETTINGS = {"model": "fingerprint", "data": {"path": "a.jsonl"}}


def prompts(name: str, count: int) -> list[Prompt]:
    ids = np.ones(2, np.int32)
    return [Prompt(uid=f"{name}{i}", token_ids=ids, ground_truth="1", data_source="x") for i in range(count)]


def make_config(**settings: Any) -> Config:
    required = {"name": "run", "steps": 9, "model": {"path": "model"}}
    return Config.model_validate({**required, "data": {"train": {"type": "arithmetic", "size": 4}}, **settings})


NAMED = {
    "train": {"type": "arithmetic", "size": 4},
    "eval": {
        "easy": {"type": "arithmetic", "size": 2, "samples": 4, "scorer": "exact"},
        "hard": {"type": "arithmetic", "size": 3, "temperature": 1.5, "top_p": 0.9, "max_response_tokens": 7},
    },
}


def rollout(prompt: Prompt, length: int = 3, finish: Any = "stop") -> Rollout:
    one = np.zeros(length, np.float32)
    ids = one.astype(np.int32)
    return Rollout(
        prompt=prompt, response_ids=ids, rollout_log_probs=one, temperatures=one, policy_versions=ids,
        finish_reason=finish,
    )  # fmt: skip


class Pool:
    """Answers with responses whose lengths are 1, 2, 3, ..."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Prompt], Sampling]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        self.calls.append((list(prompts), sampling))
        return [[rollout(p, 1 + s, "length" if s == 3 else "stop") for s in range(sampling.samples)] for p in prompts]


class Rewards:
    """The first response to each prompt of the set easy is right."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        right = [r.prompt.uid.startswith("easy/") and len(r.response_ids) == 1 for r in rollouts]
        return [Score(reward=0.0, correctness=float(yes), answer="1" if yes else "2") for yes in right]


def run(config: Config, sets: dict[str, list[Prompt]]) -> tuple[Pool, dict[str, float]]:
    pool: Any = Pool()
    rewards: Any = Rewards()
    return pool, evaluate(pool, rewards, evaluation_sets(config, sets))


def test_a_single_set_has_the_plain_names() -> None:
    config = make_config(
        data={**NAMED, "eval": {"type": "arithmetic", "size": 2}}, eval={"samples": 4, "temperature": 0.6}
    )
    pool, metrics = run(config, {"": prompts("easy/", 2)})
    assert metrics == {"eval/accuracy": 0.25, "eval/response_length": 2.5, "eval/truncated": 0.25}
    ((_, sampling),) = pool.calls
    assert (sampling.samples, sampling.temperature, sampling.top_p) == (4, 0.6, 0.7)
    assert sampling.seed == 1 << 40
    assert sampling.max_response_tokens == config.rollout.max_response_tokens


def test_each_named_set_is_sampled_and_scored_as_it_says() -> None:
    config = make_config(data=NAMED, eval={"samples": 2})
    pool, metrics = run(config, {"easy": prompts("easy/", 2), "hard": prompts("hard/", 3)})
    (easy, first), (hard, second) = pool.calls
    assert (first.samples, first.temperature, first.top_p) == (4, 0.5, 0.7)
    assert (second.samples, second.temperature, second.top_p, second.max_response_tokens) == (2, 1.5, 0.9, 7)
    assert {prompt.scorer for prompt in easy} == {"exact"}
    assert {prompt.scorer for prompt in hard} == {None}
    assert metrics == pytest.approx(
        {
            **{"eval/easy/accuracy": 0.25, "eval/easy/response_length": 2.5, "eval/easy/truncated": 0.25},
            **{"eval/easy/pass@2": 0.5, "eval/easy/pass@4": 1.0, "eval/easy/maj@4": 0.0},
            **{"eval/hard/accuracy": 0.0, "eval/hard/response_length": 1.5, "eval/hard/truncated": 0.0},
            **{"eval/hard/pass@2": 0.0, "eval/hard/maj@2": 0.0},
            **{"eval/accuracy": 0.125, "eval/response_length": 2.0, "eval/truncated": 0.125},
        }
    )
    known = {
        name.replace("eval/NAME", "eval/easy").replace("@K", "@4").replace("@N", "@4") for name in documented_metrics()
    }
    assert {name for name in metrics if "hard" not in name and "@2" not in name} <= known


def group(prompt: Prompt, *correct: int) -> ScoredGroup:
    scores = [Score(reward=0.0, correctness=float(c), answer=str(c)) for c in correct]
    return ScoredGroup([rollout(prompt) for _ in correct], scores)


def evaluated_set(count: int, name: str = "") -> EvaluationSet:
    return EvaluationSet(name, prompts("p", count), Sampling(samples=2, temperature=0.5, max_response_tokens=9, seed=1))


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_results(tmp_path: Path) -> None:
    part = evaluated_set(4)
    groups = [group(prompt, i % 2, 1) for i, prompt in enumerate(part.prompts)]
    texts = [f"text {i}\n\u2028" for i in range(8)]
    whole = ResultFile(tmp_path / "whole", part, SETTINGS)
    whole.add(groups, texts)
    assert whole.missing() == []

    file = ResultFile(tmp_path / "broken", part, SETTINGS)
    assert file.missing() == [0, 1, 2, 3]
    file.add(groups[:3], texts[:6])
    content = file.path.read_text()
    for cut in (len(content) - 7, len(content) - len(content.splitlines(keepends=True)[-1])):
        file.path.write_text(content[:cut])  # within the last line; between the two lines of a problem
        again = ResultFile(tmp_path / "broken", part, SETTINGS)
        assert again.missing() == [2, 3]
        assert len(again.path.read_text().splitlines()) == 4
    again.add(groups[2:], texts[4:])
    assert again.path.read_text() == whole.path.read_text()
    assert ResultFile(tmp_path / "broken", part, SETTINGS).evaluated() == whole.evaluated()
    first = json.loads(whole.path.read_text().splitlines()[0])
    assert (first["response"], first["correct"], first["num_tokens"]) == ("text 0\n\u2028", False, 3)


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    part = evaluated_set(1)
    ResultFile(tmp_path, part, SETTINGS).add([group(part.prompts[0], 1, 1)], ["", ""])
    other = replace(part, sampling=replace(part.sampling, temperature=0.7))
    with pytest.raises(HapoError, match=r"made with other settings \(sampling\.temperature 0\.5 -> 0\.7\); remove it"):
        ResultFile(tmp_path, other, SETTINGS)
    with pytest.raises(HapoError, match=r'data\.path "a\.jsonl" -> "b\.jsonl"'):
        ResultFile(tmp_path, part, {**SETTINGS, "data": {"path": "b.jsonl"}})
    (tmp_path / "eval.settings.json").unlink()
    with pytest.raises(HapoError, match="made with other settings"):
        ResultFile(tmp_path, part, SETTINGS)


@pytest.mark.parametrize("line", ["x", "[]", "{}", "null", '{"uid": 1}', '{"uid": [], "sample": 0}', "[" * 100_000])
def test_a_damaged_file_of_results_is_one_line(tmp_path: Path, line: str) -> None:
    part = evaluated_set(1)
    file = ResultFile(tmp_path, part, SETTINGS)
    file.add([group(part.prompts[0], 1, 1)], ["", ""])
    file.path.write_text(f"{line}\n{line}\n")
    with pytest.raises(HapoError, match="2 lines are damaged"):
        ResultFile(tmp_path, part, SETTINGS)


def problems(*correct: str) -> list[Evaluated]:
    return [
        Evaluated(ProblemResult(f"p{i}", tuple(c == "1" for c in of), tuple(of)), (1,) * len(of), (False,) * len(of))
        for i, of in enumerate(correct)
    ]


def test_models_are_compared_with_the_first() -> None:
    results = compare(
        {
            "old": {"a": problems("10", "00"), "b": problems("1111")},
            "new": {"a": problems("11", "10"), "b": problems("1110")},
        }
    )
    assert results["old"]["a"].differences == {}
    new = results["new"]
    assert (new["a"].estimates["avg"].value, new["a"].differences["avg"].value) == (0.75, 0.5)
    assert (new["a"].differences["avg"].low, new["a"].differences["avg"].high) == (0.5, 0.5)
    assert new["b"].differences["avg"].value == -0.25
    over_all = new["all sets"]
    assert (over_all.num_problems, over_all.num_samples) == (3, None)
    assert list(over_all.estimates) == ["avg", "pass@2"]
    assert (over_all.estimates["avg"].value, over_all.differences["avg"].value) == (0.75, 0.125)
    assert json.loads(json.dumps(as_json(results)))["new"]["a"]["differences"]["avg"]["value"] == 0.5


def printed(results: Any) -> list[list[str]]:
    text = io.StringIO()
    print_table(results, Console(file=text, width=80))
    return [line.split() for line in text.getvalue().splitlines() if line.strip()]


def test_the_table_of_one_set_has_neither_model_nor_set() -> None:
    header, _, first, second, third, note = printed(compare({"m": {"": problems("10", "11")}}))
    assert header == ["problems", "metric", "percent"]
    assert first == ["2", "avg@2", "75.0", "[50.0,", "100.0]"]
    assert second == ["pass@2", "100.0", "[100.0,", "100.0]"]
    assert third == ["maj@2", "75.0", "[50.0,", "100.0]"]
    assert note[0] == "percent,"


def test_the_tables_of_two_models_show_the_differences_and_fit_into_80_columns() -> None:
    lines = printed(
        compare(
            {
                "old": {"a": problems("1000"), "b_set_with_a_long_name": problems("00")},
                "new": {"a": problems("1111"), "b_set_with_a_long_name": problems("00")},
            }
        )
    )
    assert lines[:2] == [["old"], ["set", "problems", "metric", "percent"]]
    new = lines[lines.index(["new"]) :]
    assert new[1] == ["set", "problems", "metric", "percent", "difference"]
    assert new[3] == ["a", "1", "avg@4", "100.0", "[100.0,", "100.0]", "+75.0", "[+75.0,", "+75.0]"]
    assert ["all", "2", "avg@n", "50.0", "[50.0,", "50.0]", "+37.5", "[+37.5,", "+37.5]"] in new
    assert not [word for line in lines for word in line if "…" in word]
    assert " ".join(new[-1]).endswith("differences are to old")


def test_the_parts_of_rewards_are_written_and_have_means_in_metrics_and_tables(tmp_path: Path) -> None:
    """Two problems: steps 0.2 and 0.4, then 1 and none; tries 7 in a single response."""
    part = evaluated_set(2)
    parts = ({"steps": 0.2}, {"steps": 0.4, "tries": 7.0}), ({"steps": 1.0}, {})
    groups = [
        ScoredGroup([rollout(prompt)] * 2, [Score(reward=0.0, correctness=0.0, parts=of) for of in its_parts])
        for prompt, its_parts in zip(part.prompts, parts, strict=True)
    ]
    file = ResultFile(tmp_path, part, SETTINGS)
    file.add(groups, [""] * 4)
    read = ResultFile(tmp_path, part, SETTINGS).evaluated()
    assert [dict(of) for problem in read for of in problem.parts] == [dict(of) for its in parts for of in its]

    metrics = evaluation_metrics({"": read})
    assert (metrics["eval/reward/steps"], metrics["eval/reward/tries"]) == pytest.approx((0.65, 7.0))
    named = evaluation_metrics({"a": read, "b": problems("10")})  # the mean over the sets that have the part
    assert (named["eval/a/reward/steps"], named["eval/reward/steps"]) == pytest.approx((0.65, 0.65))

    better = [replace(problem, parts=tuple({"steps": 1.0} for _ in problem.parts)) for problem in read]
    results = compare({"old": {"": read}, "new": {"": better}})
    assert results["new"][""].differences["reward/steps"].value == pytest.approx((0.7 + 0) / 2)
    assert "reward/tries" not in results["new"][""].estimates
    lines = printed(results)
    assert ["problems", "metric", "value"] in lines
    assert ["reward/tries", "7", "[7,", "7]"] in lines
    assert ["reward/steps", "0.65", "[0.3,", "1]"] in lines
    assert ["reward/steps", "1", "[1,", "1]", "+0.35", "[+0,", "+0.7]"] in lines
    assert "own unit" in " ".join(lines[-1])


def test_no_sets_have_no_metrics() -> None:
    assert evaluation_metrics({}) == {}
