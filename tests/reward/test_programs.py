"""Programs in responses: layouts of tests, credit, and what hostile programs achieve."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_hapo.checks.own_rewards import check_own_rewards
from megatron_hapo.config import Config, RewardConfig, TaskData, load_config
from megatron_hapo.data.problems import Problem, problems
from megatron_hapo.errors import RewardError
from megatron_hapo.reward.composition import jobs_of
from megatron_hapo.reward.pool import Scorers
from megatron_hapo.reward.programs import CodeTestsError, parse_tests, program_of
from megatron_hapo.reward.scorers import score
from megatron_hapo.reward.worker import encode_jobs
from megatron_hapo.types import Prompt

ROOT = Path(__file__).parents[2]

SUM = json.dumps({"inputs": ["1 2\n", "3 4\n", "5 6\n"], "outputs": ["3\n", "7\n", "11\n"]})
RIGHT = "a, b = map(int, input().split())\nprint(a + b)"
HUMAN_EVAL = {
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(5, 6) == 11\n",
    "entry_point": "add",
}


def prompt(truth: str = SUM, **columns: object) -> Prompt:
    return Prompt(
        uid="c/0", token_ids=np.zeros(1, dtype=np.int32), ground_truth=truth, data_source="code", columns=columns
    )


def block(program: str) -> str:
    return f"This is it:\n```python\n{program}\n```\n"


CONFIG = RewardConfig.model_validate(
    {"scorer": "code", "workers": 2, "timeout_seconds": 4, "code": {"credit": "share", "test_seconds": 1}}
)


@pytest.fixture(scope="module")
def scorers():
    scorers = Scorers(CONFIG)
    yield scorers
    scorers.close()


def shares(scorers: Scorers, programs: list[str], tests: Prompt | None = None):
    results = scorers.score([tests or prompt()] * len(programs), [block(program) for program in programs])
    assert {result.outcome.failure for result in results} == {None}
    return [result.outcome.correctness for result in results]


def test_programs_that_read_stdin(scorers):
    programs = {
        RIGHT: 1.0,
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))": 1.0,
        "import sys\nfor line in sys.stdin:\n    print(sum(map(float, line.split())))\n": 1.0,  # 3.0 is 3
        "print(sum(map(int, open(0).read().split())));exit()": 1.0,
        f"{RIGHT}\nraise SystemExit(1)": 0.0,
        "print(3)": 1 / 3,
        "a, b = map(int, input().split())\nprint(a + b if a < 5 else 1 / 0)": 2 / 3,
        "print('3 7 11')": 0.0,
        "syntax error": 0.0,
        "": 0.0,
    }
    assert shares(scorers, list(programs)) == pytest.approx(list(programs.values()))


def test_credit_for_all_tests_or_nothing():
    strict = Scorers(CONFIG.model_copy(update={"code": CONFIG.code.model_copy(update={"credit": "all_or_nothing"})}))
    assert shares(strict, [RIGHT, "print(3)", "1 / 0"]) == [1.0, 0.0, 0.0]
    strict.close()


def test_functions_of_taco_and_live_code_bench(scorers):
    taco = prompt(json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]}))
    assert shares(scorers, ["def add(a, b):\n    return a + b", "def add(a, b): return 3.0", "x = 1"], taco) == [
        1,
        0.5,
        0,
    ]
    cases = [{"input": "[1, 2]\n2", "output": "[2, 4]", "testtype": "functional"}]
    bench = prompt(json.dumps(cases), metadata=json.dumps({"func_name": "times"}))
    method = (
        "class Solution:\n    def times(self, n: List[int], k: int) -> List[int]:\n        return [k * i for i in n]"
    )
    wrong = "def times(n, k): return print('[2, 4]')"
    assert shares(scorers, [method, wrong], bench) == [1, 0]
    stdin = prompt(json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]))
    assert shares(scorers, [RIGHT], stdin) == [1]


def test_assertions_of_human_eval(scorers):
    tests = prompt(HUMAN_EVAL["test"], prompt=HUMAN_EVAL["prompt"], entry_point="add")
    programs = ["    return a + b", "def add(a, b):\n    return a + b", "    return 3", "import os; os._exit(0)"]
    assert shares(scorers, programs, tests) == [1, 1, 0, 0]


def test_hostile_programs_gain_nothing_and_harm_nothing(scorers, tmp_path):
    (tmp_path / "secret.txt").write_text("3")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    print_secret = f"print(open({str(tmp_path / 'secret.txt')!r}).read())"
    hostile = {
        "fork bomb": "import os\nwhile True:\n    os.fork()",
        "threads": "import threading\nwhile True:\n    threading.Thread(target=input).start()",
        "network": f"import socket\nsocket.create_connection(('127.0.0.1', {port}))\nprint(3)",
        "run folder": print_secret,
        "environment": "import os\nprint(3 if os.environ.get('HOME') else 4)",
        "ten gigabytes": "open('big', 'wb').write(bytes(1 << 20) * 10000)\nprint(3)",
        "memory": "x = bytearray(64 << 30)\nprint(3)",
        "no SIGTERM": "import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60)",
        "endless output": "while True:\n    print('3' * 10000)",
        "looks right": "import os\nos._exit(0)",
        "kills others": "import os\nos.kill(-1, 9)\nos.kill(os.getppid(), 9)",
        "programs": "import subprocess\nprint(subprocess.run(['echo', '3'], capture_output=True).stdout.decode())",
        "recursion": "f = lambda: f()\nf()",
    }
    begin = time.monotonic()
    assert shares(scorers, list(hostile.values())) == [0.0] * len(hostile)
    assert time.monotonic() - begin < 60
    assert shares(scorers, [RIGHT] * 4) == [1.0] * 4
    assert not Path("big").exists()
    listener.settimeout(0.1)
    with pytest.raises(TimeoutError):
        listener.accept()


def test_expected_results_never_reach_the_process_of_a_program():
    (job,) = jobs_of([(prompt(), block(RIGHT), "code")], CONFIG)
    assert job.ground_truth == ""
    assert set(job.row) == {"kind", "inputs", "function", "prompt", "test_seconds", "stop_at_failure"}


def test_a_group_sends_the_tests_of_its_prompt_once():
    first, second = prompt(), prompt(long_column="x" * 1000)
    jobs = jobs_of([(p, f"{p.uid} {sample}", "code") for p in (first, second) for sample in range(16)], CONFIG)
    message = encode_jobs(jobs)
    assert [fields[-1] for fields in message["jobs"]] == [0] * 16 + [1] * 16
    assert [row["inputs"] for row in message["rows"]] == [list(jobs[0].row["inputs"])] * 2


def test_slow_programs_end_within_the_time_of_all_tests(scorers):
    begin = time.monotonic()
    assert shares(scorers, ["while True: pass"]) == [0.0]
    assert time.monotonic() - begin < CONFIG.timeout_seconds + 5


def test_rows_without_tests_are_found_before_the_start():
    with pytest.raises(CodeTestsError, match="in the layout of TACO"):
        parse_tests("42", {})
    config = Config.model_validate(
        {
            "name": "r",
            "steps": 1,
            "model": {"path": "m"},
            "data": {"train": {"type": "arithmetic", "size": 2}},
            "reward": {"scorer": "code"},
        }
    )
    with pytest.raises(RewardError, match="scorer code: row c/0: the ground truth must be tests"):
        check_own_rewards(config, [prompt("42")])


@pytest.mark.parametrize(("name", "scorer"), [("code", "code"), ("logic", "auto")])
def test_the_shipped_jobs_load(name, scorer):
    assert load_config(ROOT / f"configs/tasks/qwen3_8b_{name}.yaml").reward.scorer == scorer


def test_knights_and_knaves_are_scored():
    source = load_config(ROOT / "configs/tasks/qwen3_8b_logic.yaml").data.eval_sets["knights_knaves"]
    assert isinstance(source, TaskData)
    (problem,) = problems(source.model_copy(update={"size": 1}))
    assert isinstance(problem, Problem)
    answer = json.loads(problem.ground_truth)["answer"]
    assert score(f"Answer: {answer}", problem.ground_truth, problem.data_source) == 1.0
    assert score("Answer: nobody lies", problem.ground_truth, problem.data_source) < 1.0


def test_the_last_block_is_the_program():
    assert program_of("```py\na\n``` then ```\nb\n```") == "b\n"
    assert program_of("print(3)") is None
