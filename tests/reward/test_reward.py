import logging
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from megatron_hapo.config import OverlongConfig, RewardConfig
from megatron_hapo.config.scorer_names import BUILT_IN_SCORERS
from megatron_hapo.errors import RewardError
from megatron_hapo.reward.pool import ProcessRewardPool
from megatron_hapo.reward.scorers import NamedScorer, overlong_penalty, resolve_scorer, score, stated_answer
from megatron_hapo.reward.worker import Job
from megatron_hapo.reward.worker_pool import WorkerPool
from megatron_hapo.types import Prompt, Rollout
from tests.time_limits import patient

# --- scorers


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("7+8=15 15-3=12 Answer: 12", "12"),
        ("Answer: 11\nNo.\nanswer : 12.\nThat is it.", "12"),
        ("Answer:\n12", "12"),
        ("7+8=15\n15-3 = 12", "12"),
        ("first\n\n  the   cat \n", "the cat"),
        ("", ""),
    ],
)
def test_the_stated_answer_is_after_the_last_marker_or_on_the_last_line(response, answer):
    assert stated_answer(response) == answer


def test_exact_compares_the_whole_answer():
    assert score("Answer: 12", "12", "arithmetic") == 1.0
    assert score("Answer: 112", "12", "arithmetic") == 0.0
    assert score("Answer: 12 or 13", "12", "arithmetic") == 0.0


@pytest.mark.parametrize(
    ("response", "ground_truth"),
    [
        ("Answer: 42", "42"),
        ("so **Answer:** $\\frac{1}{2}$.", "0.5"),
        ("Answer: \\boxed{\\frac12}", "\\frac{1}{2}"),
        ("thus \\boxed{x^{2}+1}.", "1+x^2"),
        ("Answer: 12,345", "12345"),
        ("Answer: \\text{Tuesday}", "tuesday"),
        ("Answer: 2\\sqrt{3}", "\\sqrt{12}"),
        ("Answer: x = 5", "5"),
        ("\\boxed{1} no, Answer: 2", "2"),
    ],
)
def test_mathematically_equal_answers_are_correct(response, ground_truth):
    assert score(response, ground_truth, "math_dapo") == 1.0


@pytest.mark.parametrize(
    ("response", "ground_truth"),
    [
        ("Answer: 41", "42"),
        ("42", "42"),
        ("Answer: 42\n" + "x" * 300, "42"),
        ("Answer: 42 Answer: 43", "42"),
        ("\\boxed{42", "42"),
        ("Answer: {1,2", "\\{1,2\\}"),
        ("", "42"),
    ],
)
def test_wrong_missing_and_early_answers_are_wrong(response, ground_truth):
    assert score(response, ground_truth, "math_dapo") == 0.0


def test_auto_chooses_by_the_data_source():
    chosen = [resolve_scorer("auto", name) for name in ("arithmetic", "reasoning_gym/maze", "math_dapo", "aime24")]
    assert chosen == ["exact", "reasoning_gym", "math", "math"]
    assert resolve_scorer("math", "arithmetic") == "math"


def test_the_config_and_the_scorers_module_list_the_same_scorers():
    assert set(BUILT_IN_SCORERS) == {"auto", "code", *get_args(NamedScorer)}


def test_the_overlong_penalty_grows_linearly_over_the_buffer():
    limits = {"max_response_tokens": 10240, "buffer_tokens": 4096}
    lengths = (1, 6144, 6145, 8192, 10240)
    assert [overlong_penalty(n, **limits) for n in lengths] == [0.0, 0.0, -1 / 4096, -0.5, -1.0]
    assert overlong_penalty(8192, **limits, factor=2.0) == -1.0
    assert overlong_penalty(10240, max_response_tokens=10240, buffer_tokens=0) == 0.0


# --- worker processes


@pytest.fixture
def unruly(tmp_path, monkeypatch) -> str:
    """A scorer module that some responses break; any other response scores its ground truth."""
    (tmp_path / "unruly.py").write_text(
        "import os, time\n"
        "def resolve_scorer(scorer, data_source): return scorer\n"
        "def evaluates(scorer, data_source): return True\n"
        "def settle(response, ground_truth, data_source, *, scorer): return None\n"
        "def answer_of(response, data_source, *, scorer): return response\n"
        "def preload(scorer):\n"
        "    if scorer == 'reasoning_gym': raise ImportError('not there')\n"
        "def score(response, ground_truth, data_source, *, scorer):\n"
        "    if response == 'loop':\n"
        "        while True: pass\n"
        "    if response == 'sleep': time.sleep(3600)\n"
        "    if response == 'exit': os._exit(3)\n"
        "    if response == 'bomb': return float(len(bytearray(1 << 40)))\n"
        "    if response == 'raise': raise ValueError('a bug')\n"
        "    return float(ground_truth)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "unruly"


def jobs(*responses: str) -> list[Job]:
    """Jobs with different ground truths, which show whether the order is kept."""
    return [Job(text, str(i / 1000), "any", "exact") for i, text in enumerate(responses)]


def worker_pool(module: str, *, num_workers: int = 2, timeout_seconds: float = 1.0) -> WorkerPool:
    return WorkerPool(num_workers=num_workers, timeout_seconds=timeout_seconds, memory_bytes=1 << 30, module=module)


def test_responses_with_the_same_answer_to_the_same_row_are_parsed_once(tmp_path, monkeypatch):
    """Each score is a time, so that equal ones were made together; a failure is not kept."""
    (tmp_path / "timed.py").write_text(
        "import time\n"
        "def resolve_scorer(scorer, data_source): return scorer\n"
        "def evaluates(scorer, data_source): return True\n"
        "def preload(scorer): pass\n"
        "def settle(response, ground_truth, data_source, *, scorer): return None\n"
        "def answer_of(response, data_source, *, scorer): return response.split()[-1]\n"
        "def score(response, ground_truth, data_source, *, scorer):\n"
        "    if response == 'first fault': raise ValueError\n"
        "    return time.monotonic_ns() % 10**12 / 10**12\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [("a x", "1"), ("b y", "1"), ("c x", "1"), ("d x", "2"), ("first fault", "1"), ("second fault", "1")]
    pool = worker_pool("timed", num_workers=1)
    outcomes = pool.run([Job(text, truth, "any", "math") for text, truth in rows])
    again = pool.run([Job("e x", "1", "any", "math"), Job("e x", "1", "other", "math")])
    pool.close()
    times = [outcome.correctness for outcome in outcomes]
    assert times[0] == times[2] == again[0].correctness
    assert len({times[0], times[1], times[3], times[5], again[1].correctness}) == 5
    assert [outcome.failure for outcome in outcomes] == [None, None, None, None, "crash", None]


def test_a_loop_an_exit_a_memory_bomb_and_a_bug_each_fail_one_response(unruly):
    harm = {50: "loop", 51: "exit", 180: "bomb", 250: "raise"}
    pool = worker_pool(unruly)
    outcomes = pool.run(jobs(*(harm.get(i, "fine") for i in range(300))))
    pids = [worker.pid for worker in pool._workers]
    pool.close()
    assert {i: o.failure for i, o in enumerate(outcomes) if o.failure} == {
        50: "timeout",
        51: "crash",
        180: "crash",
        250: "crash",
    }
    assert [o.reason for o in outcomes if o.failure] == [
        "no result within 1 s",
        "exit code 3",
        "out of memory",
        "ValueError('a bug')",
    ]
    assert all(o.correctness == i / 1000 for i, o in enumerate(outcomes) if i not in harm)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_pool_continues_when_every_worker_hangs(unruly):
    pool = worker_pool(unruly, timeout_seconds=0.7)
    start = time.monotonic()
    outcomes = pool.run(jobs("sleep", "loop", "sleep", "fine", "loop", "sleep"))
    assert [o.failure for o in outcomes] == ["timeout", "timeout", "timeout", None, "timeout", "timeout"]
    assert time.monotonic() - start < 20
    assert [o.correctness for o in pool.run(jobs("fine", "fine"))] == [0.0, 0.001]
    assert pool.run([]) == []
    pool.close()


def test_an_idle_worker_that_was_killed_is_replaced_with_a_warning(unruly, caplog):
    pool = worker_pool(unruly, num_workers=1)
    pool.run(jobs("fine"))
    assert caplog.messages == []
    (worker,) = pool._workers
    os.kill(worker.pid, 9)
    # The process that scores dies after the guard that was killed, and could still answer until then.
    assert select.select([worker], [], [], patient(30))[0], "the worker's connection was not closed"
    assert [o.failure for o in pool.run(jobs("fine", "fine"))] == [None, None]
    (warning,) = caplog.messages
    assert warning.startswith("a reward worker ended")
    assert "exit code -9" in warning
    pool.close()


def test_workers_that_cannot_import_their_scorer_fail_the_run(unruly):
    pool = worker_pool(unruly)
    with pytest.raises(RewardError, match=r"reward workers do not start .*raise reward\.memory_bytes"):
        pool.run([Job("fine", "1", "any", "reasoning_gym")])
    pool.close()


def test_every_response_of_a_large_step_is_scored():
    pool = WorkerPool(num_workers=2, timeout_seconds=10.0, memory_bytes=2 << 30)
    batch = [Job("7+8=15 15-3=12 Answer: 12", "12", "arithmetic", "auto")] * (512 * 16)
    outcomes = pool.run(batch)
    pool.close()
    assert sum(o.correctness for o in outcomes) == len(batch)


def test_a_worker_imports_no_torch():
    heavy = "{'torch', 'ray', 'transformers', 'megatron', 'sglang', 'pyarrow'}"
    code = (
        "import sys; from megatron_hapo.reward import scorers, worker\n"
        "scorers.preload('math'); scorers.preload('reasoning_gym')\n"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- rollouts to scores


def rollout(tokenizer, text: str, *, ground_truth: str = "12", source: str = "arithmetic") -> Rollout:
    ids = np.array([*tokenizer(text)["input_ids"], tokenizer.eos_token_id], dtype=np.int32)
    prompt = Prompt(uid="p/0", token_ids=ids[:1], ground_truth=ground_truth, data_source=source)
    zeros = np.zeros(len(ids), dtype=np.float32)
    return Rollout(
        prompt=prompt,
        response_ids=ids,
        rollout_log_probs=zeros,
        temperatures=zeros,
        finish_reason="stop",
        policy_versions=np.zeros(len(ids), dtype=np.int32),
    )


def test_rollouts_get_their_rewards_with_the_overlong_penalty(tiny_qwen3, caplog):
    from megatron_hapo.data.prompts import load_tokenizer

    tokenizer = load_tokenizer(tiny_qwen3)
    config = RewardConfig(overlong=OverlongConfig(buffer_tokens=8), timeout_seconds=2.0)
    with ProcessRewardPool(config, tiny_qwen3, max_response_tokens=20) as pool, caplog.at_level(logging.WARNING):
        scores = pool.score(
            [
                rollout(tokenizer, "Answer: 12"),
                rollout(tokenizer, "Answer: 13"),
                rollout(tokenizer, "3*4=12, 1+1=2, =12"),
                rollout(tokenizer, "Answer: 9^{9^{9^{9}}}", source="math_dapo"),
            ]
        )
    assert [(s.reward, s.correct, s.failure) for s in scores] == [
        (1.0, True, None),
        (-1.0, False, None),
        (1.0 - 7 / 8, True, None),
        (-1.0 - 10 / 8, False, "timeout"),
    ]
    assert "1 of 4 responses could not be scored and count as wrong; the first, to p/0: timeout" in caplog.text
