"""Programs tested by a server: the same credit as in reward workers, over real HTTP and with real processes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_hapo.checks.own_rewards import check_own_rewards
from megatron_hapo.config import Config, RewardConfig
from megatron_hapo.errors import RewardError
from megatron_hapo.reward import service
from megatron_hapo.reward.composition import Earned
from megatron_hapo.reward.pool import Scorers
from megatron_hapo.types import Prompt
from tests.reward.judge_server import Reply, judge_server
from tests.time_limits import patient

SUM = json.dumps({"inputs": ["1 2\n", "3 4\n", "70000 654\n"], "outputs": ["3\n", "7\n", "70654\n"]})
ADD = json.dumps({"inputs": [[1, 2], [3, 4]], "outputs": [3, 7], "fn_name": "add"})
HUMAN_EVAL = "def check(candidate):\n    assert candidate(1, 2) == 3\n"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(service, "FIRST_PAUSE_SECONDS", 0.02)


def prompt(truth: str, **columns: object) -> Prompt:
    return Prompt(uid="c", token_ids=np.zeros(1, np.int32), ground_truth=truth, data_source="code", columns=columns)


HUMAN = prompt(HUMAN_EVAL, entry_point="add", prompt='def add(a, b):\n    """The sum."""\n')
PROGRAMS = (
    (prompt(SUM), "a, b = map(int, input().split())\nprint(a + b)", 1.0),
    (prompt(SUM), "print(3)", 1 / 3),
    (prompt(SUM), "a, b = map(int, input().split())\nprint(float(a + b))\nraise SystemExit(a > 4)", 2 / 3),
    (prompt(SUM), "while True: pass", 0.0),
    (prompt(ADD), "print('noise')\ndef add(a, b):\n    print('more')\n    return a + b", 1.0),
    (prompt(ADD), "class Solution:\n    def add(self, a, b): return 3.0", 0.5),
    (prompt(ADD), "x = 1", 0.0),
    (HUMAN, "    return a + b\n", 1.0),
    (HUMAN, "def add(a, b): return 0\n", 0.0),
    (prompt(SUM), None, 0.0),
)
"""Prompts with programs and the share of the tests that they pass; None: the response has no program."""


def run_code(text: str, before: int) -> Reply:
    """What SandboxFusion answers, from a process of this machine."""
    request = json.loads(text)
    assert (request["language"], request["memory_limit_MB"]) == ("python", 2048)
    try:
        done = subprocess.run(
            [sys.executable, "-c", request["code"]], input=request["stdin"], text=True, capture_output=True,
            timeout=request["run_timeout"],
        )  # fmt: skip
        ended = {"status": "Finished" if done.returncode == 0 else "Error", "stdout": done.stdout}
        status = "Success" if done.returncode == 0 else "Failed"
    except subprocess.TimeoutExpired:
        ended, status = {"status": "TimeLimitExceeded", "stdout": None}, "Failed"
    return ran(status, ended)


def ran(status: str, result: object = None) -> Reply:
    return Reply(body=json.dumps({"status": status, "message": "", "run_result": result}).encode())


def config_of(url: str | None, credit: str = "share", **settings: object) -> RewardConfig:
    code = {"credit": credit, "test_seconds": patient(2), "server": None if url is None else {"url": url, **settings}}
    return RewardConfig.model_validate({"scorer": "code", "workers": 1, "timeout_seconds": patient(30), "code": code})


def score(config: RewardConfig, programs: list[tuple[Prompt, str | None]]) -> list[Earned]:
    texts = ["I pass." if program is None else f"```python\n{program}\n```" for _, program in programs]
    scorers = Scorers(config)
    try:
        return scorers.score([prompt for prompt, _ in programs], texts)
    finally:
        scorers.close()


@pytest.mark.parametrize("credit", ["share", "all_or_nothing"])
def test_a_server_gives_the_same_credit_as_the_workers(credit):
    programs = [(prompt, program) for prompt, program, _ in PROGRAMS]
    expected = [share if credit == "share" else float(share == 1) for _, _, share in PROGRAMS]
    here = score(config_of(None, credit), programs)
    with judge_server(run_code) as server:
        there = score(config_of(server.url, credit), programs)
    for results in (here, there):
        assert [result.outcome.correctness for result in results] == pytest.approx(expected)
        assert not any(result.outcome.failure for result in results)
    assert server.paths == {"/v1/run_code"}
    assert not [request for request in server.requests if "70654" in json.dumps(request)]  # an expected result


def test_where_one_failure_decides_no_further_tests_are_sent():
    """Rounds of 1, 3 and 9 tests: the wrong program fails in the second."""
    inputs = [str(number) for number in range(13)]
    tests = prompt(json.dumps({"inputs": inputs, "outputs": inputs}))
    with judge_server(run_code) as server:
        results = score(config_of(server.url, "all_or_nothing"), [(tests, "print(1 // (int(input()) - 2))")])
        assert (results[0].outcome.correctness, len(server.requests)) == (0.0, 4)
        score(config_of(server.url, "all_or_nothing"), [(tests, "print(input())")])
        assert len(server.requests) == 4 + 13


def test_an_error_of_the_server_is_repeated_and_then_counted():
    with judge_server(lambda text, before: ran("SandboxError") if before == 0 else run_code(text, before)) as server:
        (result,) = score(config_of(server.url), [(prompt(SUM), "print(3)")])
        assert result.outcome.correctness == pytest.approx(1 / 3)
        server.answer = lambda text, before: ran("SandboxError") if "bad" in text else ran("Failed")
        good, bad = score(config_of(server.url, tries=2), [(prompt(SUM), "good" * 9)] * 4 + [(prompt(SUM), "bad")])[3:]
    assert (good.outcome.failure, bad.outcome.failure) == (None, "crash")
    assert bad.outcome.reason.startswith('the server did not run the program: {"status": "SandboxError"')


def test_the_start_asks_the_server_to_run_a_program():
    def job(url: str) -> Config:
        data = {"train": {"type": "arithmetic", "size": 4}}
        return Config.model_validate(
            {"name": "x", "steps": 1, "model": {"path": "m"}, "data": data, "reward": config_of(url, tries=1)}
        )

    with judge_server(run_code) as server:
        assert check_own_rewards(job(server.url), [prompt(SUM)]) == []
        assert [request["stdin"] for request in server.requests] == ["1"]
        server.answer = lambda text, before: ran("Success", {"status": "Finished", "stdout": "3\n"})
        with pytest.raises(RewardError, match="does not run a program that adds 1: it gave another result"):
            check_own_rewards(job(server.url), [prompt(SUM)])
        server.answer = lambda text, before: Reply(404)
        with pytest.raises(
            RewardError, match=r"reward\.code\.server: .*run_code refuses every request with status 404"
        ):
            check_own_rewards(job(server.url), [prompt(SUM)])
