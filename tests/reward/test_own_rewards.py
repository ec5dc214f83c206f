"""Rewards of the user's own: how they are named, loaded, called in the sandbox, combined, and refused."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest

from megatron_hapo import cli
from megatron_hapo.checks.own_rewards import check_own_rewards
from megatron_hapo.config import Config, RewardConfig, dump_config, load_config
from megatron_hapo.errors import ConfigError, RewardError
from megatron_hapo.observe.step_metrics import part_metrics
from megatron_hapo.reward.own_scorer import OwnScorerError, load_own_scorer, read_result
from megatron_hapo.reward.pool import Scorers
from megatron_hapo.types import Prompt, Score, ScoredGroup

REWARDS = """
    import os, sys, time
    from helper import LENGTH

    def parts(response, row):
        right = row["ground_truth"] in response
        return {"total": right + 0.5 * (len(response) < LENGTH) + row.get("bonus", 0), "correct": right, "long": 1}

    def number(response, row):
        return -len(response)

    def fails_on_empty(response, row):
        return 1 / len(response)

    def hostile(response, row):
        if response == "loop":
            while True:
                pass
        if response == "exit":
            os._exit(0)
        if response == "write":
            open(os.path.join(os.path.dirname(__file__), "written"), "w")
        if response == "secret":
            return len(open("/etc/passwd").read())
        return len(open(os.path.join(os.path.dirname(__file__), "words.txt")).read())

    def nan(response, row):
        return float("nan")

    def constant(response, row):
        return 0.25

    def one_argument(response):
        return 0.0

    def broken(response, row):
        return row["no_such_column"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "rewards.py").write_text(textwrap.dedent(REWARDS))
    (folder / "helper.py").write_text("LENGTH = 20\n")
    (folder / "words.txt").write_text("three")
    (folder / "no_import.py").write_text("import there_is_no_such_module\n")
    (folder / "bad_syntax.py").write_text("def f(:\n")
    (folder / "run.yaml").write_text(
        "name: small\nsteps: 1\nmodel: {path: model}\n"
        "rollout: {max_prompt_tokens: 100, max_response_tokens: 400}\n"
        "data: {train: {type: arithmetic, size: 4}}\nreward: {scorer: rewards.py:parts, workers: 1}\n"
    )
    return folder


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "run.yaml", overrides)


def prompt(truth: str = "12", source: str = "mine", **columns: object) -> Prompt:
    return Prompt(
        uid="p", token_ids=np.zeros(1, dtype=np.int32), ground_truth=truth, data_source=source, columns=columns
    )


def score(config: RewardConfig, prompts: list[Prompt], texts: list[str]):
    scorers = Scorers(config)
    try:
        return scorers.score(prompts, texts)
    finally:
        scorers.close()


def test_a_file_is_relative_to_the_config_that_names_it_and_stays_the_same_in_the_run_folder(folder, tmp_path):
    (tmp_path / "over.yaml").write_text(f"base: {folder}/run.yaml\nreward: {{scorers: {{gsm8k: near.py:f}}}}\n")
    config = load_config(tmp_path / "over.yaml", [f"reward.scorer=[math, {folder}/rewards.py:number]"])
    assert config.reward.scorers == {"gsm8k": f"{tmp_path}/near.py:f"}
    assert config.reward.default_scorers == {"math": 1.0, f"{folder}/rewards.py:number": 1.0}
    assert config_of(folder).reward.scorer == f"{folder}/rewards.py:parts"
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        (
            "reward.scorer=maths",
            "reward.scorer: must be auto, math, exact, reasoning_gym, code, a judge as judge/NAME, or a function as",
        ),
        ("reward.scorer=a.py:1", "or a function as FILE.py:NAME or MODULE:NAME, got"),
        ("reward.scorer=[math,math]", "reward.scorer: must not name a scorer twice"),
        ("reward.weights=[1]", "reward.weights: has no effect: reward.scorer is not a list"),
    ],
)
def test_names_that_cannot_be_scorers_are_refused(folder, override, fault):
    with pytest.raises(ConfigError, match=fault.replace(".", r"\.")):
        config_of(folder, override)


def test_weights_must_match_the_scorers(folder):
    with pytest.raises(ConfigError, match=r"reward\.weights: must be one for each of the 2 scorers, got 1"):
        config_of(folder, "reward.scorer=[math,exact]", "reward.weights=[1]")


def test_a_function_gives_the_reward_its_parts_and_the_correctness(folder):
    config = config_of(folder).reward
    results = score(config, [prompt(), prompt(bonus=2), prompt()], ["it is 12", "no", "12 " * 20])
    assert [result.reward for result in results] == [1.5, 2.5, 1.0]
    assert [result.outcome.correctness for result in results] == [1.0, 0.0, 1.0]
    assert results[0].outcome.parts == {"correct": 1.0, "long": 1.0}
    scores = [Score(r.reward, r.outcome.correctness, earned=r.reward, parts=r.outcome.parts) for r in results]
    assert part_metrics(scores) == {"reward/correct": 2 / 3, "reward/long": 1.0}


def test_rewards_that_differ_at_equal_correctness_are_informative():
    same = [Score(reward=r, correctness=0.0, earned=e) for r, e in ((-1.0, -3.0), (-1.0, -4.0))]
    assert ScoredGroup([], same).informative
    assert not ScoredGroup([], [same[0], same[0]]).informative


def test_scorers_by_data_source_and_several_with_weights(folder):
    reward = {
        "scorer": ["exact", f"{folder}/rewards.py:number", f"{folder}/rewards.py:parts"],
        "weights": [1.0, 0.01, 2.0],
        "scorers": {"sums": "math"},
    }
    config = RewardConfig.model_validate({**reward, "workers": 1})
    both, single = score(config, [prompt(), prompt(source="sums")], ["Answer: 12", "Answer: 13"])
    assert both.reward == pytest.approx(1.0 - 0.1 + 2 * 1.5)
    assert both.outcome.parts == {"exact": 1, "number": -10, "parts": 1.5, "parts_correct": 1, "parts_long": 1}
    assert both.outcome.correctness == 1.0
    assert (single.reward, single.outcome.parts, single.differs) == (-1.0, {}, False)


def test_the_function_is_confined_and_fails_one_response_at_a_time(folder):
    config = RewardConfig(scorer=f"{folder}/rewards.py:hostile", workers=1, timeout_seconds=4.0)
    texts = ["loop", "exit", "write", "secret", "fine"]
    results = score(config, [prompt()] * len(texts), texts)
    assert [result.outcome.failure for result in results] == ["timeout", "crash", "crash", "crash", None]
    assert [result.reward for result in results] == [-1, -1, -1, -1, 5]
    assert not (folder / "written").exists()


def test_a_function_that_fails_on_everything_ends_the_run(folder):
    with pytest.raises(RewardError, match=r"broken: failed on all of 4 .*KeyError.*rewards.py, line \d+"):
        score(RewardConfig(scorer=f"{folder}/rewards.py:broken", workers=1), [prompt()] * 4, ["a"] * 4)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("rewards.py:one_argument", r"must take two arguments.*one_argument\(response\)"),
        ("rewards.py:missing", "has no function missing; it defines: parts, number"),
        ("no_import.py:f", r"cannot be imported: No module named 'there_is_no_such_module' \(no_import.py, line 1\)"),
        ("bad_syntax.py:f", "cannot be imported: SyntaxError"),
        ("rewards.py:nan", "fails on every sample response: the result must be a finite number"),
        ("rewards.py:broken", r"fails on every sample response: KeyError\('no_such_column'\) \(rewards.py, line"),
    ],
)
def test_a_function_that_cannot_work_is_found_before_the_start(folder, scorer, message):
    with pytest.raises(RewardError, match=message):
        check_own_rewards(config_of(folder, f"reward.scorer={folder}/{scorer}"), [prompt()])


def test_a_module_that_is_not_installed_is_found_before_the_start(folder):
    with pytest.raises(RewardError, match=r"not_there\.rewards:f: cannot be imported: .*add its folder to PYTHONPATH"):
        check_own_rewards(config_of(folder, "reward.scorer=not_there.rewards:f"), [prompt()])


def test_constant_and_partly_failing_rewards_are_warnings(folder):
    (constant,) = check_own_rewards(config_of(folder, f"reward.scorer={folder}/rewards.py:constant"), [prompt()])
    assert "gives 0.25 to all of 6 sample responses" in constant
    (partly,) = check_own_rewards(config_of(folder, f"reward.scorer={folder}/rewards.py:fails_on_empty"), [prompt()])
    assert "fails on 1 of 6 sample responses: ZeroDivisionError" in partly
    assert check_own_rewards(config_of(folder), [prompt()]) == []


def test_modules_on_the_path_can_be_named(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    (result,) = score(RewardConfig(scorer="rewards:number", workers=1), [prompt()], ["abc"])
    assert result.reward == -3.0


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("1.0", "must be a number, got str"),
        (None, "must be a number, got NoneType"),
        ({"right": 1.0}, 'the parts right without "total"'),
        ({"total": 1.0, "mean": 1.0}, "must have a name of letters, digits and underscores, other than accuracy"),
        ({"total": 1.0, "a b": 1.0}, "part 'a b' must have a name"),
        ({"total": float("inf")}, "must be a finite number"),
        ({"total": 1.0, "correct": 2.0}, "part 'correct' must be in"),
    ],
)
def test_results_that_are_no_rewards_are_named(result, message):
    with pytest.raises(OwnScorerError, match=message):
        read_result(result)


def test_numbers_of_numpy_and_truth_values_are_rewards(folder):
    assert read_result(np.float32(0.5)).total == 0.5
    assert read_result(True).total == 1.0
    assert load_own_scorer(f"{folder}/rewards.py:number")("ab", {}) == -2


def test_score_prints_the_means_and_writes_each_row(folder, capsys):
    rows = [{"response": "12", "answer": 12, "bonus": 1}, {"response": "13", "ground_truth": "12"}]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["score", f"{folder}/run.yaml", f"{folder}/responses.jsonl", "--output", f"{folder}/out"]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[printed.index("reward/mean:") + 1] == "1.5"
    assert printed[printed.index("reward/accuracy:") + 1] == "0.5"
    first, second = map(json.loads, (folder / "out").read_text().splitlines())
    assert (first["reward"], first["reward_parts"], first["bonus"]) == (2.5, {"correct": 1.0, "long": 1.0}, 1)
    assert (second["reward"], second["correctness"], second["failure"]) == (0.5, 0.0, None)
    (folder / "bad.jsonl").write_text('{"response": 1}\n')
    assert cli.main(["score", f"{folder}/run.yaml", f"{folder}/bad.jsonl"]) == 2
    assert 'line 1 must be an object with the string "response"' in capsys.readouterr().err
