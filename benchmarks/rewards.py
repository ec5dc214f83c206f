"""Responses scored per second by two workers, each response in a sandboxed fork where its scorer parses answers.

python benchmarks/rewards.py
"""

from __future__ import annotations

import argparse
import os
import time

from megatron_hapo.data.reasoning_tasks import encode_task, import_reasoning_gym
from megatron_hapo.reward.worker import Job
from megatron_hapo.reward.worker_pool import WorkerPool

EXPRESSIONS = (
    (r"\frac{2}{2 \cdot %d}", r"\frac{1}{%d}"),
    (r"\sqrt{3} \cdot %d", r"%d\sqrt{3}"),
    ("%d+x^{2}", "x^{2}+%d"),
    (r"\{%d,1\}", r"\{1,%d\}"),
    (r"\pi \cdot %d", r"%d\pi"),
    ("%d.50", "%d.5"),
)
"""Two ways to write the same."""
TASKS = ("countdown", "polynomial_multiplication", "spiral_matrix", "number_sorting")
STEP = 8192
"""Responses of a step: 512 prompts, 16 samples each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2048, help="responses of each kind; a warm-up comes first")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="kinds whose names contain this")
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    isolation = None
    print("| scorer | responses / s | CPU ms / response | s for 8,192 | mean score | failures |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    chosen = {name: jobs for name, jobs in kinds(options.count).items() if options.only in name}
    for name, jobs in chosen.items():
        pool = WorkerPool(num_workers=options.workers, timeout_seconds=30.0, memory_bytes=2 << 30)
        pool.run(jobs[: 64 * options.workers])
        start = time.perf_counter()
        before = cpu_seconds(pool)
        outcomes = pool.run(jobs)
        seconds = time.perf_counter() - start
        cpu = cpu_seconds(pool) - before
        isolation = pool.isolation()
        pool.close()
        failures = sum(outcome.failure is not None for outcome in outcomes)
        right = sum(outcome.correctness for outcome in outcomes) / len(jobs)
        step_seconds = STEP * seconds / len(jobs)
        print(
            f"| {name} | {len(jobs) / seconds:,.0f} | {1000 * cpu / len(jobs):.2f} | {step_seconds:.1f} | "
            f"{right:.2f} | {failures} |",
            flush=True,
        )
    print(isolation)


def kinds(count: int) -> dict[str, list[Job]]:
    """Responses by what has to be done for them; sixteen to a prompt, half of them right."""
    found = {
        "exact": [_plain("Answer: %d", row, "arithmetic") for row in range(count)],
        "math, integers": [_plain("so \\boxed{%d}", row, "math_dapo") for row in range(count)],
        "math, expressions": [_expression(row) for row in range(count)],
        "math, expressions, all different": [_expression(16 * row + row % 2) for row in range(count)],
        "math, expressions of another form": [_other_form(row) for row in range(count)],
        "math, no answer": [_plain("It is %d", row, "math_dapo") for row in range(count)],
    }
    for name in TASKS:
        dataset = import_reasoning_gym().create_dataset(name, size=max(1, count // 16), seed=1)
        answers = [str(dataset[index]["answer"]) for index in range(len(dataset))]
        found[f"reasoning_gym, {name}"] = [_task(name, answers, row) for row in range(count)]
    found["reasoning_gym, not handed on"] = [
        Job("<answer>__import__('os')</answer>", job.ground_truth, job.data_source, "auto")
        for job in found["reasoning_gym, countdown"]
    ]
    return found


def cpu_seconds(pool: WorkerPool) -> float:
    """Processor time of the pool's workers and of the processes that have ended below them."""
    total = 0
    pending = [worker.pid for worker in pool._workers]
    while pending:
        pid = pending.pop()
        try:
            with open(f"/proc/{pid}/stat") as stat, open(f"/proc/{pid}/task/{pid}/children") as children:
                total += sum(int(field) for field in stat.read().rpartition(")")[2].split()[11:15])
                pending += map(int, children.read().split())
        except OSError:  # a fork that has just ended; its parent has its time
            continue
    return total / os.sysconf("SC_CLK_TCK")


def _plain(text: str, row: int, source: str) -> Job:
    return Job(text % (row // 16 + row % 2), str(row // 16), source, "auto")


def _expression(row: int) -> Job:
    said, truth = EXPRESSIONS[row // 16 % len(EXPRESSIONS)]
    return Job("Answer: " + said % (row // 16 + 2 + row % 2), truth % (row // 16 + 2), "math_dapo", "auto")


def _other_form(row: int) -> Job:
    """All different, and all wrong: sympy tries to simplify the difference."""
    said, _ = EXPRESSIONS[row % len(EXPRESSIONS)]
    _, truth = EXPRESSIONS[(row + 1) % len(EXPRESSIONS)]
    return Job("Answer: " + said % (row + 2), truth % (row + 2), "math_dapo", "auto")


def _task(name: str, answers: list[str], row: int) -> Job:
    index = row // 16
    truth = encode_task(answer=answers[index], index=index, size=len(answers), seed=1, options={})
    said = answers[index] if row % 2 else answers[index - 1]
    return Job(f"so <answer>{said}</answer>", truth, f"reasoning_gym/{name}", "auto")


if __name__ == "__main__":
    main()
