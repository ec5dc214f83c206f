"""Hostile responses affect only their own reward."""

import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hapo.data.reasoning_tasks import import_reasoning_gym
from megatron_hapo.reward.answer_grammar import EVALUATED_TASKS
from megatron_hapo.reward.scorers import preload, score
from megatron_hapo.reward.worker import Job
from megatron_hapo.reward.worker_pool import WorkerPool
from tests.reward.hostile_responses import SECRET, hostile_jobs, payloads, right_answer

CANARIES = [Path(folder) / "hostile-canary" for folder in ("/", "/tmp", "/dev/shm", Path.home(), Path.cwd())]


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    return tmp_path / "canary"


@pytest.fixture
def evaluator(tmp_path, monkeypatch) -> str:
    """A scorer that evaluates any response, as reasoning-gym's do, without a grammar in front of it."""
    (tmp_path / "evaluator.py").write_text(
        "import megatron_hapo.reward.scorers, os, reasoning_gym\n"
        "def resolve_scorer(scorer, data_source): return scorer\n"
        "def evaluates(scorer, data_source): return True\n"
        "def preload(scorer): pass\n"
        "def settle(response, ground_truth, data_source, *, scorer): return None\n"
        "def answer_of(response, data_source, *, scorer): return os.urandom(8).hex()  # each is scored\n"
        "def score(response, ground_truth, data_source, *, scorer):\n"
        "    value = eval(response)\n"
        "    return float(value is True or megatron_hapo.reward.scorers.is_right_exact(str(value), ground_truth))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "evaluator"


def descendants() -> list[int]:
    """Ids of all descendants of this process, according to /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def assert_unharmed(canary: Path, before: list[int]) -> None:
    assert not canary.exists()
    assert not [path for path in CANARIES if path.exists()]
    deadline = time.monotonic() + 5
    while (left := set(descendants()) - set(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_hostile_responses_run_nothing_and_change_no_later_score(canary):
    before = descendants()
    hostile = hostile_jobs(canary, os.getpid())
    honest = [right_answer(name) for name in EVALUATED_TASKS]
    honest += [Job("Answer: \\frac12", "0.5", "math_dapo", "auto"), Job("Answer: 3", "3", "arithmetic", "auto")]
    wrong = [Job("<answer>wrong</answer>", job.ground_truth, job.data_source, "auto") for job in honest[:9]]
    # A harmless response after every hostile one, on the same worker or on the other. Their truths differ by spaces, so
    # that each is scored anew.
    between = [(honest + wrong)[number % 20] for number in range(len(hostile))]
    between = [replace(job, ground_truth=job.ground_truth + " " * number) for number, job in enumerate(between)]
    pool = WorkerPool(num_workers=2, timeout_seconds=6.0, memory_bytes=2 << 30)
    pool.run(honest)
    pids = [worker.pid for worker in pool._workers]
    start = time.monotonic()
    outcomes = pool.run([job for pair in zip(hostile, between, strict=True) for job in pair])
    seconds = time.monotonic() - start
    assert [worker.pid for worker in pool._workers] == pids, "a response ended a worker"
    pool.close()

    assert len(hostile) >= 200
    assert all(outcome.correctness < 0.1 for outcome in outcomes[::2])
    unparsable = [EVALUATED_TASKS[job.data_source.removeprefix("reasoning_gym/")].unparsable for job in wrong]
    expected = [*[1.0] * len(honest), *unparsable]
    assert [o.correctness for o in outcomes[1::2]] == [expected[number % 20] for number in range(len(hostile))]
    assert not [outcome for outcome in outcomes[1::2] if outcome.failure]
    assert seconds < 60 + 6.0 * sum(outcome.failure == "timeout" for outcome in outcomes)
    assert_unharmed(canary, before)


def test_code_that_runs_is_confined(canary, evaluator):
    before = descendants()
    hostile = payloads(canary, os.getpid())
    jobs = [Job(text, "2", "any", "exact") for payload in hostile.values() for text in (payload, "1+1", "1+2")]
    pool = WorkerPool(num_workers=2, timeout_seconds=1.0, memory_bytes=2 << 30, module=evaluator)
    outcomes = pool.run(jobs)
    pool.close()
    by_name = dict(zip(hostile, outcomes[::3], strict=True))
    # Code that runs can give its own response full marks; the grammar keeps it from running.
    assert {name for name, outcome in by_name.items() if outcome.correctness} == {"patch_float"}
    assert {name for name, outcome in by_name.items() if outcome.failure == "timeout"} == {
        "ignore_signals",
        "loop",
        "sleep",
        "power",
        "power_of_power",
        "factorial",
        "regex",
    }
    assert [o.correctness for o in outcomes[1::3]] == [1.0] * len(hostile)
    assert [o.correctness for o in outcomes[2::3]] == [0.0] * len(hostile)
    assert_unharmed(canary, before)


def test_the_grammar_guards_every_scorer_that_compiles_answers():
    """Every scorer of reasoning-gym gets marked answers; the scorers that compile one must be in the table."""
    import_reasoning_gym()
    compiled: set[str] = set()
    current = ""

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if current and event == "compile" and "hapomark" in str(arguments[0]):
            compiled.add(current)

    sys.addaudithook(note)
    for name in sorted(import_reasoning_gym().factory.DATASETS.keys() - {"composite"}):
        dataset = import_reasoning_gym().create_dataset(name, size=1, seed=1)
        entry = dataset[0]
        for answer in ("hapomark", "[hapomark]", '{"a": hapomark}', "hapomark + 1", "1, hapomark", "'hapomark'"):
            current = name
            try:
                dataset.score_answer(answer, entry)
            except Exception:  # some scorers raise on what they cannot parse
                pass
            finally:
                current = ""
    assert compiled == EVALUATED_TASKS.keys()


def test_math_compiles_only_the_arithmetic_of_a_response(canary):
    compiled: list[str] = []
    listening = True

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event == "compile" and arguments[0] is not None:
            compiled.append(str(arguments[0]))

    preload("math")
    sys.addaudithook(note)
    for text in [*payloads(canary, os.getpid()).values(), "hapomark", "hapomark(1)", "1+1", "3/4 hapomark"]:
        score(f"Answer: {text[:200]}", "31337", "math_dapo")
    listening = False
    # The list includes what sympy compiles for itself (imports, generated monomial functions).
    assert not [source for source in compiled if re.search(r"__|hapomark|open|exec|eval\(|canary", source)]
    assert not canary.exists()


@pytest.mark.parametrize("name", sorted(EVALUATED_TASKS))
def test_a_rejected_answer_scores_like_an_unparsable_one(name):
    dataset = import_reasoning_gym().create_dataset(name, size=1, seed=1)
    assert dataset.score_answer("(", dataset[0]) == EVALUATED_TASKS[name].unparsable
