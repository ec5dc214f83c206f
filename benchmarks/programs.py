"""Seconds in which two workers test 1,000 programs: right, wrong, slow and hostile ones.

python benchmarks/programs.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from megatron_hapo.config import RewardConfig
from megatron_hapo.reward.pool import Scorers
from megatron_hapo.types import Prompt

NUMBERS = [(a, b) for a in range(1, 6) for b in (7, 99)]
TESTS = json.dumps({"inputs": [f"{a} {b}\n" for a, b in NUMBERS], "outputs": [f"{a + b}\n" for a, b in NUMBERS]})
SHARES = {"right": 450, "wrong": 300, "slow": 50, "hostile": 200}
"""Of 1,000 programs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder) / "marks"
        marks.mkdir()
        kinds = [kind for kind, share in SHARES.items() for _ in range(share * options.count // 1000)]
        random.Random(0).shuffle(kinds)
        hostile = hostile_programs(marks)
        programs = [program(kind, number, hostile) for number, kind in enumerate(kinds)]
        config = RewardConfig.model_validate(
            {"scorer": "code", "workers": options.workers, "code": {"test_seconds": 2.0}}
        )
        prompt = Prompt(uid="p", token_ids=np.zeros(1, dtype=np.int32), ground_truth=TESTS, data_source="code")
        scorers = Scorers(config)
        first = [worker.pid for worker in scorers.workers._workers]
        load, start = os.getloadavg()[0], time.perf_counter()
        results = scorers.score([prompt] * len(programs), programs)
        seconds = time.perf_counter() - start
        survived = [worker.pid for worker in scorers.workers._workers] == first
        scorers.close()
        passed = Counter(kind for kind, result in zip(kinds, results, strict=True) if result.outcome.correctness == 1)
        failures = sum(result.outcome.failure is not None for result in results)
        print(f"{len(programs)} programs of {len(NUMBERS)} tests, {options.workers} workers: {seconds:.1f} s")
        print(f"load average before {load:.1f}, {os.cpu_count()} cores; {Counter(kinds)}")
        print(f"passed: {dict(passed)}; scoring failures: {failures}; workers survived: {survived}")
        print(f"traces outside the sandbox: {len(list(marks.iterdir()))}")


def program(kind: str, number: int, hostile: list[str]) -> str:
    code = {
        "right": "a, b = map(int, input().split())\nprint(a + b)",
        "wrong": "a, b = map(int, input().split())\nprint(a - b)",
        "slow": "while True:\n    pass",
        "hostile": hostile[number % len(hostile)],
    }[kind]
    return f"```python\n{code}\n```"


def hostile_programs(marks: Path) -> list[str]:
    """Programs that would leave a file in the folder of marks if they escaped, harm the machine, or only look right."""
    escape = f"open({str(marks / 'escaped')!r} + str(__import__('os').getpid()), 'w').write('x')"
    return [
        f"import os\nwhile True:\n    os.fork()\n    {escape}",
        f"import subprocess\nsubprocess.run(['touch', {str(marks / 'touched')!r}])",
        "import socket\nsocket.create_connection(('127.0.0.1', 22))",
        f"import os\nprint(os.listdir({str(marks.parent)!r}))",
        "f = open('big', 'wb')\nwhile True:\n    f.write(bytes(1 << 24))",
        "x = [bytearray(1 << 28) for _ in range(100)]",
        "while True:\n    print('0' * 100000)",
        "import os\nos._exit(0)",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)",
        f"import ctypes, os\nctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)\n{escape}",
    ]


if __name__ == "__main__":
    main()
